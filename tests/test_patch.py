"""Patches: the same change at the same sites in the dense and the paged network, for the row that brings it and for no other."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import EOS, LANES, Gather, answer, dense_logits, make_plan, runner
from fake_runner import FakeRunner
from tiny import QUICK, TOKENS, decoder, run
from twin import greedy, model, watched_answers, worst

from jaxllm.config import EngineConfig
from jaxllm.core import Core
from jaxllm.loading import load_decoder
from jaxllm.patch import SITES, Patch
from jaxllm.plan import Bucket
from jaxllm.request import ConfigError, RequestError
from jaxllm.runner import Runner

NAME, WIDTH = "qwen3", 32


def steer(layer, site, value_D, data):
    """Pushes the stream between two layers; scales layer 0's MLP; and from a position on, puts something else in place of attention."""
    if site == "mlp_out":
        return value_D * (1 + data["gain"])
    if site == "attn_out":
        return jnp.where(data["position"] >= data["since"], data["vector"], value_D)
    assert (layer, site) in ((0, "resid_post"), (1, "resid_pre"))
    return value_D + data["strength"] * data["vector"] / (layer + 1)


PATCH = Patch(
    steer,
    {"vector": np.zeros(WIDTH, np.float32), "strength": 0.0, "gain": 0.0, "since": 1 << 20},
    [(0, "resid_post"), (1, "resid_pre"), (0, "mlp_out"), (1, "attn_out")],
)
BUCKETS = (Bucket(0, LANES), Bucket(16, LANES))


@cache
def patched() -> Runner:
    made, _ = model(NAME)
    decoder = load_decoder(EngineConfig(), made.checkpoint, made.config, made.mesh, "float32")
    compiled = Runner(decoder, make_plan(buckets=BUCKETS), made.mesh, "reference", PATCH)
    compiled.compile()
    compiled.start(decoder)
    return compiled


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)


def answers(*requests, **changes):
    return watched_answers(patched(), *requests, **({"buckets": BUCKETS} | changes))


def steered(name, prompt, **data):
    return greedy(name, prompt, patch=data)


SEVERAL = [
    steered("pushed", TOKENS[:9], vector=vector(0), strength=2.0),
    steered("pushed otherwise", TOKENS[:9], vector=vector(1), strength=-1.0),
    steered("louder", TOKENS[5:12], gain=3.0),
    steered("swapped late", TOKENS[:20], vector=vector(2), since=12),
]


@cache
def dense():
    made, params = model(NAME)
    return jax.jit(lambda tokens, data: made.forward(params, tokens, patch=PATCH, data=data), compiler_options=QUICK)


@pytest.mark.parametrize("request_", SEVERAL, ids=lambda request: request.id)
def test_each_row_is_changed_as_the_dense_network_is(request_):
    """All four run together; each is held against the pure function with its own data."""
    logits, gathers = answers(*SEVERAL)
    gather = gathers[SEVERAL.index(request_)]
    data = {name: jnp.asarray(value) for name, value in PATCH.row(request_.patch).items()}
    assert worst(logits, [gather], [request_], lambda tokens: dense()(tokens, data)) < 1e-5
    assert worst(logits, [gather], [request_], lambda tokens: dense_logits(NAME, tokens)) > 1e-2, "the patch changed nothing"


def test_steering_one_row_leaves_the_others_bit_for_bit():
    plain = [greedy("a", TOKENS[:9], 14), greedy("b", [5], 20), greedy("c", TOKENS[3:20], 5)]
    before, _ = answers(*plain, greedy("x", TOKENS[:7]))
    after, _ = answers(*plain, steered("x", TOKENS[:7], vector=vector(0), strength=5.0, gain=1.0, since=0))
    assert before.keys() >= {key for key in after if key[0] != "x"}
    changed = {name for name, _ in before if any(not np.array_equal(before[key], after[key]) for key in before if key[0] == name)}
    assert changed == {"x"}


def test_a_patch_that_nobody_brings_data_for_changes_nothing():
    plain = [greedy("a", TOKENS[:9], 14), greedy("b", [5], 20)]
    (with_patch, _), (without, _) = answers(*plain), watched_answers(runner(NAME), *plain, buckets=BUCKETS)
    assert with_patch.keys() == without.keys()
    assert max(np.abs(with_patch[key] - without[key]).max() for key in without) < 1e-5


def test_a_slot_forgets_its_last_row():
    plain = [greedy(f"r{i}", TOKENS[i : i + 9]) for i in range(4)]
    before, _ = answers(*plain)
    answers(*(steered(f"s{i}", TOKENS[i : i + 9], gain=5.0) for i in range(4)))
    after, _ = answers(*plain)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_pages_are_shared_only_by_rows_with_the_same_data():
    engine = Core(patched(), make_plan(buckets=BUCKETS), patched().model.vocab_size, EOS, None, patch=PATCH)
    prompt = TOKENS[:17]

    def cached(name, **data):
        (gather,) = answer(engine, steered(name, prompt, **data))
        return gather.outputs[-1].num_cached_tokens, gather.tokens()

    plain, pushed = cached("1"), cached("2", vector=vector(0), strength=2.0)
    assert (plain[0], pushed[0]) == (0, 0) and plain[1] != pushed[1]
    assert cached("3") == (16, plain[1])
    assert cached("4", vector=vector(0), strength=2.0) == (16, pushed[1])
    assert cached("5", vector=vector(0), strength=2.1)[0] == 0


def test_a_preempted_row_keeps_its_data():
    asked = [dataclasses.replace(each, params=dataclasses.replace(each.params, max_tokens=20)) for each in SEVERAL]
    _, free = answers(*asked)
    engine = Core(patched(), make_plan(buckets=BUCKETS, num_pages=13), patched().model.vocab_size, frozenset(), None, patch=PATCH)
    tight = answer(engine, *asked)
    assert engine.stats().preemptions > 0
    assert [gather.tokens() for gather in tight] == [gather.tokens() for gather in free]


def test_a_steering_vector_can_be_learned():
    """The data may be traced: its gradient is that of the loss it makes."""
    made, params = model(NAME)

    def loss(vector_D):
        return -made.logprobs(params, TOKENS[:12], patch=PATCH, data={"vector": vector_D, "strength": 1.0}).sum()

    learn = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    start, slope = learn(jnp.zeros(WIDTH))
    assert learn(-0.05 * slope / jnp.linalg.norm(slope))[0] < start


@pytest.mark.parametrize("site", SITES)
def test_a_site_that_is_replaced_is_what_comes_after(site):
    """What a patch returns is what the rest of the network sees, and what `activations` gives."""
    made, params = model("phi")
    new = jnp.linspace(-1, 1, made.config.d_model)
    patch = Patch(lambda layer, site, value_D, data: new, sites=[(1, site)])
    sites = [(1, name) for name in SITES]
    logits, seen = jax.jit(lambda params: made.activations(params, TOKENS[:5], sites, patch=patch), compiler_options=QUICK)(params)
    plain = run(decoder("phi"), TOKENS[:5])
    np.testing.assert_array_equal(seen[1, site], np.broadcast_to(new, (5, len(new))))
    assert np.abs(logits - plain).max() > 1e-3
    total = sum(np.asarray(seen[1, name]) for name in SITES[:3])
    if site != "resid_post":
        np.testing.assert_allclose(seen[1, "resid_post"], total, atol=1e-5)


def test_mistakes_are_refused_in_a_sentence():
    made, params = model(NAME)
    with pytest.raises(ConfigError, match="there is no site 'middle' in a layer; there are resid_pre, attn_out, mlp_out, resid_post"):
        Patch(steer, sites=[(0, "middle")])
    with pytest.raises(ConfigError, match="cannot be named 'position'"):
        Patch(steer, {"position": 0})
    with pytest.raises(ConfigError, match="names 'attn_out' of layer 9, but the model has layers 0 to"):
        made.forward(params, TOKENS, patch=Patch(steer, sites=[(9, "attn_out")]))
    narrow = Patch(lambda layer, site, value_D, data: value_D[:3], sites=[(0, "attn_out")])
    with pytest.raises(ConfigError, match=r"makes \(3,\) of 'attn_out' in layer 0, which is \(32,\); it must return the shape"):
        made.forward(params, TOKENS, patch=narrow)
    with pytest.raises(ConfigError, match="data named gain came without the patch"):
        made.forward(params, TOKENS, data={"gain": 1.0})
    with pytest.raises(ConfigError, match="but the model has layers 0 to 1"):
        Runner(decoder(NAME), make_plan(), made.mesh, "reference", Patch(steer, sites=[(2, "attn_out")]))
    engine = Core(patched(), make_plan(), patched().model.vocab_size, EOS, None, patch=PATCH)
    with pytest.raises(RequestError, match="takes no data named 'volume'; it takes vector, strength, gain, since"):
        engine.add(steered("x", [5], volume=1.0), Gather())
    with pytest.raises(RequestError, match=r"'vector' has shape \(32,\), but what is given has \(3,\)"):
        engine.add(steered("x", [5], vector=np.zeros(3)), Gather())
    with pytest.raises(RequestError, match="the engine was started without one"):
        Core(FakeRunner(4, 50), make_plan(), 50, EOS, None).add(steered("x", [5], gain=1.0), Gather())
