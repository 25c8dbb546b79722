"""The real network under the real scheduler: tokens never depend on batching, chunking, preemption, sharing or devices."""

import jax.numpy as jnp
import numpy as np
import pytest
from engines import EOS, LANES, Gather, answer, core, dense_logits, finish, naive, runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.plan import Bucket
from jaxllm.request import Request, SamplingParams
from jaxllm.sample import Sampling

MODELS = ["qwen3", "gemma2"]  # per-head norms; windows shorter than the context, soft-caps, norms on both sides
_quiet = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def greedy(name: str, prompt, count: int = 8, **params) -> Request:
    return Request(name, tuple(prompt), SamplingParams(temperature=0, max_tokens=count, **params))


prompts = st.lists(st.integers(4, 63), min_size=1, max_size=24)


@pytest.mark.parametrize("model", MODELS)
@_quiet
@given(
    asked=st.lists(st.tuples(prompts, st.integers(1, 14), st.integers(0, 6)), min_size=1, max_size=7),
    pages=st.integers(12, 30),
    chunks=st.sampled_from([(Bucket(4, LANES),), (Bucket(4, LANES), Bucket(16, LANES))]),
    prefix=st.booleans(),
    share=st.booleans(),
)
def test_greedy_tokens_equal_the_naive_loop(model, asked, pages, chunks, prefix, share):
    """Random arrivals on a small cache: chunked prompts beside decodes, forced preemption, prefix hits."""
    engine = core(model, num_pages=pages, buckets=tuple(sorted({Bucket(0, 1), Bucket(0, LANES), *chunks})), enable_prefix_caching=prefix)
    gathers = []
    for i, (prompt, count, turns) in enumerate(asked):
        if share and i:
            prompt = asked[0][0] + prompt[:8]
        gathers.append((prompt, count, gather := Gather()))
        engine.add(greedy(f"r{i}", prompt, count), gather)
        for _ in range(turns):
            engine.turn()
    finish(engine)
    for prompt, count, gather in gathers:
        assert gather.tokens() == naive(model, prompt, count, EOS)


def test_preemption_by_recompute_continues_where_it_stopped():
    engine = core("qwen3", num_pages=12)
    asked = [[10 + i] * 9 for i in range(4)]
    gathers = answer(engine, *(greedy(f"r{i}", p, 20, ignore_eos=True) for i, p in enumerate(asked)))
    assert engine.stats().preemptions > 0
    for prompt, gather in zip(asked, gathers, strict=True):
        assert gather.tokens() == naive("qwen3", prompt, 20)


@_quiet
@given(others=st.lists(st.tuples(prompts, st.sampled_from([0.0, 0.7, 1.5])), max_size=5), position=st.integers(0, 5), n=st.integers(1, 3))
def test_same_seed_same_text_whatever_else_is_in_the_batch(others, position, n):
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7, max_tokens=10, n=n)
    (alone,) = answer(core("qwen3"), Request("x", (5, 6, 7, 8, 9), params))
    requests = [Request(f"r{i}", tuple(p), SamplingParams(temperature=t, max_tokens=12)) for i, (p, t) in enumerate(others)]
    requests.insert(min(position, len(requests)), Request("x", (5, 6, 7, 8, 9), params))
    gathers = answer(core("qwen3", num_pages=14), *requests)
    together = next(g for g in gathers if g.outputs[0].request_id == "x")
    assert [together.tokens(i) for i in range(n)] == [alone.tokens(i) for i in range(n)]


def test_different_seeds_and_different_choices_differ():
    params = [SamplingParams(temperature=1.5, seed=s, max_tokens=12, n=2) for s in (1, 2)]
    first, second = answer(core("qwen3"), *(Request(f"r{i}", (5, 6, 7), p) for i, p in enumerate(params)))
    assert first.tokens(0) != second.tokens(0)
    assert first.tokens(0) != first.tokens(1)


def test_an_engine_without_seeds_answers_identically_after_a_restart():
    request = Request("x", (5, 6, 7), SamplingParams(temperature=1.0, max_tokens=12))
    assert answer(core("qwen3"), request)[0].tokens() == answer(core("qwen3"), request)[0].tokens()


@pytest.mark.parametrize("model", MODELS)
def test_two_devices_give_the_tokens_of_one(model):
    asked = [greedy(f"r{i}", [4 + i, 9, 30] * (i + 1), 12, ignore_eos=True) for i in range(4)]
    asked.append(Request("sampled", (8, 8, 9), SamplingParams(temperature=0.8, seed=3, max_tokens=12, logprobs=2, frequency_penalty=0.5)))
    one, two = answer(core(model), *asked), answer(core(model, devices=2), *asked)
    assert [g.tokens() for g in one] == [g.tokens() for g in two]
    for a, b in zip(one[-1].logprobs(), two[-1].logprobs(), strict=True):
        assert [lp.token_id for lp in a] == [lp.token_id for lp in b]
        np.testing.assert_allclose([lp.logprob for lp in a], [lp.logprob for lp in b], atol=1e-4)


def test_pages_are_split_over_devices_and_weights_are_too():
    made = runner("qwen3", 2)
    k_pages, _ = made._cache[0]
    assert {s.data.shape[1] for s in k_pages.addressable_shards} == {k_pages.shape[1] // 2}
    split = [p for p in made._params if p.addressable_shards[0].data.size < p.size]
    assert sum(p.size for p in split) > 0.9 * sum(p.size for p in made._params)


def test_logprobs_are_the_models_own():
    (gather,) = answer(core("qwen3"), greedy("x", [5, 6, 7, 8, 9, 10], 6, logprobs=3, prompt_logprobs=2, ignore_eos=True))
    tokens = [5, 6, 7, 8, 9, 10, *gather.tokens()]
    logits = dense_logits("qwen3", tokens)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    prompt_logprobs = next(o.prompt_logprobs for o in gather.outputs if o.prompt_logprobs is not None)
    assert prompt_logprobs is not None and prompt_logprobs[0] is None
    found = {i: lp for i, lp in enumerate(prompt_logprobs) if i} | {6 + i: lp for i, lp in enumerate(gather.logprobs())}
    assert sorted(found) == list(range(1, len(tokens)))
    for place, logprobs in found.items():
        assert logprobs is not None
        chosen, *top = logprobs
        expected = table[place - 1]
        assert chosen.token_id == tokens[place]
        np.testing.assert_allclose(chosen.logprob, expected[tokens[place]], atol=1e-4)
        assert chosen.rank == 1 + (expected > expected[tokens[place]]).sum()
        best = np.argsort(-expected, kind="stable")[: len(top)]
        assert [lp.token_id for lp in top] == best.tolist()
        np.testing.assert_allclose([lp.logprob for lp in top], expected[best], atol=1e-4)
        assert len(top) == (2 if place < 6 else 3)


def test_penalties_biases_and_bans_reach_the_draw():
    """Greedy with edits, against the same edits on the naive loop's logits; through a preemption too."""
    params = dict(frequency_penalty=1.5, presence_penalty=0.7, repetition_penalty=1.3, logit_bias={11: 4.0, 12: -100.0}, min_tokens=6)
    asked = [[5, 6, 7, 5] * 2, [8, 9] * 4, [30] * 8, [40, 41] * 4]
    engine = core("qwen3", num_pages=12)
    gathers = answer(engine, *(greedy(f"r{i}", p, 20, **params) for i, p in enumerate(asked)))
    assert engine.stats().preemptions > 0
    for prompt, gather in zip(asked, gathers, strict=True):
        made: list[int] = []
        while len(made) < 20 and not (made and made[-1] in EOS):
            logits = dense_logits("qwen3", prompt + made)[-1].astype(np.float64)
            seen = np.isin(np.arange(64), prompt + made)
            logits = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits)
            counts = np.bincount(made, minlength=64)
            logits = logits - 1.5 * counts - 0.7 * (counts > 0)
            logits[11] += 4.0
            logits[12] -= 100.0
            if len(made) < 6:
                logits[list(EOS)] = -np.inf
            made.append(int(logits.argmax()))
        assert gather.tokens() == made


def test_edits_do_not_outlive_their_row():
    engine = core("qwen3")
    plain = greedy("plain", [5, 6, 7], 6, ignore_eos=True, logprobs=0)
    (before,) = answer(engine, plain)
    answer(engine, *(greedy(f"r{i}", [5, 6, 7], 6, logit_bias={40: 100.0}, min_tokens=6) for i in range(4)))
    (after,) = answer(engine, plain)
    assert after.tokens() == before.tokens()


def test_stop_ids_and_length():
    (free,) = answer(core("qwen3"), greedy("x", [5, 6, 7], 12, ignore_eos=True))
    stop = free.tokens()[5]
    first = free.tokens().index(stop)
    (gather,) = answer(core("qwen3"), greedy("x", [5, 6, 7], 12, ignore_eos=True, stop_token_ids=[stop]))
    assert gather.tokens() == free.tokens()[: first + 1]
    assert (gather.reason, gather.outputs[-1].outputs[-1].stop_reason) == ("stop", stop)
    assert free.reason == "length"


@pytest.mark.parametrize("end", ["length", "stop"])
def test_a_stream_is_told_of_each_token_and_of_a_dispatchs_tokens_at_once(end):
    """Three a dispatch; the ninth is in the middle of one, and ends it where it is a stop token."""
    params = SamplingParams(temperature=1.5, seed=2, max_tokens=12, ignore_eos=True)
    (free,) = answer(core("qwen3"), Request("x", (5, 6, 7), params))
    stop = free.tokens()[8]
    assert stop not in free.tokens()[:8]
    engine = core("qwen3")
    (gather,) = answer(engine, Request("x", (5, 6, 7), params.with_defaults(stop_token_ids=[stop] if end == "stop" else [])))
    told = [len(output.outputs) for output in gather.outputs]
    assert told == ([1, 3, 3, 3, 1, 1] if end == "length" else [1, 3, 3, 2])
    completions = [completion for output in gather.outputs for completion in output.outputs]
    assert all(len(completion.token_ids) == 1 for completion in completions)
    assert [completion.finish_reason for completion in completions] == [None] * (sum(told) - 1) + [end]
    stats = engine.stats()
    assert stats.generation_tokens == sum(told) and sum(stats.histograms["inter_token_latency_seconds"].counts) == sum(told) - 1


def test_an_answer_that_is_not_streamed_comes_once_and_whole():
    streamed, whole = (
        answer(core("qwen3"), Request("x", (5, 6, 7), SamplingParams(temperature=0, max_tokens=9, n=2), stream=stream))[0]
        for stream in (True, False)
    )
    assert len(whole.outputs) == 2
    assert [whole.tokens(i) for i in range(2)] == [streamed.tokens(i) for i in range(2)]


def test_a_shape_that_was_not_compiled_is_a_key_error():
    engine = core("qwen3", buckets=(Bucket(0, 2), Bucket(4, LANES), Bucket(16, LANES)))
    engine.add(greedy("x", [5, 6, 7, 8]), Gather())
    with pytest.raises(KeyError, match="rows=2"):
        finish(engine)


def test_packed_sampling_survives_the_trip():
    params = SamplingParams(temperature=0.3, top_p=0.9, min_p=0.1, top_k=5, presence_penalty=-1, frequency_penalty=1, repetition_penalty=2)
    floats, ints = Sampling.pack(params, 11)
    back = Sampling.unpack(jnp.array([floats], jnp.float32), jnp.array([ints], jnp.int32))
    assert float(back.temperature_B[0]) == pytest.approx(0.3) and int(back.top_k_B[0]) == 5
