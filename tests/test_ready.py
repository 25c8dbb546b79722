"""After ready nothing compiles, whatever is asked; and an engine ends, refuses and survives as it should."""

import asyncio
import contextlib
import random
from typing import Any

import jax
import pytest
from engines import counted_compilations
from server_fixtures import STORIES

from jaxllm import LLM, ConfigError, Engine, EngineConfig, EngineDeadError, Request, RequestError, SamplingParams


@pytest.fixture(scope="module")
def llm():
    with LLM(STORIES, dtype="float32", max_num_seqs=8, max_logprobs=5) as llm:
        yield llm


EVERYTHING = [
    SamplingParams(temperature=0, max_tokens=40),
    SamplingParams(max_tokens=20, n=3),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, seed=5, max_tokens=20),
    SamplingParams(repetition_penalty=1.1, frequency_penalty=0.5, presence_penalty=0.5, max_tokens=30),
    SamplingParams(logit_bias={5: 3.0}, min_tokens=10, max_tokens=20, logprobs=5, prompt_logprobs=5),
    SamplingParams(stop=["the", "a little"], max_tokens=60, include_stop_str_in_output=True),
    SamplingParams(max_tokens=None, ignore_eos=True, temperature=1.5),
]


def test_nothing_compiles_after_ready(llm):
    with counted_compilations() as compilations:
        prompts = [[1, *(7 + i % 400 for i in range(length))] for length in (1, 2, 9, 63, 64, 65, 130, 300, 450)]
        llm.generate([p for p in prompts for _ in EVERYTHING], [s for _ in prompts for s in EVERYTHING], use_tqdm=False)
        llm.generate(["Once upon a time"] * 20, use_tqdm=False)
    assert compilations == []


def test_the_listener_sees_a_compilation():
    with counted_compilations() as compilations:
        jax.jit(lambda x: x * 3 + 1).lower(jax.ShapeDtypeStruct((17,), "float32")).compile()
    assert len(compilations) == 1


def test_outputs_come_in_input_order_with_what_was_asked(llm):
    prompts = ["Once upon a time", [1, 403, 407], "The cat"]
    outputs = llm.generate(prompts, [SamplingParams(temperature=0, max_tokens=m) for m in (30, 5, 12)], use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [30, 5, 12]
    assert [o.prompt for o in outputs] == ["Once upon a time", None, "The cat"]
    assert outputs[1].prompt_token_ids == (1, 403, 407)
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert outputs[0].outputs[0].text.startswith(", there was a little girl named Lily.")


def test_a_stop_string_ends_the_text_and_says_so(llm):
    (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=50, stop=["named", "girl na"]), use_tqdm=False)
    assert output.outputs[0].text == ", there was a little "
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "girl na")


def test_chat_answers_one_conversation_or_many(llm):
    one = [{"role": "user", "content": "Tell me a story."}]
    params = SamplingParams(temperature=0, max_tokens=8)
    alone = llm.chat(one, params, use_tqdm=False)
    both = llm.chat([one, one], params, use_tqdm=False)
    assert [o.outputs[0].text for o in both] == [alone[0].outputs[0].text] * 2


def test_a_bar_shows_both_speeds(llm, capsys):
    llm.generate(["Once"] * 3, SamplingParams(max_tokens=5))
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "est. speed input:" in shown and "output:" in shown and "toks/s" in shown


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["a"] * 2, [SamplingParams()] * 3, "2 prompts were given with 3 sampling params"),
        ([[1] * 600], None, "maximum context length is 512 tokens. However, your prompt contains 600"),
        (["a", ""], SamplingParams(logprobs=9), "logprobs is 9, but this server gives at most 5"),
        ([[]], None, "the prompt is empty"),
    ],
)
def test_bad_calls_are_refused_before_anything_runs(llm, prompts, params, message):
    before = llm.engine.stats().prompt_tokens
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.engine.stats().prompt_tokens == before


async def test_leaving_the_loop_aborts(llm):
    engine = llm.engine
    async with contextlib.aclosing(engine.generate(Request("x", (1, 5, 6), SamplingParams(max_tokens=400, ignore_eos=True)))) as outputs:
        async for _ in outputs:
            break
    await settled(engine)


async def test_many_streams_of_random_lengths_end_correctly(llm):
    rng = random.Random(0)

    async def stream(i: int) -> None:
        length = rng.randint(1, 80)
        request = Request(
            f"s{i}",
            tuple([1] + [rng.randint(3, 500) for _ in range(rng.randint(0, 60))]),
            SamplingParams(max_tokens=length, ignore_eos=True),
        )
        outputs = [o async for o in llm.engine.generate(request)]
        assert sum(len(c.token_ids) for o in outputs for c in o.outputs) == length
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0].finish_reason == "length"

    await asyncio.gather(*(stream(i) for i in range(64)))
    await settled(llm.engine)


async def settled(engine) -> None:
    for _ in range(200):
        stats = engine.stats()
        if (stats.running, stats.waiting, stats.held) == (0, 0, 0):
            assert stats.free + stats.cached == stats.pages
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"something is still held: {stats}")


def test_a_failing_step_fails_what_runs_and_refuses_what_comes():
    engine = Engine(EngineConfig(STORIES, dtype="float32", max_num_seqs=1, enforce_eager=True, max_num_batched_tokens=32, max_model_len=64))
    items = []

    def explode(step):
        raise RuntimeError("the device is gone")

    engine._core._runner.run = explode
    engine.submit(Request("x", (1, 2), SamplingParams()), items.append)
    engine._thread.join(timeout=20)
    assert not engine.healthy
    assert [str(item) for item in items] == ["the engine has stopped: the device is gone"]
    with pytest.raises(EngineDeadError, match="the device is gone"):
        engine.submit(Request("y", (1, 2), SamplingParams()), items.append)
    engine.close()


def test_a_closed_engine_says_so():
    engine = Engine(EngineConfig(STORIES, dtype="float32", max_num_seqs=1, enforce_eager=True, max_num_batched_tokens=32, max_model_len=64))
    engine.close()
    engine.close()
    with pytest.raises(EngineDeadError, match="it was closed"):
        engine.submit(Request("y", (1, 2), SamplingParams()), lambda item: None)


def test_attention_may_be_named_and_is_refused_where_it_cannot():
    options: dict[str, Any] = dict(dtype="float32", max_num_seqs=1, enforce_eager=True, max_num_batched_tokens=32, max_model_len=64)
    with pytest.raises(ConfigError, match="--attention-backend sm90: attention 'sm90' cannot take"):
        Engine(EngineConfig(STORIES, attention_backend="sm90", **options))
    with LLM(STORIES, attention_backend="reference", **options) as named:
        (output,) = named.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert output.outputs[0].text == ", there was a little"
