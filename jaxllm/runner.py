"""Owns the parameters, the KV pages and the row state on the device, and one compiled step for each bucket.

Everything is compiled before the engine says ready; a shape that was not is a KeyError. `run` dispatches and returns at
once; the tokens are on their way to the host and wait in the Handle. A step is one executable that also takes the
likeliest tokens; when some row samples, a second small one draws over the same logits.

S row slots and the spare one that padding uses, M rows of a bucket, T chunk lanes, N = M + T, P pages of a row, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import stack_size
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from jaxllm import sample, scheduler
from jaxllm.batch import StepResult, pack, packed_size, unpack
from jaxllm.cache import PAGE_AXES, Cache
from jaxllm.decoder import Decoder
from jaxllm.parallel import sharding, spec
from jaxllm.plan import Bucket, Plan
from jaxllm.request import MAX_BIAS, MAX_STOP_IDS
from jaxllm.scheduler import Step
from pallas_kernels import Rows, Work, paged_attention, plan_work, write_kv

log = logging.getLogger("jaxllm")

ADMITTED = 16  # sequences whose row state one dispatch brings to the device
# XLA's pass thinks that only four fifths of a GPU may be used, finds that the cache alone is more, and recomputes for nothing.
_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
_COMPILER_STACK = 64 * 2**20  # XLA's recursion over a deep model overflows a thread's usual 8 MiB


class Handle:
    """A dispatched step. `read` waits for it."""

    def __init__(self, tokens: Array, logprobs: tuple[Array, ...] | None, prompt: tuple[Array, ...] | None):
        self._arrays = tokens, logprobs, prompt
        for array in jax.tree.leaves(self._arrays):
            array.copy_to_host_async()

    def read(self) -> StepResult:
        tokens, logprobs, prompt = jax.tree.map(np.asarray, self._arrays)
        return StepResult(tokens.tolist(), logprobs, prompt)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedContext:
    """How a layer attends in a step: it writes its K and V into their pages, then reads the rows' pages."""

    rows: Rows
    kv_slot_N: Array
    works: dict[str, Work]  # by window
    mesh: Mesh = field(metadata={"static": True})

    def attend(self, q_NQH: Array, k_NKH: Array, v_NKH: Array, kv, *, scale: float, window: int | None, softcap: float | None):
        def local(q, k, v, k_pages, v_pages, slots, rows, work):
            k_pages, v_pages = write_kv(k_pages, v_pages, k, v, slots, implementation=work.implementation)
            return paged_attention(q, k_pages, v_pages, rows, work, scale=scale, window=window, softcap=softcap), (k_pages, v_pages)

        if self.mesh.size > 1:  # kernels see their own heads only
            axes = (None, "heads", None), (None, "kv", None), PAGE_AXES, ()
            heads, kv_heads, pages, whole = map(spec, axes)
            specs = (heads, kv_heads, kv_heads, pages, pages, whole, whole, whole)
            local = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=(heads, (pages, pages)), check_vma=False)
        return local(q_NQH, k_NKH, v_NKH, *kv, self.kv_slot_N, self.rows, self.works[str(window)])


@dataclass
class RowState:
    """What the device keeps for each row slot. The last four matter only to rows that sample with edited logits."""

    last_S: Array  # the newest token
    table_SP: Array  # its pages
    floats_SF: Array  # sampling parameters, packed by `sample.Sampling`
    ints_SI: Array
    edits_SE: Array  # bias ids, bias values (as bits), stop ids, and the length below which those are banned
    counts_SV: Array  # how often each token was produced
    in_prompt_SV: Array


class Runner:
    def __init__(self, decoder: Decoder, cache: Cache, plan: Plan, mesh: Mesh, implementation: str):
        self.plan, self.model = plan, decoder.c
        self._mesh, self._implementation = mesh, implementation
        self._graph, state = nnx.split(decoder)
        leaves, self._tree = jax.tree.flatten(state)
        self._params = tuple(leaves)
        self._cache = cache
        self._everywhere = sharding(mesh, ())
        self._state = self._empty_state()
        self._steps: dict[Bucket, Callable] = {}
        self._draws: dict[int, Callable] = {}
        self._edits: dict[int, Callable] = {}
        self._admit: Callable
        self._admit_edits: Callable

    def _empty_state(self) -> RowState:
        slots, vocab = self.plan.max_num_seqs + 1, self.model.vocab_size
        edits = 2 * MAX_BIAS + MAX_STOP_IDS + 1
        shapes = {
            "last_S": ((slots,), jnp.int32),
            "table_SP": ((slots, self.plan.max_pages), jnp.int32),
            "floats_SF": ((slots, sample.FLOATS), jnp.float32),
            "ints_SI": ((slots, sample.INTS), jnp.int32),
            "edits_SE": ((slots, edits), jnp.int32),
            "counts_SV": ((slots, vocab), jnp.int16),
            "in_prompt_SV": ((slots, vocab), jnp.bool_),
        }
        zeros = jax.jit(lambda: {k: jnp.zeros(*v) for k, v in shapes.items()}, out_shardings=self._everywhere)
        return RowState(**zeros())

    # ------------------------------------------------------------------ compiling

    def compile(self, progress: Callable[[str], None] = lambda name: None) -> None:
        """Compiles every shape, in threads, and runs each once on padding, so that nothing is left for the first request."""
        jobs = self._jobs()
        before = stack_size(_COMPILER_STACK)
        try:
            with ThreadPoolExecutor(max_workers=8) as pool:
                for (name, put, _), compiled in zip(jobs, pool.map(lambda job: job[2](), jobs), strict=True):
                    put(compiled)
                    progress(name)
        finally:
            stack_size(before)
        self._warm_up()

    def _jobs(self) -> list[tuple[str, Callable, Callable]]:
        """(what it is, where the executable goes, how to compile it) of each executable."""
        s, whole = self._state, self._everywhere
        jobs = []

        def job(name: str, put: Callable, f: Callable, args: tuple, donate: tuple[int, ...], out: Any) -> None:
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", whole)), args)
            jobs.append(
                (
                    name,
                    put,
                    lambda: jax.jit(f, donate_argnums=donate, out_shardings=out, compiler_options=_OPTIONS).lower(*abstract).compile(),
                )
            )

        cache_out = [(sharding(self._mesh, PAGE_AXES),) * 2] * len(self._cache)
        for bucket in sorted({*self.plan.buckets, self.plan.scored}, reverse=True):  # the slowest to compile first
            job(
                f"step of {bucket.rows} rows, {bucket.chunk} prompt tokens" + (", scored" if bucket.scored else ""),
                partial(self._steps.__setitem__, bucket),
                jax.default_matmul_precision("highest" if self.plan.dtype == "float32" else "default")(partial(self._step, bucket)),
                (self._params, self._cache, s.last_S, s.table_SP, np.zeros(packed_size(bucket), np.int32)),
                (1, 2, 3),
                (cache_out, whole, whole, whole, whole, whole, whole),
            )
        for m in sorted({b.rows for b in (*self.plan.buckets, self.plan.scored)}):
            head, logits = np.zeros((3, m), np.int32), jax.ShapeDtypeStruct((m, self.model.vocab_size), jnp.float32, sharding=whole)
            args = (s.last_S, s.floats_SF, s.ints_SI, head, logits)
            job(f"draw for {m} rows", partial(self._draws.__setitem__, m), _draw, args, (0,), whole)
            args = (s.last_S, s.counts_SV, s.floats_SF, s.ints_SI, s.edits_SE, s.in_prompt_SV, head, logits)
            edit = partial(_draw_edited, count=self.plan.max_logprobs)
            job(f"edited draw for {m} rows", partial(self._edits.__setitem__, m), edit, args, (0, 1), whole)
        args = (s.table_SP, s.floats_SF, s.ints_SI, s.edits_SE, np.zeros((ADMITTED, self._admit_width), np.int32))
        job("admission", partial(setattr, self, "_admit"), _admit, args, (0, 1, 2, 3), whole)
        args = (s.edits_SE, s.counts_SV, s.in_prompt_SV, *self._edits_of(None))
        job("admission with edits", partial(setattr, self, "_admit_edits"), _admit_edits, args, (0, 1, 2), whole)
        return jobs

    def _warm_up(self) -> None:
        for bucket in self._steps:
            self._dispatch(Step([], bucket))
        for m, draw in self._draws.items():
            head = np.full((3, m), self.plan.max_num_seqs, np.int32) * np.array([[1], [0], [0]], np.int32)
            logits = jax.device_put(np.zeros((m, self.model.vocab_size), np.float32), self._everywhere)
            self._state.last_S, _ = draw(self._state.last_S, self._state.floats_SF, self._state.ints_SI, head, logits)
            self._run_edits(self._edits[m], head, logits)
        self._admit_rows([])
        self._admit_row_edits(None)
        jax.block_until_ready((self._cache, vars(self._state)))

    def temp_bytes(self) -> int:
        """The most that any step needs beside its arguments, on each device."""
        return max(step.memory_analysis().temp_size_in_bytes for step in self._steps.values())

    # ------------------------------------------------------------------ running

    def run(self, step: Step) -> Handle:
        """Dispatches a step: new rows' state first, then the model, then the draw if a row samples."""
        for start in range(0, len(step.admitted), ADMITTED):
            self._admit_rows(step.admitted[start : start + ADMITTED])
        for sequence in step.admitted:
            if sequence.params.edits:
                self._admit_row_edits(sequence)
        tokens, logits, head, prompt = self._dispatch(step)
        state, m = self._state, step.bucket.rows
        sampling = [row.sequence.params for row in step.rows if row.samples]
        logprobs = None
        if any(p.edits for p in sampling):
            tokens, *logprobs = self._run_edits(self._edits[m], head, logits)
        elif any(not p.greedy for p in sampling):
            state.last_S, tokens = self._draws[m](state.last_S, state.floats_SF, state.ints_SI, head, logits)
        wanted = logprobs is not None and any(p.logprobs is not None for p in sampling)
        return Handle(tokens, tuple(logprobs) if wanted and logprobs else None, prompt if step.bucket.scored else None)

    def _dispatch(self, step: Step) -> tuple[Array, Array, Array, tuple[Array, ...]]:
        run, state = self._steps[step.bucket], self._state
        self._cache, state.last_S, state.table_SP, tokens, logits, head, prompt = run(
            self._params, self._cache, state.last_S, state.table_SP, pack(step, self.plan)
        )
        return tokens, logits, head, prompt

    def _run_edits(self, edit: Callable, head: Any, logits: Array) -> list[Array]:
        s = self._state
        s.last_S, s.counts_SV, *found = edit(s.last_S, s.counts_SV, s.floats_SF, s.ints_SI, s.edits_SE, s.in_prompt_SV, head, logits)
        return found

    @property
    def _admit_width(self) -> int:
        return 1 + self.plan.max_pages + sample.FLOATS + sample.INTS

    def _admit_rows(self, sequences: Sequence[scheduler.Sequence]) -> None:
        packed = np.zeros((ADMITTED, self._admit_width), np.int32)
        packed[:, 0] = self.plan.max_num_seqs
        for row, sequence in zip(packed, sequences, strict=False):
            floats, ints = sample.Sampling.pack(sequence.params, sequence.seed)
            row[0] = sequence.slot
            row[1 : 1 + sample.FLOATS] = np.array(floats, np.float32).view(np.int32)
            row[1 + sample.FLOATS : 1 + sample.FLOATS + sample.INTS] = ints
            pages = row[1 + sample.FLOATS + sample.INTS :]
            pages[: len(sequence.pages)] = sequence.pages
        s = self._state
        s.table_SP, s.floats_SF, s.ints_SI, s.edits_SE = self._admit(s.table_SP, s.floats_SF, s.ints_SI, s.edits_SE, packed)

    def _admit_row_edits(self, sequence: scheduler.Sequence | None) -> None:
        s = self._state
        s.edits_SE, s.counts_SV, s.in_prompt_SV = self._admit_edits(s.edits_SE, s.counts_SV, s.in_prompt_SV, *self._edits_of(sequence))

    def _edits_of(self, sequence: scheduler.Sequence | None) -> tuple[np.ndarray, ...]:
        """(slot and edits int32, counts int16 [V], in_prompt bool [V]) of a row; of the spare one for None."""
        vocab = self.model.vocab_size
        head = np.full(1 + 2 * MAX_BIAS + MAX_STOP_IDS + 1, -1, np.int32)
        counts, in_prompt = np.zeros(vocab, np.int16), np.zeros(vocab, np.bool_)
        head[0] = self.plan.max_num_seqs
        if sequence is not None:
            params, prompt_len = sequence.params, sequence.prompt_len
            edits = head[1:]
            edits[: len(params.logit_bias)] = list(params.logit_bias)
            values = edits[MAX_BIAS : 2 * MAX_BIAS].view(np.float32)
            values[:] = 0
            values[: len(params.logit_bias)] = list(params.logit_bias.values())
            edits[2 * MAX_BIAS : 2 * MAX_BIAS + len(sequence.stop_ids)] = sorted(sequence.stop_ids)
            edits[-1] = prompt_len + params.min_tokens
            head[0] = sequence.slot
            in_prompt[sequence.tokens[:prompt_len]] = True
            np.add.at(counts, sequence.tokens[prompt_len:], 1)
        return head, counts, in_prompt

    # ------------------------------------------------------------------ the compiled step

    def _step(self, bucket: Bucket, params: tuple[Array, ...], cache: Cache, last_S: Array, table_SP: Array, packed: Array):
        decoder = nnx.merge(self._graph, jax.tree.unflatten(self._tree, params))
        batch, table_SP = unpack(packed, bucket, self.plan.page_size, last_S, table_SP)
        context = PagedContext(batch.rows, batch.kv_slot_N, self._works(batch.rows, bucket), self._mesh)
        hidden_ND, cache = decoder(batch.token_N, batch.position_N, cache, context)
        logits_MV = decoder.logits(hidden_ND[batch.logit_lane_M])
        tokens_M = sample.greedy(logits_MV)
        last_S = _remember(last_S, batch.slot_M, batch.samples_M, tokens_M)
        # The new token's place is the length of what was run: with the seed, all that a draw depends on.
        head = jnp.stack([batch.slot_M, batch.length_M, batch.samples_M.astype(jnp.int32)])
        prompt = ()
        if bucket.scored:
            prompt = sample.logprobs(decoder.logits(hidden_ND[bucket.rows :]), batch.target_T, self.plan.max_logprobs)
        return cache, last_S, table_SP, tokens_M, logits_MV, head, prompt

    def _works(self, rows: Rows, bucket: Bucket) -> dict[str, Work]:
        model, tp = self.model, self.plan.tensor_parallel_size
        return {
            str(window): plan_work(
                rows,
                page_size=self.plan.page_size,
                kv_heads=model.num_kv_heads // tp,
                group=model.num_heads // model.num_kv_heads,
                head_dim=model.head_dim,
                dtype=self.plan.dtype,
                window=window,
                chunk=bucket.chunk,
                implementation=self._implementation,
            )
            for window in {layer.window for layer in model.layers}
        }


def _remember(last_S: Array, slot_M: Array, samples_M: Array, tokens_M: Array) -> Array:
    return last_S.at[jnp.where(samples_M, slot_M, last_S.shape[0] - 1)].set(tokens_M)


def _draw(last_S: Array, floats_SF: Array, ints_SI: Array, head: Array, logits_MV: Array):
    slot_M, length_M, samples_M = head
    sampling = sample.Sampling.unpack(floats_SF[slot_M], ints_SI[slot_M])
    tokens_M = sample.sample(logits_MV, sampling, length_M)
    return _remember(last_S, slot_M, samples_M > 0, tokens_M), tokens_M


def _draw_edited(last_S, counts_SV, floats_SF, ints_SI, edits_SE, in_prompt_SV, head, logits_MV, *, count: int):
    """The draw with penalties, biases and bans before it, and the log-probabilities of the logits as they were."""
    slot_M, length_M, samples_M = head
    sampling = sample.Sampling.unpack(floats_SF[slot_M], ints_SI[slot_M])
    edits = edits_SE[slot_M]
    bias_ids, stop_ids = edits[:, :MAX_BIAS], edits[:, 2 * MAX_BIAS : 2 * MAX_BIAS + MAX_STOP_IDS]
    values = jax.lax.bitcast_convert_type(edits[:, MAX_BIAS : 2 * MAX_BIAS], jnp.float32)
    edited = sample.penalize(logits_MV, counts_SV[slot_M], in_prompt_SV[slot_M], sampling)
    edited = sample.bias(edited, bias_ids, values)
    edited = sample.ban(edited, jnp.where((length_M < edits[:, -1])[:, None], stop_ids, -1))
    tokens_M = sample.sample(edited, sampling, length_M)
    counts_SV = counts_SV.at[slot_M, tokens_M].add((samples_M > 0).astype(counts_SV.dtype))
    found = sample.logprobs(logits_MV, tokens_M, count)
    return _remember(last_S, slot_M, samples_M > 0, tokens_M), counts_SV, tokens_M, *found


def _admit(table_SP: Array, floats_SF: Array, ints_SI: Array, edits_SE: Array, packed: Array):
    """New rows' pages and parameters. Their edits are cleared: a slot's last sequence may have left some."""
    slot, floats, ints = packed[:, 0], packed[:, 1 : 1 + sample.FLOATS], packed[:, 1 + sample.FLOATS :][:, : sample.INTS]
    pages = packed[:, 1 + sample.FLOATS + sample.INTS :]
    floats = jax.lax.bitcast_convert_type(floats, jnp.float32)
    return table_SP.at[slot].set(pages), floats_SF.at[slot].set(floats), ints_SI.at[slot].set(ints), edits_SE.at[slot].set(-1)


def _admit_edits(edits_SE: Array, counts_SV: Array, in_prompt_SV: Array, head: Array, counts_V: Array, in_prompt_V: Array):
    slot = head[0]
    return edits_SE.at[slot].set(head[1:]), counts_SV.at[slot].set(counts_V), in_prompt_SV.at[slot].set(in_prompt_V)
