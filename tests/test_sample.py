"""jaxllm/sample.py and the draw's kernel against numpy: what may be drawn by sorting, frequencies by chi-square, the rest by formula."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.extend.random import threefry_2x32
from scipy import stats

from jaxllm import sample
from jaxllm.request import SamplingParams
from jaxllm.sample import FLOATS, INTS, Sampling
from pallas_kernels import sampling

pytestmark = pytest.mark.usefixtures("compiled_quickly")

DRAWS = 20_000
LOGITS = np.array([2.0, 1.5, 1.5, 0.3, -0.2, -1.0, -3.0, 0.9, 1.1, -np.inf, 0.3], np.float32)

draw = jax.jit(sample.sample)


def rows(count: int, seed: int = 7, **options) -> Sampling:
    """`count` rows with the same parameters."""
    floats, ints = Sampling.pack(SamplingParams(**options), seed)
    return Sampling.unpack(jnp.tile(jnp.array(floats, jnp.float32), (count, 1)), jnp.tile(jnp.array(ints, jnp.int32), (count, 1)))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x.astype(np.float64) - x.max())
    return weights / weights.sum()


def by_sorting(logits: np.ndarray, *, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0) -> np.ndarray:
    """The distribution that the options mean, in float64, by sorting; equals share their fate."""
    x = logits.astype(np.float64) / temperature
    p = softmax(x)
    x = np.where(p >= min_p * p.max(), x, -np.inf)
    if top_k:
        x = np.where(x >= np.sort(x)[::-1][min(top_k, len(x)) - 1], x, -np.inf)
    p = softmax(x)
    if top_p < 1:
        ordered = np.sort(p)[::-1]
        last = ordered[np.searchsorted(np.cumsum(ordered), top_p)]
        p = np.where(p >= last, p, 0)
    return p / p.sum()


def drawn(logits: np.ndarray, one: Sampling, draws: int = 4000) -> np.ndarray:
    """Which tokens of a row ever come, bool [V]."""
    many = jax.tree.map(lambda x: jnp.repeat(x, draws), one)
    tokens = draw(jnp.tile(jnp.array(logits, jnp.float32), (draws, 1)), many, jnp.arange(draws))
    return np.bincount(tokens, minlength=len(logits)) > 0


def test_layout():
    floats, ints = Sampling.pack(SamplingParams(temperature=0.5, top_p=0.9, min_p=0.1, top_k=5), seed=-3)
    assert (len(floats), len(ints)) == (FLOATS, INTS)
    one = Sampling.unpack(jnp.array([floats], jnp.float32), jnp.array([ints], jnp.int32))
    assert [float(x[0]) for x in (one.temperature_B, one.top_p_B, one.min_p_B)] == pytest.approx([0.5, 0.9, 0.1])
    assert int(one.top_k_B[0]) == 5
    assert [float(x[0]) for x in (one.presence_B, one.frequency_B, one.repetition_B)] == [0, 0, 1]
    seeds = {Sampling.pack(SamplingParams(), seed)[1][1] for seed in (0, 1, -1, 2**31, 2**32, 2**40, 2**63)}
    assert len(seeds) == 7 and all(-(2**31) <= s < 2**31 for s in seeds)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.8},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_frequencies(options: dict[str, Any]):
    tokens = np.asarray(draw(jnp.tile(LOGITS, (DRAWS, 1)), rows(DRAWS, **options), jnp.arange(DRAWS)))
    expected = by_sorting(LOGITS, **options) * DRAWS
    seen = np.bincount(tokens, minlength=len(LOGITS))
    assert not seen[expected == 0].any()
    assert stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_frequencies_over_seeds():
    """Seeds, not positions, as the draws: what requests without a seed of their own see at their first token."""
    each = replace(rows(DRAWS), seed_B=jnp.arange(DRAWS, dtype=jnp.int32) - DRAWS // 2)
    tokens = np.asarray(draw(jnp.tile(LOGITS, (DRAWS, 1)), each, jnp.full(DRAWS, 5)))
    expected = softmax(LOGITS) * DRAWS
    seen = np.bincount(tokens, minlength=len(LOGITS))
    assert stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_penalties_change_frequencies_as_computed():
    """Penalised logits, drawn from, follow the penalised distribution."""
    counts = np.array([3, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0])
    prompt = np.arange(11) % 4 == 0
    one = rows(1, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.5)
    penalized = sample.penalize(jnp.array(LOGITS)[None], jnp.array(counts, jnp.int16)[None], jnp.array(prompt)[None], one)
    seen = np.where((counts > 0) | prompt, np.where(LOGITS > 0, LOGITS / 1.5, LOGITS * 1.5), LOGITS)
    expected = softmax(seen - 0.3 * counts - 0.4 * (counts > 0)) * DRAWS
    tokens = np.asarray(draw(jnp.tile(penalized, (DRAWS, 1)), rows(DRAWS), jnp.arange(DRAWS)))
    seen = np.bincount(tokens, minlength=len(LOGITS))
    assert stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_noise_reaches_far_enough():
    """Each value as often as a Gumbel variable's, past where 23 random bits end (15.9)."""
    for wait in jax.jit(sampling.waits)(jnp.int32(1), jnp.int32(0), jnp.uint32(0), jnp.arange(1 << 21)):
        noise = -np.log(np.asarray(wait))
        assert stats.kstest(noise[:100_000], stats.gumbel_r.cdf).pvalue > 1e-3
        assert np.isfinite(noise).all() and len(np.unique(np.sort(noise)[-1000:])) == 1000


def test_random_bits_are_threefry():
    key, counter = np.random.default_rng(0).integers(0, 2**32, (2, 8), np.uint32)
    ours = sampling.threefry((key[0], key[1]), (counter[:4], counter[4:]))
    np.testing.assert_array_equal(np.concatenate(ours), threefry_2x32(jnp.array(key[:2]), jnp.array(counter)))


def test_temperature_zero_takes_the_likeliest():
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    tokens = draw(jnp.array(logits), rows(6, temperature=0.0, top_p=0.2, min_p=0.9), jnp.arange(6))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_array_equal(sample.greedy(jnp.array(logits)), logits.argmax(-1))
    assert sample.greedy(jnp.array(logits)).dtype == jnp.int32 == tokens.dtype


def test_one_token_left_is_always_chosen():
    """Even when its noise is the lowest there is."""
    logits = jnp.tile(jnp.array([0.0, 9.0, 1.0]), (DRAWS, 1))
    for one in (rows(DRAWS, top_k=1), rows(DRAWS, top_p=1e-6), rows(DRAWS, min_p=1.0)):
        assert (draw(logits, one, jnp.arange(DRAWS)) == 1).all()


def test_same_seed_and_position_same_token_whatever_the_batch():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 300)).astype(np.float32) * 2
    floats, ints = zip(
        *(
            Sampling.pack(SamplingParams(temperature=t, top_p=p, top_k=k), seed=i)
            for i, (t, p, k) in enumerate(zip(rng.uniform(0.3, 1.5, 40), rng.uniform(0.4, 1, 40), rng.integers(0, 30, 40), strict=True))
        ),
        strict=True,
    )
    position = rng.integers(0, 5000, 40)

    def tokens(order) -> list[int]:
        picked = Sampling.unpack(jnp.array(floats, jnp.float32)[order], jnp.array(ints, jnp.int32)[order])
        return np.asarray(draw(jnp.array(logits)[order], picked, jnp.array(position)[order])).tolist()

    together = tokens(np.arange(40))
    shuffled = rng.permutation(40)
    assert tokens(shuffled) == [together[i] for i in shuffled]
    assert [tokens(np.array([i]))[0] for i in range(8)] == together[:8]
    assert len({tuple(tokens(np.arange(40))), tuple(together)}) == 1


def test_noise_differs_between_seeds_and_positions():
    flat = jnp.zeros((500, 1000))
    by_position = draw(flat, rows(500), jnp.arange(500))
    by_seed = draw(flat, replace(rows(500), seed_B=jnp.arange(500, dtype=jnp.int32)), jnp.zeros(500, jnp.int32))
    assert len(set(np.asarray(by_position).tolist())) > 350  # 1000 * (1 - 1/e**0.5) = 393 expected
    assert len(set(np.asarray(by_seed).tolist())) > 350


extremes = st.sampled_from([0.0, -0.0, -np.inf, 1e-30, -1e-30, 3e38, -3e38, 1.0, 1.0000001])
values = st.lists(
    st.one_of(extremes, st.integers(-3, 3).map(float), st.floats(-50, 50, width=32, allow_subnormal=False)), min_size=16, max_size=16
)


@settings(max_examples=60, deadline=None)
@given(values, st.integers(1, 40), st.integers(-1, 2**31 - 1))
def test_top_k_threshold_is_exact(values, k, other_k):
    values[0] = 0.5  # a row needs one finite logit
    logits = np.array([values, values[::-1]], np.float32)
    floor = jax.jit(sampling.raise_to_kth)(jnp.array(logits), jnp.array([k, max(other_k, 0)], jnp.int32), jnp.full(2, -jnp.inf))
    for row, got, limit in zip(logits, np.asarray(floor), (k, other_k), strict=True):
        kth = np.sort(row)[::-1][min(limit, 16) - 1] if limit > 0 else -np.inf
        # A minus infinity can never be drawn, kept or not.
        np.testing.assert_array_equal((row >= got)[row > -np.inf], (row >= kth)[row > -np.inf])


@settings(max_examples=60, deadline=None)
@given(values, st.floats(1e-6, 1.0), st.integers(0, 20))
def test_only_the_top_p_are_drawn(values, p, k):
    values[0] = 0.5
    logits = np.array(values, np.float32)
    p = float(np.float32(p))
    got = drawn(logits, replace(rows(1, top_k=k), top_p_B=jnp.array([p], jnp.float32)))
    survivors, wanted = by_sorting(logits, top_k=k), by_sorting(logits, top_k=k, top_p=p)
    for value in np.unique(logits[logits > -np.inf]):
        came, expected, above = got[logits == value], survivors[logits == value][0], survivors[logits > value].sum()
        if above < p - 1e-5 and wanted[logits == value][0] > 0.01:
            assert came.all()  # needed to reach p
        elif above > p + 1e-5 or expected == 0:
            assert not came.any()  # p is reached without it
    assert got[logits == logits.max()].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-9, 9, width=32), min_size=16, max_size=16), st.integers(0, 15), st.sampled_from([0.99, 1.01]))
def test_min_p_border(values, token, factor):
    """min_p just below or above what one of the tokens has."""
    logits = np.array(values, np.float32)
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    p = min(float(ratio[token] * factor), 1.0)
    got = drawn(logits, replace(rows(1), min_p_B=jnp.array([p], jnp.float32)))
    clear = abs(ratio / p - 1) > 1e-3
    assert not got[clear & (ratio < p)].any()
    assert got[clear & (ratio > p) & (by_sorting(logits, min_p=p) > 0.01)].all()


def test_top_p_on_a_boundary():
    """Halves, quarters, eighths: exact in float32, so the border itself can be tested."""
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    for p, count in ((0.4999, 1), (0.5001, 2), (0.7501, 4), (1.0, 4)):
        assert drawn(logits, rows(1, top_p=p)).sum() == count


@pytest.mark.parametrize("width", [11, 700, 5000])
def test_the_kernel_draws_what_the_reference_draws(width):
    """In the interpreter."""
    expected, got = both_draws(width, interpret=True)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("width", [11, 700, 5000, 151_936])
def test_the_gpu_draws_what_the_reference_draws(width):
    """But for a row at most whose draw is within a rounding of a border: sums are taken in another order."""
    expected, got = both_draws(width, interpret=False)
    assert (got != expected).sum() <= 1
    np.testing.assert_array_equal(both_draws(width, interpret=False)[1], got, "not the same twice")


def both_draws(width: int, interpret: bool):
    """What the reference and the kernel draw for rows of all kinds side by side, with equals at every border."""
    rng = np.random.default_rng(width)
    logits = rng.normal(size=(48, width)).astype(np.float32) * 2
    logits[12:24] = np.round(logits[12:24] * 4)
    logits[24:36, width // 3 :] = -np.inf
    logits[36] = 0
    options: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_p": 0.2, "temperature": 0.6},
        {"top_k": 20},
        {"top_k": 50, "top_p": 0.5},
        {"top_k": 2000, "top_p": 0.95},
        {"min_p": 0.1},
        {"top_k": 300, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.0},
        {"top_k": 1},
    ]
    each = [rows(1, seed=i, **options[i % len(options)]) for i in range(48)]
    mixed = jax.tree.map(lambda *x: jnp.concatenate(x), *each)
    choice = sampling.Choice(mixed.temperature_B, mixed.top_p_B, mixed.min_p_B, mixed.top_k_B, mixed.seed_B, jnp.arange(48) % 5)
    args = jnp.array(logits), sample.greedy(jnp.array(logits)), choice
    expected = jax.jit(partial(sampling.draw, implementation="reference"))(*args)
    got = jax.jit(partial(sampling.draw, implementation="portable", interpret=interpret))(*args)
    return np.asarray(expected), np.asarray(got)


@pytest.mark.parametrize("how", [{}, {"implementation": "portable", "interpret": True}], ids=str)
def test_a_draw_from_nothing_ends(how):
    """Logits that overflowed give some token: a kernel that searched on would stop the whole engine."""
    logits = np.zeros((3, 700), np.float32)
    logits[0], logits[1, 5], logits[2] = np.nan, np.nan, -np.inf
    one = rows(3, top_k=5, top_p=0.5, min_p=0.1)
    choice = sampling.Choice(one.temperature_B, one.top_p_B, one.min_p_B, one.top_k_B, one.seed_B, jnp.arange(3))
    tokens = np.asarray(jax.jit(partial(sampling.draw, **how))(jnp.array(logits), sample.greedy(jnp.array(logits)), choice))
    assert ((tokens >= 0) & (tokens < 700)).all()


@pytest.mark.parametrize("ties", [False, True])
def test_the_kernel_leaves_the_top_k(ties):
    """Every k that it searches for in its own way: few, more than its lanes are good for, nearly all; with and without equals."""
    logits = np.random.default_rng(5).normal(size=5000).astype(np.float32)
    if ties:
        logits = np.round(logits * 8) / 8
    ks = np.array([1, 2, 7, 50, 64, 333, 1500, 2500, 4000, 4990, 4999, 5000, 6000], np.int32)

    def kernel(logits_ref, k_ref, floor_ref, mass_ref):
        row = sampling.Row(logits_ref, jnp.int32(0), 5000, jnp.float32(logits.max()), jnp.float32(1))
        floor, sum_C = sampling.truncate(row, jnp.float32(-9.0), k_ref[pl.program_id(0)])
        floor_ref[pl.program_id(0)], mass_ref[pl.program_id(0)] = floor, jnp.sum(sum_C)

    out = jax.ShapeDtypeStruct(ks.shape, jnp.float32)
    floor, mass = pl.pallas_call(kernel, grid=ks.shape, out_shape=(out, out), interpret=True)(jnp.array(logits)[None], jnp.array(ks))
    for k, got, weight in zip(ks, np.asarray(floor), np.asarray(mass), strict=True):
        kept = logits >= np.sort(logits)[::-1][min(k, 5000) - 1]
        np.testing.assert_array_equal(logits >= got, kept)
        np.testing.assert_allclose(weight, np.exp(logits - logits.max(), dtype=np.float64)[kept].sum(), rtol=1e-5)


def test_bias_and_ban():
    logits = np.random.default_rng(2).normal(size=(3, 9)).astype(np.float32)
    ids = jnp.array([[0, 8, -1], [-1, -1, -1], [4, 4, 2]])
    values = jnp.array([[1.5, -2.0, 99.0], [99.0, 99.0, 99.0], [1.0, 1.0, -100.0]])
    biased, banned = logits.copy(), logits.copy()
    biased[0, 0] += 1.5
    biased[0, 8] -= 2.0
    biased[2, 4] += 2.0
    biased[2, 2] -= 100.0
    banned[0, [0, 8]] = banned[2, [4, 2]] = -np.inf
    np.testing.assert_allclose(sample.bias(jnp.array(logits), ids, values), biased, rtol=1e-6)
    np.testing.assert_array_equal(sample.ban(jnp.array(logits), ids), banned)


def test_penalties_off_change_nothing():
    logits = np.random.default_rng(3).normal(size=(2, 9)).astype(np.float32)
    counts = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
    np.testing.assert_array_equal(sample.penalize(jnp.array(logits), counts, counts > 4, rows(2)), logits)


@pytest.mark.parametrize("width", [5, 300, 4001])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_logprobs(width, count):
    rng = np.random.default_rng(width)
    logits = rng.normal(size=(4, width)).astype(np.float32)
    logits[1] = np.round(logits[1] * 2)  # many equals
    logits[2, : width // 2] = -np.inf
    tokens = np.array([0, 1, width - 1, width // 2])
    chosen, rank, values, ids = jax.jit(sample.logprobs, static_argnums=2)(jnp.array(logits), jnp.array(tokens), count)
    expected = logits - stats_logsumexp(logits)
    at = np.arange(4)
    np.testing.assert_allclose(chosen, expected[at, tokens], atol=1e-5)
    np.testing.assert_array_equal(rank, 1 + (logits > logits[at, tokens][:, None]).sum(-1))
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(values, np.take_along_axis(expected, order, -1), atol=1e-5)


def stats_logsumexp(x: np.ndarray) -> np.ndarray:
    return np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))
