"""Parameters that change while an engine runs: the next step has them, nothing compiles, and nothing old is found again."""

import contextlib
import queue

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import Gather, answer, core, counted_compilations, dense_logits, finish, runner
from tiny import TOKENS
from twin import greedy, model, watched_answers, worst

from jaxllm import LLM, ConfigError, EngineDeadError, Patch, Request, SamplingParams, load

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LINE = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)


def other(params, seed: int = 0, size: float = 0.2):
    """Every tensor changed by a share of its size."""
    draw, old = np.random.default_rng(seed), {name: np.asarray(p) for name, p in params.items()}
    new = {name: p + size * p.std() * draw.normal(size=p.shape).astype(p.dtype) for name, p in old.items()}
    return {name: jax.device_put(p, params[name].sharding) for name, p in new.items()}


@contextlib.contextmanager
def using(made, params):
    """`made` with `params` for a while: it is shared by many tests."""
    before = made._params
    try:
        made.use(made.prepare(params))
        yield
    finally:
        made.use(before)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_engine_becomes_the_network_of_the_new_parameters(devices):
    made, params = model("qwen3", devices=devices)
    params = other(params)
    asked = [greedy("a", TOKENS[:21], 12), greedy("b", [5], 20)]
    compiled = runner("qwen3", devices)
    with using(compiled, params):
        logits, gathers = watched_answers(compiled, *asked)
    assert worst(logits, gathers, asked, jax.jit(lambda tokens: made.forward(params, tokens))) < 1e-5
    assert worst(logits, gathers, asked, lambda tokens: dense_logits("qwen3", tokens)) > 1e-2, "these are the old ones"


def test_arrays_that_the_engine_holds_as_they_are_are_not_copied():
    _, params = model("qwen3")
    prepared = {array.unsafe_buffer_pointer() for array in runner("qwen3").prepare(params)}
    fused = {name for name, array in params.items() if array.unsafe_buffer_pointer() not in prepared}
    assert {name.split(".")[2] for name in fused} == {"q", "k", "v", "gate", "up"}


def test_what_runs_goes_on_and_what_it_wrote_is_never_shared():
    _, params = model("qwen3")
    prompt, engine, compiled = TOKENS[:17], core("qwen3"), runner("qwen3")
    engine.add(greedy("done before", prompt, 4), Gather())
    finish(engine)
    engine.add(greedy("running", prompt, 24), running := Gather())
    for _ in range(4):
        engine.turn()
    assert 0 < len(running.tokens()) < 24 and running.outputs[-1].num_cached_tokens == 16
    with using(compiled, other(params)):
        engine.forget()
        (during,) = answer(engine, greedy("new", prompt, 1))
        assert running.reason in ("length", "stop")
        history = [*prompt, *running.tokens()]
        (after,) = answer(engine, greedy("after", history[:40], 4))
        (alone,) = answer(core("qwen3"), greedy("alone", history[:40], 4))
    assert (during.outputs[-1].num_cached_tokens, after.outputs[-1].num_cached_tokens) == (0, 16), "only what the new ones wrote is found"
    assert after.tokens() == alone.tokens()
    assert engine.stats().held == 0


def test_parameters_that_do_not_fit_are_refused():
    _, params = model("qwen3")
    prepare = runner("qwen3").prepare
    with pytest.raises(ConfigError, match=r"lack 'embed.weight' \(1 in all\)"):
        prepare({name: p for name, p in params.items() if name != "embed.weight"})
    with pytest.raises(ConfigError, match=r"hold 'head\.weight'"):
        prepare(params | {"head.weight": params["embed.weight"]})
    with pytest.raises(ConfigError, match=r"'norm.weight' is \(3,\) among the parameters, but the model makes it \(32,\)"):
        prepare(params | {"norm.weight": jnp.zeros(3)})
    with pytest.raises(ConfigError, match=r"'norm\.weight' is bfloat16 among the parameters, but the engine runs in float32; cast them"):
        prepare(params | {"norm.weight": params["norm.weight"].astype(jnp.bfloat16)})


@pytest.fixture(scope="module")
def shipped():
    """The default model: the function, its parameters, and a patch that adds a vector."""
    made, params = load(dtype="float32")
    none = np.zeros(made.config.d_model, np.float32)
    return made, params, Patch(lambda layer, site, value_D, data: value_D + data["vector"], {"vector": none}, [(1, "resid_post")])


@pytest.fixture(scope="module")
def llm(shipped):
    with LLM(dtype="float32", max_num_seqs=4, max_logprobs=0, max_model_len=256, enforce_eager=True, patch=shipped[2]) as llm:
        yield llm


def test_nothing_compiles_as_parameters_and_data_change(llm, shipped):
    made, params, steer = shipped
    sets, vectors = [other(params, seed) for seed in range(3)], np.random.default_rng(0).normal(size=(3, made.config.d_model))
    jax.block_until_ready(sets)
    logprobs = jax.jit(lambda params, tokens, data: made.logprobs(params, tokens, patch=steer, data=data))
    answers = []
    with counted_compilations() as compilations:
        for each in sets:
            llm.update_params(each)
            answers.append(llm.generate(["Once upon a time"] * 2, LINE, patch=[None, {"vector": vectors[0]}], use_tqdm=False))
        for vector in vectors:
            llm.generate("Once upon a time", LINE, patch={"vector": vector}, use_tqdm=False)
    assert compilations == []
    for each, outputs in zip(sets, answers, strict=True):
        assert [output.num_cached_tokens for output in outputs] == [0, 0]
        for output, data in zip(outputs, ({}, {"vector": vectors[0]}), strict=True):
            tokens = np.array([*output.prompt_token_ids, *output.outputs[0].token_ids])
            exact = logprobs(each, tokens, data)[len(output.prompt_token_ids) - 1 :]
            assert output.outputs[0].logprobs is not None
            np.testing.assert_allclose([lp[0].logprob for lp in output.outputs[0].logprobs], exact, atol=2e-4)


def test_parameters_change_under_a_running_request(llm, shipped):
    _, params, _ = shipped
    heard: queue.SimpleQueue = queue.SimpleQueue()
    llm.engine.submit(Request("long", (1, 5, 9), SamplingParams(max_tokens=200, ignore_eos=True)), heard.put)
    for _ in range(5):
        heard.get(timeout=60)
    llm.update_params(other(params))
    while not (output := heard.get(timeout=60)).finished:
        pass
    assert output.outputs[0].finish_reason == "length"


def test_an_engine_that_was_closed_says_so(llm, shipped):
    llm.close()
    with pytest.raises(EngineDeadError, match="the engine has stopped: it was closed"):
        llm.update_params(shipped[1])
