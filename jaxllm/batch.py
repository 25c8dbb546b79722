"""A Step of host ints as the one int32 array that a compiled step takes, and what the step reads out of it.

One packed numpy array goes into a jit in 7 µs; a pytree of eight costs 170 µs. `pack` and `unpack` are the only places
that know its layout. What a step found out comes back as a StepResult.
M rows, T chunk lanes, N = M + T tokens, P pages of a row at most, S row slots.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.plan import Bucket, Plan
from jaxllm.scheduler import Step
from pallas_kernels import Rows
from pallas_kernels.work import lanes

_FIELDS = 7  # slot, length after its first token or chunk, chunk_start, chunk_len, token, samples, new_page


def packed_size(bucket: Bucket) -> int:
    return _FIELDS * bucket.rows + bucket.chunk * (2 if bucket.scored else 1)


def pack(step: Step, plan: Plan) -> np.ndarray:
    """int32 [packed_size]: seven numbers a row, then the chunk lanes' tokens (scored: and the tokens that follow them)."""
    rows, chunk = step.bucket.rows, step.bucket.chunk
    packed = np.zeros(packed_size(step.bucket), np.int32)
    table = packed[: _FIELDS * rows].reshape(_FIELDS, rows)
    table[0] = plan.max_num_seqs  # padding rows use the slot that no sequence has
    lane, numbers = 0, []
    tokens = packed[_FIELDS * rows :]
    for row in step.rows:
        count = row.count if row.chunked else 0
        token = -1 if row.token is None else row.token
        numbers.append((row.slot, row.start + (count or 1), lane if count else 0, count, token, row.samples, row.new_page))
        if count:
            known = row.sequence.tokens
            tokens[lane : lane + count] = known[row.start : row.start + count]
            if step.bucket.scored:
                following = known[row.start + 1 : row.start + count + 1]
                tokens[chunk + lane : chunk + lane + len(following)] = following
            lane += count
    table[:, : len(numbers)] = np.array(numbers, np.int32).T
    return packed


@dataclass(frozen=True)
class StepResult:
    """What one step found out, on the host. `logprobs` and `hidden` are there if a row asked for them, `prompt` after a scored step.

    tokens: what each row drew, one after the other.
    logprobs: chosen [M], rank [M], values [M, C], ids [M, C]; prompt: the same for the chunk lanes [T]; hidden [M, D] in float32.
    """

    tokens: list[list[int]]
    logprobs: tuple[np.ndarray, ...] | None = None
    prompt: tuple[np.ndarray, ...] | None = None
    hidden: np.ndarray | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What the step's jit works on. `logit_lane_M` is the token lane whose output chooses a row's next token."""

    slot_M: Array
    length_M: Array
    samples_M: Array
    token_N: Array
    position_N: Array
    slot_N: Array
    kv_slot_N: Array
    logit_lane_M: Array
    target_T: Array
    rows: Rows


def repeats(packed: Array, bucket: Bucket) -> Array:
    """How often the packed step runs, int32: as often as a row draws, and once if none does."""
    return jnp.maximum(packed[5 * bucket.rows : 6 * bucket.rows].max(), 1)


def repetition(packed: Array, bucket: Bucket, i: Array, turns: Array) -> Array:
    """The packed step as it runs the i-th of `turns` times, from 0: rows run what they drew before.

    A row that draws less often than others is empty at first, so that everybody draws in the last turn: the one whose logits stay, for
    those whose token is drawn from edited ones.
    """
    slot_M, length_M, *_, given_M, samples_M, new_page_M = packed.reshape(_FIELDS, bucket.rows)
    turn_M = i - (turns - jnp.maximum(samples_M, 1))  # of the row's own
    runs_M, none = turn_M >= 0, jnp.zeros_like(slot_M)
    length_M, samples_M = jnp.where(runs_M, length_M + turn_M, 0), jnp.where(runs_M, samples_M - turn_M, 0)
    return jnp.concatenate([slot_M, length_M, none, none, jnp.where(turn_M == 0, given_M, -1), samples_M, new_page_M])


def tables(packed: Array, bucket: Bucket, page_size: int, table_SP: Array) -> tuple[Array, Array]:
    """The page tables with the packed step's new pages written in: of all slots, and [M, P] of its rows."""
    slot_M, length_M, *_, samples_M, new_page_M = packed[: _FIELDS * bucket.rows].reshape(_FIELDS, bucket.rows)
    last_M = jnp.maximum(length_M + jnp.maximum(samples_M, 1) - 2, 0)  # the last position that it runs
    dummy = table_SP.shape[0] - 1
    table_SP = table_SP.at[jnp.where(new_page_M > 0, slot_M, dummy), last_M // page_size].set(new_page_M, mode="clip")
    return table_SP, table_SP[slot_M]


def unpack(packed: Array, bucket: Bucket, page_size: int, last_S: Array, table_MP: Array) -> Batch:
    """What is in it, for rows with these page tables.

    last_S: the newest token of every slot, which is what a decode whose token the host has not read yet runs on.
    """
    m, t = bucket.rows, bucket.chunk
    slot_M, length_M, chunk_start_M, chunk_len_M, given_M, samples_M, _ = packed[: _FIELDS * m].reshape(_FIELDS, m)
    chunk_T = packed[_FIELDS * m : _FIELDS * m + t]
    rows = Rows(table_MP, length_M, chunk_start_M, chunk_len_M)
    lane = lanes(rows, t)
    position_N = jnp.maximum(lane.position_N, 0)
    page_N = rows.table_MP[lane.row_N, position_N // page_size]
    return Batch(
        slot_M=slot_M,
        length_M=length_M,
        samples_M=samples_M > 0,
        token_N=jnp.concatenate([jnp.where(given_M >= 0, given_M, last_S[slot_M]), chunk_T]),
        position_N=position_N,
        slot_N=slot_M[lane.row_N],
        # Lanes that no row owns write to the trash page.
        kv_slot_N=jnp.where(lane.position_N >= 0, page_N * page_size + position_N % page_size, 0),
        logit_lane_M=jnp.where(chunk_len_M > 0, m + chunk_start_M + chunk_len_M - 1, jnp.arange(m)),
        target_T=packed[_FIELDS * m + t :],
        rows=rows,
    )
