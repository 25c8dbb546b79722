"""Our converted checkpoint: what goes in comes out, whole or in parts, on any devices; and what does not fit is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import GOLDENS

import jaxllm
from converters.checkpoint import open_checkpoint
from converters.hub import fetch
from converters.orbax import convert, write
from jaxllm.config import EngineConfig
from jaxllm.loading import load_decoder, load_params
from jaxllm.parallel import make_mesh
from jaxllm.source import default_model
from serving.cli import main


def whole(tensor) -> np.ndarray:
    return tensor.read((slice(None),) * len(tensor.shape))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(open_checkpoint(GOLDENS / "llama_bias_tied"), folder, "float32")
    return folder


@pytest.mark.parametrize(("name", "devices"), [("llama_bias_tied", 2), ("phi3", 1), ("qwen2_moe", 2), ("gpt_neox", 1)])
def test_a_converted_model_is_the_same_network(name, devices, tmp_path):
    """Split, stacked and interleaved tensors are stored under our names, so a start has nothing left to sort out."""
    convert(open_checkpoint(GOLDENS / name), tmp_path / "model", "float32")
    checkpoint, mesh = open_checkpoint(tmp_path / "model"), make_mesh(jax.devices()[:devices])
    assert checkpoint.converted
    decoder = load_decoder(EngineConfig(), checkpoint, checkpoint.config.for_context(len(tiny.TOKENS)), mesh, "float32")
    assert tiny.error(name, decoder) < 1e-4
    assert len(decoder.blocks[0].attn.o.weight[...].sharding.device_set) == devices


def test_every_device_gets_its_own_part(converted):
    checkpoint, mesh = open_checkpoint(converted), make_mesh(jax.devices()[:2])
    stored = open_checkpoint(GOLDENS / "llama_bias_tied").tensors
    params = load_params(checkpoint, checkpoint.config, mesh, "float32")
    assert params.keys() == stored.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(array, whole(stored[name]))
    assert [shard.data.shape for shard in params["layers.0.q.weight"].addressable_shards] == [(16, 32), (16, 32)]


def test_tensors_can_be_read_by_rectangles_and_cast_as_they_are_restored(converted):
    checkpoint, stored = open_checkpoint(converted), open_checkpoint(GOLDENS / "llama_bias_tied").tensors
    rectangle = (slice(3, 9), slice(4, 20))
    np.testing.assert_array_equal(checkpoint.tensors["layers.1.q.weight"].read(rectangle), stored["layers.1.q.weight"].read(rectangle))
    params = load_params(checkpoint, checkpoint.config, make_mesh(jax.devices()[:1]), "bfloat16")
    np.testing.assert_array_equal(params["norm.weight"], whole(stored["norm.weight"]).astype(jnp.bfloat16))


def test_the_command_converts_and_what_it_wrote_is_found(tmp_path, capsys):
    folder = tmp_path / "half" / "model"
    assert main(["convert", str(default_model()), str(folder), "--dtype", "bfloat16"]) == 0
    assert f"jaxllm serve {folder}" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    (model, params), (_, original) = jaxllm.load(folder), jaxllm.load(dtype="bfloat16")
    assert params.keys() == original.keys()
    assert all((params[name] == original[name]).all() and params[name].dtype == jnp.bfloat16 for name in original)
    assert model.tokenizer is not None and model.tokenizer.encode("Once upon a time")


def test_a_folder_that_holds_a_model_is_not_written_over(converted, tmp_path, capsys):
    assert main(["convert", str(converted), str(converted)]) == 1
    assert "already holds a model (orbax); name another folder" in capsys.readouterr().err
    shutil.copytree(GOLDENS / "llama", tmp_path / "llama")
    assert main(["convert", str(converted), str(tmp_path / "llama")]) == 1
    assert "already holds a model (model.safetensors)" in capsys.readouterr().err


def test_dummy_weights_are_not_converted(tmp_path, capsys):
    assert main(["convert", str(GOLDENS / "llama"), str(tmp_path / "x"), "--load-format", "dummy"]) == 1
    assert "nothing to convert" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_what_does_not_fit_is_refused(converted, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no orbax/; make such a folder with jaxllm convert"):
        open_checkpoint(GOLDENS / "llama", load_format="orbax")
    with pytest.raises(FileNotFoundError, match="no Hub repository is in Orbax's format"):
        fetch("acme/model", load_format="orbax")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        open_checkpoint(converted, load_format="safetensors")
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"is \(.*\) in the checkpoint, but the config makes it \(.*40.*\)"):
        open_checkpoint(broken)
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"the checkpoint lacks 'layers\.2\."):
        open_checkpoint(broken)
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "orbax" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="is not an Orbax checkpoint, or was cut short"):
        open_checkpoint(broken)
    shutil.copytree(converted, tmp_path / "cut")
    for file in (tmp_path / "cut" / "orbax" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="orbax cannot be read, convert the model again"):
        whole(open_checkpoint(tmp_path / "cut").tensors["layers.0.up.weight"])
    mixed = open_checkpoint(GOLDENS / "llama_bias_tied")
    params = {name: whole(tensor) for name, tensor in mixed.tensors.items()}
    with pytest.raises(ValueError, match="the tensors are float16 and float32; cast them to one type"):
        write(tmp_path / "mixed", mixed, params | {"norm.weight": params["norm.weight"].astype(np.float32)})
