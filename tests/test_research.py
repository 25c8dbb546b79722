"""The research API: the pure function is the engine's network, and its gradients, activations and log-probabilities are right."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import answer, core, make_plan, runner
from tiny import QUICK, TOKENS, decoder, run
from twin import greedy, model, watched_answers, worst

import jaxllm
from jaxllm.decoder import ATTENTION
from jaxllm.loading import load_decoder
from jaxllm.patch import SITES
from jaxllm.plan import Bucket
from jaxllm.request import ConfigError, Request, SamplingParams
from jaxllm.runner import Runner

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MIXED = [greedy("long", TOKENS[:21], 12), greedy("short", [5], 20), greedy("other", TOKENS[3:20], 5)]


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_the_dense_twin_is_the_paged_path(name):
    made, params = model(name)
    logits, gathers = watched_answers(runner(name), *MIXED)
    assert worst(logits, gathers, MIXED, jax.jit(lambda tokens: made.forward(params, tokens))) < 1e-5


@cache
def bfloat16_runner(name: str) -> Runner:
    made, _ = model(name, "bfloat16")
    plan = make_plan(dtype="bfloat16", buckets=(Bucket(0, 4), Bucket(16, 4)))
    decoder = load_decoder(jaxllm.EngineConfig(), made.checkpoint, made.config, made.mesh, "bfloat16")
    compiled = Runner(decoder, plan, made.mesh, "reference")
    compiled.compile()
    compiled.start(decoder)
    return compiled


def test_the_dense_twin_is_the_paged_path_in_bfloat16():
    made, params = model("qwen3", "bfloat16")
    logits, gathers = watched_answers(bfloat16_runner("qwen3"), *MIXED, buckets=(Bucket(0, 4), Bucket(16, 4)))
    error = worst(logits, gathers, MIXED, jax.jit(lambda tokens: made.forward(params, tokens)))
    assert 0 < error < 2e-2


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_gradients_are_finite_differences(name):
    """Along random directions in which every tensor moves by the same share of its size, too little to change a token's experts."""
    made, params = model(name)

    def loss(params):
        return -made.logprobs(params, TOKENS[:12]).sum()

    both = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    _, slopes = both(params)
    for key in jax.random.split(jax.random.key(0), 2):
        keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
        direction = {name: jax.random.normal(keys[name], p.shape) * (jnp.abs(p).mean() + 1e-3) for name, p in params.items()}
        (up, _), (down, _) = (both({name: p + by * direction[name] for name, p in params.items()}) for by in (1e-3, -1e-3))
        slope = sum(float(jnp.vdot(slopes[name], direction[name])) for name in params)
        assert float(up - down) / 2e-3 == pytest.approx(slope, rel=5e-3)


def test_vmap_over_prompts_and_padding_change_nothing():
    made, params = model("gemma2")
    prompts = np.stack([TOKENS[:16], TOKENS[4:20], TOKENS[8:24]])
    together = jax.jit(jax.vmap(made.forward, (None, 0)), compiler_options=QUICK)(params, prompts)
    alone = jax.jit(made.forward, compiler_options=QUICK)
    for tokens, logits in zip(prompts, together, strict=True):
        np.testing.assert_allclose(logits, alone(params, tokens), atol=2e-5)
    padded = np.where(np.arange(16) < 10, prompts[0], 0)
    np.testing.assert_array_equal(alone(params, padded)[:10], alone(params, prompts[0])[:10])


def test_logprobs_are_those_that_the_engine_reports():
    made, params = model("qwen3")
    request = Request("x", (5, 6, 7, 8, 9, 10), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    (gather,) = answer(core("qwen3"), request)
    told = next(o.prompt_logprobs for o in gather.outputs if o.prompt_logprobs is not None)
    assert told is not None
    exact = jax.jit(made.logprobs, compiler_options=QUICK)(params, np.array(request.prompt_token_ids))
    np.testing.assert_allclose(exact, [lp[0].logprob for lp in told[1:] if lp is not None], atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_sites_add_up(name):
    """A layer leaves what it got and what attention and MLP add, and the next one gets that; parallel blocks too."""
    made, params = model(name)
    wanted = [(layer, site) for layer in range(len(made.config.layers)) for site in SITES]
    logits, seen = jax.jit(lambda params: made.activations(params, TOKENS, wanted), compiler_options=QUICK)(params)
    np.testing.assert_allclose(logits, run(decoder(name)), atol=1e-4)
    assert seen.keys() == set(wanted)
    for layer in range(len(made.config.layers)):
        before, attention, mlp, after = (np.asarray(seen[layer, site]) for site in SITES)
        np.testing.assert_allclose(before + attention + mlp, after, atol=1e-4 * np.abs(after).max())
        if layer:
            np.testing.assert_array_equal(before, seen[layer - 1, "resid_post"])


def test_attention_probabilities_are_those_that_mix_the_values():
    """Multiplied out by hand with the values of layer 1, they give what attention added there."""
    made, params = model("llama_bias_tied")
    c = made.config
    sites = [(1, ATTENTION), (1, "resid_pre"), (1, "attn_out")]
    _, seen = jax.jit(lambda params: made.activations(params, TOKENS, sites), compiler_options=QUICK)(params)
    p = {name.removeprefix("layers.1."): np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(seen[1, "resid_pre"], np.float64)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * p["attn_in.weight"]
    v = (normed @ p["v.weight"].T + p["v.bias"]).reshape(len(TOKENS), c.num_kv_heads, c.head_dim).repeat(c.num_heads // c.num_kv_heads, 1)
    mixed = np.einsum("qns,sqh->nqh", np.asarray(seen[1, ATTENTION]), v).reshape(len(TOKENS), -1)
    np.testing.assert_allclose(mixed @ p["o.weight"].T + p["o.bias"], seen[1, "attn_out"], atol=1e-5)


def test_attention_probabilities_look_back_as_far_as_the_window():
    made, params = model("gemma2")
    windows = [layer.window for layer in made.config.layers]
    sites = [(layer, ATTENTION) for layer in range(len(windows))]
    _, seen = jax.jit(lambda params: made.activations(params, TOKENS, sites), compiler_options=QUICK)(params)
    age = np.arange(len(TOKENS))[:, None] - np.arange(len(TOKENS))
    assert {window is None for window in windows} == {True, False}
    for layer, window in enumerate(windows):
        p = np.asarray(seen[layer, ATTENTION])
        np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
        assert ((p > 0) == ((age >= 0) & (age < (window or len(TOKENS))))).all()


def test_sites_that_are_not_there_are_refused():
    made, params = model("qwen3")
    layers = len(made.config.layers)
    with pytest.raises(ConfigError, match=f"no 'attn_out' in layer {layers}: {layers} layers have resid_pre, attn_out, mlp_out"):
        made.activations(params, [5], [(layers, "attn_out")])
    with pytest.raises(ConfigError, match="no 'middle' in layer 0"):
        made.activations(params, [5], [(0, "middle")])


def test_load_gives_every_tensor_as_hugging_face_stores_it():
    made, params = jaxllm.load(dtype="float32")
    tensors = made.checkpoint.tensors
    assert params.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(params[name], tensor.read((slice(None),) * len(tensor.shape)).astype(np.float32))
    assert made.tokenizer is not None
    assert made.forward(params, made.tokenizer.encode("Once upon a time")).shape[1] == made.config.vocab_size


def test_a_sharded_model_is_the_same_function():
    (one, params), (two, sharded) = model("qwen3"), model("qwen3", devices=2)
    assert {len(a.sharding.device_set) for a in sharded.values()} == {2}
    assert sharded["layers.0.q.weight"].addressable_shards[0].data.shape[0] * 2 == params["layers.0.q.weight"].shape[0]
    logits = jax.jit(two.forward, compiler_options=QUICK)(sharded, TOKENS)
    np.testing.assert_allclose(logits, jax.jit(one.forward, compiler_options=QUICK)(params, TOKENS), atol=2e-5)
