"""Placing weights: each device its own part, the same answers on any number of devices, random ones in the right shapes."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import GOLDENS, ONE_OF_EACH, TOKENS

from converters.checkpoint import open_checkpoint, tensor_shapes
from converters.tensor import Tensor
from jaxllm.decoder import Block, Decoder, DenseContext
from jaxllm.parallel import make_mesh
from jaxllm.request import ConfigError
from jaxllm.weights import RandomWeights, Weights, loading_bar


def mesh(devices):
    return make_mesh(jax.devices()[:devices])


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("llama_bias_tied", 2),
        ("stablelm", 4),
        ("stablelm_parallel", 2),
        ("gpt_neox", 4),
        ("opt", 4),
        ("phi3", 2),
        ("olmo2", 2),
        ("gemma3", 2),
        ("qwen2_moe", 2),
    ],
)
def test_more_devices_give_the_same_logits(name, devices):
    assert tiny.error(name, tiny.decoder(name, devices)) < 1e-4


def test_heads_that_devices_do_not_divide_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="tensor parallel size 4 does not divide the model's 2 key/value heads; choose a divisor of 2"):
        tiny.decoder("llama", 4)
    with pytest.raises(ConfigError, match="tensor parallel size 3 does not divide the model's 4 attention heads"):
        tiny.decoder("llama", 3)


def test_each_device_reads_its_own_rectangle_and_no_more():
    checkpoint = open_checkpoint(GOLDENS / "llama_bias_tied")
    reads = Counter()

    def counted(name, tensor):
        def read(index):
            part = tensor.read(index)
            reads[name] += part.size
            return part

        return Tensor(tensor.shape, tensor.dtype, read)

    tensors = {name: counted(name, tensor) for name, tensor in checkpoint.tensors.items()}
    model = Decoder(Weights(tensors, mesh(2), jnp.float32), checkpoint.config)
    parts = {"q", "k", "v", "o", "gate", "up", "down", "embed"}
    sharded = [name for name in reads if name.split(".")[-2] in parts and not name.endswith(("o.bias", "down.bias"))]
    assert len(sharded) == 2 * 12 + 1
    assert {name: reads[name] for name in sharded} == {name: int(np.prod(tensors[name].shape)) for name in sharded}
    assert reads.keys() == tensors.keys()
    qkv = model.blocks[0].attn.qkv.weight[...]
    assert [shard.data.shape for shard in qkv.addressable_shards] == [(32, 32), (32, 32)]


def test_fused_rows_go_device_by_device():
    parts = {name: np.arange(rows)[:, None] + np.zeros((1, 2)) + 100 * i for i, (name, rows) in enumerate([("q", 4), ("k", 2)])}
    tensors = {name: Tensor(part.shape, part.dtype, lambda index, part=part: part[index]) for name, part in parts.items()}
    fused = Weights(tensors, mesh(2), jnp.float32).fused(["q", "k"], [(4, 2), (2, 2)], ("heads", None))
    assert np.asarray(fused)[:, 0].tolist() == [0, 1, 100, 2, 3, 101]


def test_a_large_tensor_is_copied_in_pieces_and_cast(monkeypatch, capsys):
    monkeypatch.setattr("jaxllm.weights.CHUNK", 64)
    stored = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float16)
    tensors = {"a": Tensor(stored.shape, stored.dtype, lambda index: stored[index])}
    with loading_bar(tensors) as progress:
        loaded = Weights(tensors, mesh(1), jnp.bfloat16, progress)("a", (50, 8), (None, None))
    np.testing.assert_array_equal(np.asarray(loaded), stored.astype(jnp.bfloat16))
    assert "800/800" in capsys.readouterr().err


def test_weights_refuse_a_shape_that_is_not_the_tensors():
    w = Weights(open_checkpoint(GOLDENS / "llama").tensors, mesh(1), jnp.float32)
    with pytest.raises(ValueError, match=r"'norm.weight' is \(32,\) in the checkpoint, but the model asks for \(33,\)"):
        w("norm.weight", (33,), (None,))
    with pytest.raises(ValueError, match="the checkpoint has no 'nothing'"):
        w("nothing", (1,), (None,))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_random_weights_have_exactly_the_checkpoints_shapes(name):
    config = open_checkpoint(GOLDENS / name, load_format="dummy").config
    shapes = tensor_shapes(config)
    assert shapes == {name: tensor.shape for name, tensor in open_checkpoint(GOLDENS / name).tensors.items()}
    asked = Counter()

    class Recorded(RandomWeights):
        def __call__(self, name, shape, axes):
            asked[name] += 1
            return super().__call__(name, shape, axes)

        def fused(self, names, shapes, axes):
            asked.update(names)
            return super().fused(names, shapes, axes)

    # eval_shape: the same calls, but nothing is compiled or made
    state = jax.eval_shape(lambda: nnx.state(Decoder(Recorded(shapes, mesh(1), jnp.bfloat16), config)))
    assert asked == Counter(shapes.keys())
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(int(np.prod(shape)) for shape in shapes.values())


def test_random_weights_are_the_same_network_on_any_mesh_and_a_sane_one():
    config = open_checkpoint(GOLDENS / "gemma3", load_format="dummy").config
    config = replace(config, layers=config.layers[:2], vocab_size=63)  # which two devices do not divide: the vocabulary is then replicated
    one, two = (
        tiny.run(
            Decoder(RandomWeights(tensor_shapes(config), mesh(n), jnp.float32, seed=3, norm_bias=config.norm_bias), config), TOKENS % 63
        )
        for n in (1, 2)
    )
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert 0.01 < one.std() < 10


def test_bfloat16_stays_close_to_float32():
    logits, want = tiny.run(tiny.decoder("qwen3", dtype=jnp.bfloat16)), np.load(GOLDENS / "qwen3" / "logits.npy")
    assert logits.dtype == np.float32
    assert np.abs(logits - want).max() / np.abs(want).max() < 0.1


@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("gemma2", 2), ("qwen3_moe_some", 2)])
def test_layers_that_differ_only_in_arrays_are_traced_once(name, kinds, monkeypatch):
    traced = []
    call = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *args: (traced.append(self), call(self, *args))[1])
    jax.clear_caches()
    model = tiny.decoder(name)
    graphdef, state = nnx.split(model)
    step = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens, tokens, None, DenseContext())[0])
    text = step.lower(state, jnp.zeros(3, jnp.int32)).as_text()
    assert len(traced) == kinds < len(model.blocks)
    assert text.count("call @run_block") == len(model.blocks)
