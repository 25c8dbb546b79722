"""Mistakes planted on purpose break the models they should, and no others: proof that the goldens can tell.

A mistake in what a network is changes its config; where the config stays the same there is nothing to run. A mistake in the code is
run on one model of every family.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
import tiny
from tiny import CASES, GOLDENS, ONE_OF_EACH

import jaxllm.decoder
from converters.checkpoint import open_checkpoint
from converters.model_config import Rope
from jaxllm.decoder import Decoder
from jaxllm.parallel import make_mesh
from jaxllm.weights import Weights

pytestmark = pytest.mark.usefixtures("compiled_quickly")

GEMMA3 = {"gemma3", "gemma3_old"}


def each_layer(config, **changes):
    return replace(
        config, layers=tuple(replace(layer, **{key: change(layer) for key, change in changes.items()}) for layer in config.layers)
    )


def no_scale(layer):
    return layer.rope and Rope(layer.rope.inv_freq)


def no_renormalizing(layer):
    return layer.experts and replace(layer.experts, renormalize=False)


IN_CONFIG = {
    "norm weights are w, not w - 1": (lambda c: replace(c, norm_bias=0.0), {"gemma", "gemma2"} | GEMMA3),
    "no layer slides": (
        lambda c: each_layer(c, window=lambda layer: None),
        {"mistral", "qwen2_window", "gemma2", "phi3"} | GEMMA3,
    ),
    "attention and MLP one after the other": (
        lambda c: replace(c, parallel=False),
        {"phi", "phi_plain", "gpt_neox", "stablelm_parallel"},
    ),
    "experts' shares do not sum to 1": (lambda c: each_layer(c, experts=no_renormalizing), {"mixtral", "qwen3_moe"}),
    "attention is scaled by the head": (lambda c: replace(c, attn_scale=None), {"gemma2"} | GEMMA3),
    "positions start at row 0": (lambda c: replace(c, position_offset=0), {"opt"}),
    "attention has no softcap": (lambda c: replace(c, attn_softcap=None), {"gemma2"}),
    "every layer turns like the first": (lambda c: each_layer(c, rope=lambda layer: c.layers[0].rope), GEMMA3),
    "embeddings are not scaled": (lambda c: replace(c, embed_scale=1.0), {"gemma", "gemma2"} | GEMMA3),
    "cos and sin are not scaled": (
        lambda c: each_layer(c, rope=no_scale),
        {"phi3_short", "phi3_long", "qwen2_yarn", "yarn_mscale", "yarn_attention_factor"},
    ),
}


@pytest.mark.parametrize("mistake", IN_CONFIG)
def test_a_mistake_in_the_config_breaks_its_models(mistake):
    plant, expected = IN_CONFIG[mistake]
    broken = set()
    for name in CASES:
        checkpoint = open_checkpoint(GOLDENS / name)
        right = checkpoint.config.for_context(len(tiny.TOKENS))
        if (wrong := plant(right)) != right:
            model = Decoder(Weights(checkpoint.tensors, make_mesh(jax.devices()[:1]), "float32"), wrong)
            broken |= {name} if tiny.error(name, model) > 1e-3 else set()
    assert broken == expected


def test_longrope_chosen_for_short_contexts_breaks_the_long_one():
    checkpoint = open_checkpoint(GOLDENS / "phi3_long")
    model = Decoder(Weights(checkpoint.tensors, make_mesh(jax.devices()[:1]), "float32"), checkpoint.config.for_context(16))
    assert tiny.error("phi3_long", model) > 1e-3


def turn_neighbours(x, cos_sin):
    """GPT-J's pairing, feature 2i with 2i + 1: the commonest wrong rope."""
    cos, sin = cos_sin
    pairs = cos.shape[-1]
    a, b, rest = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2], x[..., 2 * pairs :]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(*x.shape[:-1], 2 * pairs)
    return jnp.concatenate([turned, rest], -1)


IN_CODE = {
    "queries and keys are not normed": (
        (jaxllm.decoder, "_qk_norm", lambda w, name, c, axis: None),
        {"qwen3", "qwen3_moe", "gemma3", "olmo2", "phi", "stablelm_parallel"},
    ),
    "features turn with their neighbours": ((jaxllm.decoder, "turn", turn_neighbours), set(ONE_OF_EACH) - {"opt"}),
}


@pytest.mark.parametrize("mistake", IN_CODE)
def test_a_mistake_in_the_code_breaks_its_families(mistake, monkeypatch):
    (module, name, wrong), expected = IN_CODE[mistake]
    monkeypatch.setattr(module, name, wrong)
    jax.clear_caches()  # a traced layer would still be the right one
    try:
        broken = {case for case in ONE_OF_EACH if tiny.error(case, tiny.decoder(case)) > 1e-3}
    finally:
        jax.clear_caches()
    assert broken == expected
