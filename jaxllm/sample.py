"""Logits to tokens: penalties, bias, bans, the draw by temperature, min-p, top-k and top-p, and log-probabilities.

Pure jnp on float32 logits. Every row stands alone: its token depends on its own logits, parameters, seed and position,
so neighbours never matter. Who keeps counts, seeds and parameters for each row is the runner's business.

Letters: B rows, V vocabulary, K ids listed for a row, C log-probabilities wanted.
"""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxllm.request import SamplingParams
from pallas_kernels import Choice, draw

BLOCK = 128  # tokens a block in `top`: V / 128 block maxima are few, and 128 floats are one wide read
_GREEDY_BELOW = 1e-5  # as SamplingParams.greedy


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How each row chooses. Off is: temperature 0 (greedy), top_p 1, min_p 0, penalties 0, repetition 1, top_k 0.

    Floats are float32 and ints int32; `seed_B` is read as 32 bits. The order of the fields is the packed layout.
    """

    temperature_B: Array
    top_p_B: Array
    min_p_B: Array
    presence_B: Array
    frequency_B: Array
    repetition_B: Array
    top_k_B: Array
    seed_B: Array

    @staticmethod
    def pack(params: SamplingParams, seed: int) -> tuple[list[float], list[int]]:
        """One row's numbers, FLOATS and INTS of them. `seed` may be any int; its 64 low bits are mixed into 32."""
        # Fibonacci hashing: neighbouring seeds stay distinct, and the high half counts too.
        seed = (seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 32
        floats = [
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        ]
        return floats, [params.top_k, seed - (seed >> 31 << 32)]

    @classmethod
    def unpack(cls, floats_BF: Array, ints_BI: Array) -> "Sampling":
        """The rows whose packed numbers are stacked: float32 [B, FLOATS] and int32 [B, INTS]."""
        return cls(*floats_BF.T, *ints_BI.T)


INTS = 2
FLOATS = len(fields(Sampling)) - INTS


def greedy(logits_BV: Array) -> Array:
    """The likeliest token of each row, int32 [B]; the lowest id among equals."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def sample(logits_BV: Array, sampling: Sampling, position_B: Array, *, implementation: str = "reference") -> Array:
    """A token of each row, int32 [B], drawn as vLLM does: temperature, min_p, top_k, top_p; temperature 0 takes the likeliest.

    Randomness comes from (seed, position) alone, where `position_B` is the place in the sequence that the token will have: the same row
    gives the same token in any batch, at any row index, after any preemption.
    """
    temperature_B = jnp.where(sampling.temperature_B < _GREEDY_BELOW, 0.0, sampling.temperature_B)
    choice = Choice(temperature_B, sampling.top_p_B, sampling.min_p_B, sampling.top_k_B, sampling.seed_B, position_B)
    return draw(logits_BV, greedy(logits_BV), choice, implementation=implementation)


def penalize(logits_BV: Array, counts_BV: Array, in_prompt_BV: Array, sampling: Sampling) -> Array:
    """Logits after the repetition (CTRL, arxiv.org/abs/1909.05858), frequency and presence (OpenAI) penalties, in that order.

    counts_BV: how often the row has produced each token (any int dtype). Repetition also counts the prompt's tokens.
    """
    produced_BV = counts_BV > 0
    repetition_BV = jnp.where(produced_BV | in_prompt_BV, sampling.repetition_B[:, None], 1.0)
    logits_BV = jnp.where(logits_BV > 0, logits_BV / repetition_BV, logits_BV * repetition_BV)
    return logits_BV - sampling.frequency_B[:, None] * counts_BV - sampling.presence_B[:, None] * produced_BV


def bias(logits_BV: Array, ids_BK: Array, values_BK: Array) -> Array:
    """Logits plus `values_BK` at `ids_BK`; a negative id is an empty entry."""
    return logits_BV.at[_rows(ids_BK), _valid(ids_BK, logits_BV)].add(values_BK, mode="drop")


def ban(logits_BV: Array, ids_BK: Array) -> Array:
    """Logits with -inf at `ids_BK`; a negative id is an empty entry."""
    return logits_BV.at[_rows(ids_BK), _valid(ids_BK, logits_BV)].set(-jnp.inf, mode="drop")


def mask(logits_BV: Array, banned_BW: Array) -> Array:
    """Logits with -inf where a bit of `banned_BW` is set: token v is bit v % 32 of word v // 32."""
    bits_BW32 = banned_BW[:, :, None] >> jnp.arange(32) & 1
    return jnp.where(bits_BW32.reshape(len(banned_BW), -1)[:, : logits_BV.shape[1]] == 1, -jnp.inf, logits_BV)


def _rows(ids_BK: Array) -> Array:
    return jnp.arange(ids_BK.shape[0])[:, None]


def _valid(ids_BK: Array, logits_BV: Array) -> Array:
    return jnp.where(ids_BK < 0, logits_BV.shape[1], ids_BK)  # negative indices wrap in jnp; V is out of bounds, and dropped


def logprobs(logits_BV: Array, tokens_B: Array, count: int) -> tuple[Array, Array, Array, Array]:
    """Log-softmax of the raw logits: (chosen_B float32, rank_B int32, values_BC float32, ids_BC int32).

    rank 1 is the likeliest: one more than the tokens strictly above the chosen one. The `count` likeliest follow in order, lowest
    id first among equals; C is `count`, or V if that is less.
    """
    normalizer_B = jax.nn.logsumexp(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    rank_B = 1 + (logits_BV > chosen_B[:, None]).sum(-1, dtype=jnp.int32)
    values_BC, ids_BC = top(logits_BV, count)
    return chosen_B - normalizer_B, rank_B, values_BC - normalizer_B[:, None], ids_BC


def top(x_BV: Array, count: int) -> tuple[Array, Array]:
    """Values and int32 ids [B, C] of the `count` largest, exactly as `lax.top_k` gives them, without sorting V of them.

    The `count` largest lie in the `count` blocks with the largest maxima, so only those blocks are looked into.
    """
    rows, width = x_BV.shape
    count = min(count, width)
    blocks = -(-width // BLOCK)
    x_BnK = jnp.pad(x_BV, ((0, 0), (0, blocks * BLOCK - width)), constant_values=-jnp.inf).reshape(rows, blocks, BLOCK)
    _, best_Bn = lax.top_k(x_BnK.max(-1), min(count, blocks))
    best_Bn = jnp.sort(best_Bn, axis=-1)  # ids ascend, so that equals come lowest id first
    candidates = jnp.take_along_axis(x_BnK, best_Bn[:, :, None], axis=1).reshape(rows, -1)
    values_BC, at_BC = lax.top_k(candidates, count)
    return values_BC, (jnp.take_along_axis(best_Bn, at_BC // BLOCK, axis=1) * BLOCK + at_BC % BLOCK).astype(jnp.int32)
