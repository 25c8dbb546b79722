"""Logits to tokens: penalties, bias, bans, temperature, min-p, top-k, top-p, the draw, and log-probabilities.

Pure jnp on float32 logits. Every row stands alone: its token depends on its own logits, parameters, seed and position,
so neighbours never matter. Who keeps counts, seeds and parameters for each row is the runner's business.

Letters: B rows, V vocabulary, K ids listed for a row, C log-probabilities wanted.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxllm.request import SamplingParams

BLOCK = 128  # tokens a block in `top`: V / 128 block maxima are few, and 128 floats are one wide read
RADIX_BITS = 2  # bits of the threshold found in one pass over the logits: 3 candidates a pass, 16 passes
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


def sample(logits_BV: Array, sampling: Sampling, position_B: Array) -> Array:
    """A token of each row, int32 [B], drawn as vLLM does: temperature, min_p, top_k, top_p; temperature 0 takes the likeliest.

    The draw is the Gumbel-max trick with noise from (seed, position) alone, where `position_B` is the place in the sequence that
    the token will have: the same row gives the same token in any batch, at any row index, after any preemption.
    """
    temperature_B = jnp.where(sampling.temperature_B < _GREEDY_BELOW, 1.0, sampling.temperature_B)
    scaled_BV = logits_BV / temperature_B[:, None]
    noisy_BV = jnp.where(keep(scaled_BV, sampling), scaled_BV + _gumbel(sampling.seed_B, position_B, logits_BV.shape[1]), -jnp.inf)
    return jnp.where(sampling.temperature_B < _GREEDY_BELOW, greedy(logits_BV), greedy(noisy_BV))


def keep(scaled_BV: Array, sampling: Sampling) -> Array:
    """Which tokens may be drawn, bool [B, V], by min_p, then top_k, then top_p of what these leave (renormalised).

    Each is a threshold on the logit, so equals live and die together: top_k keeps every token equal to the k-th, top_p every
    token equal to the last one needed to reach its mass. The likeliest token is always kept.
    """
    key_BV = _ordered(scaled_BV)
    highest_B = scaled_BV.max(axis=-1)
    kth_B = _kth_largest(key_BV, sampling.top_k_B)
    kept_BV = (key_BV >= kth_B[:, None]) & (scaled_BV >= (highest_B + jnp.log(sampling.min_p_B))[:, None])
    # Weights of at most 1 that need no division by their sum: top_p asks for a share of the sum instead.
    weight_BV = jnp.where(kept_BV, jnp.exp(scaled_BV - highest_B[:, None]), 0.0)
    return kept_BV & (key_BV >= _mass_threshold(key_BV, weight_BV, sampling.top_p_B)[:, None])


def _kth_largest(key_BV: Array, k_B: Array) -> Array:
    """The k-th largest key of each row, uint32 [B]; 0, which every key reaches, where k is 0 or at least V."""

    def count(candidate_B: Array) -> Array:
        return (key_BV >= candidate_B[:, None]).sum(-1, dtype=jnp.int32)

    off_B = (k_B <= 0) | (k_B >= key_BV.shape[1])
    return jnp.where(off_B, 0, _largest_key(count, k_B)).astype(jnp.uint32)


def _mass_threshold(key_BV: Array, weight_BV: Array, p_B: Array) -> Array:
    """The largest key at or above which a share p of the weight lies, uint32 [B]; 0 where p is 1 or more."""

    def mass(candidate_B: Array) -> Array:
        return jnp.where(key_BV >= candidate_B[:, None], weight_BV, 0.0).sum(-1)

    # A sum of the same terms in the same order, so that p just under 1 can always be reached.
    total_B = mass(jnp.zeros(p_B.shape, jnp.uint32))
    return jnp.where(p_B >= 1, 0, _largest_key(mass, p_B * total_B)).astype(jnp.uint32)


def _ordered(x: Array) -> Array:
    """uint32 keys that compare as the floats do (-0.0 equals 0.0)."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_key(measure: Callable[[Array], Array], wanted_B: Array) -> Array:
    """The largest uint32 key whose measure, which falls as keys grow, still reaches `wanted_B`; 0 if none does.

    measure: keys [B] -> [B]. The key is found from its top bits down, RADIX_BITS a pass; a pass measures its candidates one by
    one, as reductions over the same logits that XLA can fuse (as one wider reduction they took three times as long on CPU).
    """

    def narrow(i, key_B):
        shift = jnp.uint32(32 - RADIX_BITS) - RADIX_BITS * i.astype(jnp.uint32)
        reached = [measure(key_B + (jnp.uint32(digit) << shift)) >= wanted_B for digit in range(1, 1 << RADIX_BITS)]
        return key_B + (sum(r.astype(jnp.uint32) for r in reached) << shift)

    return lax.fori_loop(0, 32 // RADIX_BITS, narrow, jnp.zeros(wanted_B.shape, jnp.uint32))


def _gumbel(seed_B: Array, position_B: Array, width: int) -> Array:
    """Gumbel noise float32 [B, width], a function of (seed, position, token) alone, the same bits on CPU and GPU.

    All 32 random bits are used, and small ones exactly. jax.random.gumbel's 23 bits end at 15.9: a token whose logit is 18 below the
    likeliest could hardly ever be drawn, though a vocabulary of 150,000 such has a mass of 0.2%.
    """

    def row(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        uniform = (jax.random.bits(key, (width,), jnp.uint32).astype(jnp.float32) + 0.5) * 2.0**-32
        # The cap keeps the noise finite, so that a row with one token left still chooses it.
        return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))

    return jax.vmap(row)(seed_B, position_B)


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
