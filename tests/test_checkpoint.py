"""Checkpoints that do not fit are refused in a sentence that names the thing; good ones are read lazily, rectangle by rectangle."""

import io
import json
import os
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from tiny import GOLDENS

from converters.checkpoint import open_checkpoint, read_config, tensor_shapes
from converters.stored import stored_tensors

LLAMA = GOLDENS / "llama"
WHOLE = (slice(None), slice(None))


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden Llama, to be spoilt."""
    shutil.copytree(LLAMA, tmp_path / "llama")
    return tmp_path / "llama"


def stored(folder):
    return {name: tensor.read((slice(None),) * len(tensor.shape)) for name, tensor in stored_tensors(folder).items()}


def write_safetensors(path, arrays):
    names = {"float16": "F16", "float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int64": "I64"}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in arrays.items():
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def rewrite(folder, changes):
    """The folder's weights with some replaced, added, or (None) taken away."""
    arrays = {name: array for name, array in (stored(folder) | changes).items() if array is not None}
    write_safetensors(folder / "model.safetensors", arrays)


def rope_of(config):
    """The first layer's."""
    assert config.layers[0].rope is not None
    return config.layers[0].rope


def config_with(**changes):
    return json.loads((LLAMA / "config.json").read_text()) | changes


# ---------------------------------------------------------------- tensors
def test_tensors_are_checked_before_any_is_read(folder):
    rewrite(folder, {"model.layers.1.self_attn.k_proj.weight": None})
    with pytest.raises(ValueError, match=r"the checkpoint lacks 'layers.1.k.weight', which its config calls for"):
        open_checkpoint(folder)


def test_extra_tensors_are_named(folder):
    rewrite(folder, {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float16)})
    with pytest.raises(ValueError, match=r"the checkpoint holds 'layers.0.q.bias', which its config has no place for"):
        open_checkpoint(folder)


def test_tensors_without_a_rule_are_named(folder):
    rewrite(folder, {"model.vision_tower.weight": np.zeros((2, 3), np.float16)})
    with pytest.raises(ValueError, match=r"'model.vision_tower.weight' of shape \(2, 3\), which this family has no place for"):
        open_checkpoint(folder)


def test_misshapen_tensors_are_named_with_both_shapes(folder):
    rewrite(folder, {"model.norm.weight": np.zeros(31, np.float16)})
    with pytest.raises(
        ValueError, match=r"'norm.weight' is \(31,\) in the checkpoint, but the config makes it \(32,\) \(1 tensors differ\)"
    ):
        open_checkpoint(folder)


def test_harmless_leftovers_are_dropped(folder):
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})
    assert open_checkpoint(folder).tensors.keys() == tensor_shapes(open_checkpoint(LLAMA).config).keys()


def test_a_tied_head_is_the_embeddings_even_if_it_is_stored(folder):
    overrides = {"tie_word_embeddings": True}
    tensors = open_checkpoint(folder, hf_overrides=overrides).tensors
    assert "lm_head.weight" not in tensors
    np.testing.assert_array_equal(tensors["embed.weight"].read(WHOLE), stored(LLAMA)["model.embed_tokens.weight"])
    rewrite(folder, {"model.embed_tokens.weight": None})  # only one of the two need be stored
    tensors = open_checkpoint(folder, hf_overrides=overrides).tensors
    np.testing.assert_array_equal(tensors["embed.weight"].read(WHOLE), stored(LLAMA)["lm_head.weight"])


def test_a_missing_expert_is_named(tmp_path):
    shutil.copytree(GOLDENS / "mixtral", tmp_path / "mixtral")
    rewrite(tmp_path / "mixtral", {"model.layers.0.block_sparse_moe.experts.1.w2.weight": None})
    with pytest.raises(ValueError, match=r"3 of the tensors that make 'layers.0.experts.down.weight'; number 1 is missing"):
        open_checkpoint(tmp_path / "mixtral")


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "qwen2_moe", "stablelm_parallel", "llama_sharded_bin"])
def test_any_rectangle_is_the_same_as_a_cut_of_the_whole(name):
    rng = np.random.default_rng(0)
    for key, tensor in open_checkpoint(GOLDENS / name).tensors.items():
        whole = tensor.read(tuple(slice(None) for _ in tensor.shape))
        assert whole.shape == tensor.shape, key
        assert whole.dtype == tensor.dtype, key
        cut = tuple(slice(lo, rng.integers(lo + 1, n + 1)) for n in tensor.shape for lo in [rng.integers(0, n)])
        np.testing.assert_array_equal(tensor.read(cut), whole[cut], err_msg=key)


# ---------------------------------------------------------------- files
def test_an_absent_shard_is_named(tmp_path):
    shutil.copytree(GOLDENS / "llama_sharded", tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"index.json names 2 shards, but .* lacks model-00002-of-00002.safetensors; download it again"
    ):
        open_checkpoint(tmp_path / "m")


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path):
    shutil.copytree(GOLDENS / "llama_sharded", tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.norm.weight"', '"model.norm.wait"'))
    with pytest.raises(ValueError, match=r"puts 'model.norm.wait' in model-0000\d-of-00002.safetensors, but it is not there"):
        open_checkpoint(tmp_path / "m")


def test_several_files_without_an_index_must_not_overlap(folder):
    write_safetensors(folder / "more.safetensors", {"model.norm.weight": np.ones(32, np.float16)})
    with pytest.raises(
        ValueError, match=r"2 weight files and no model.safetensors.index.json, and more.safetensors holds 'model.norm.weight'"
    ):
        open_checkpoint(folder)
    rewrite_without = {name: array for name, array in stored(LLAMA).items() if name != "model.norm.weight"}
    write_safetensors(folder / "model.safetensors", rewrite_without)
    assert "norm.weight" in open_checkpoint(folder).tensors  # disjoint files are one checkpoint


def test_the_makers_own_copies_are_passed_by(folder):
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"rubbish")
    (folder / "consolidated.00.safetensors").write_bytes(b"rubbish")
    assert open_checkpoint(folder).tensors


def test_a_file_cut_short_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"in model.safetensors needs \d+ bytes, but the file has \d+ for it; it was probably cut short"):
        open_checkpoint(folder)
    path.write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file, or was cut short: 40 bytes"):
        open_checkpoint(folder)


def test_load_formats(folder):
    with pytest.raises(ValueError, match=r"load format 'gguf' is not supported; choose one of auto, safetensors, pt, orbax, dummy"):
        open_checkpoint(folder, load_format="gguf")
    with pytest.raises(FileNotFoundError, match=r"has no weights \(pytorch_model\*.bin\)"):
        open_checkpoint(folder, load_format="pt")
    with pytest.raises(FileNotFoundError, match=r"has no weights \(\*.safetensors\)"):
        open_checkpoint(GOLDENS / "llama_bin", load_format="safetensors")
    assert open_checkpoint(GOLDENS / "llama_bin", load_format="pt").tensors
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights .* or start with --load-format dummy"):
        open_checkpoint(folder)
    dummy = open_checkpoint(folder, load_format="dummy")
    assert (dummy.tensors, dummy.config) == ({}, open_checkpoint(LLAMA).config)


def test_what_comes_with_the_weights(folder):
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 3]}')
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.dtype, checkpoint.generation["eos_token_id"]) == ("float16", [2, 3])
    assert open_checkpoint(LLAMA).generation == {}
    assert open_checkpoint(GOLDENS / "llama31").dtype == "float16"  # torch_dtype, the old spelling
    assert open_checkpoint(folder, hf_overrides={"dtype": None}).dtype == "float16"  # the tensors' own


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_types_are_read_bit_for_bit(tmp_path, dtype):
    array = np.linspace(-2, 2, 40).reshape(8, 5).astype(dtype)
    write_safetensors(tmp_path / "model.safetensors", {"odd": np.zeros(3, np.float16), "a": array})  # 6 bytes: a lies unaligned
    tensor = stored_tensors(tmp_path)["a"]
    assert (tensor.shape, tensor.dtype) == ((8, 5), np.dtype(dtype))
    assert tensor.read((slice(2, 5), slice(1, 4))).tobytes() == array[2:5, 1:4].tobytes()


def test_a_rectangle_costs_its_own_bytes_only(tmp_path):
    shape = (1 << 20, 1 << 14)  # 32 GiB of float16, all hole
    header = json.dumps({"a": {"dtype": "F16", "shape": shape, "data_offsets": [0, 2 * shape[0] * shape[1]]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2 * shape[0] * shape[1])
    before = _resident()
    tensor = stored_tensors(tmp_path)["a"]
    part = np.array(tensor.read((slice(1 << 19, (1 << 19) + 64), slice(0, 128))))
    assert part.shape == (64, 128)
    assert _resident() - before < 64 << 20


def _resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- configs
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mamba"}, "model type 'mamba' is not supported; we know gemma, "),
        ({"model_type": "gemma3", "text_config": {}}, "model type 'gemma3' is multimodal, which is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, r"the checkpoint is quantized \(awq\), which is not supported yet"),
        ({"use_bidirectional_attention": True}, "config.json sets {'use_bidirectional_attention': True}, which we do not support"),
        ({"sliding_window": 9}, "config.json sets {'sliding_window': 9}, which we do not support"),
        ({"layer_types": ["sliding_attention"] * 2}, "in model type 'llama' every layer is full_attention, but layer_types says"),
        ({"layer_types": ["full_attention"]}, "layer_types must name one of .* for each of 2 layers"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}},
            "rope scaling 'dynamic' is not supported; we know ",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}}, r"rope scaling sets {'mrope_section': \[1, 2\]}"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope scaling has no 'factor', which this model needs"),
        ({"hidden_act": "xielu"}, "activation 'xielu' is not supported"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2},
            "layer_types has sliding layers, but use_sliding_window is false",
        ),
        ({"model_type": "mistral", "attention_bias": True}, "config.json sets {'attention_bias': True}"),
    ],
)
def test_configs_that_we_would_get_wrong_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_config(config_with(**changes))


def test_a_config_that_lacks_a_key_is_refused(folder):
    hf = config_with()
    del hf["hidden_size"]
    with pytest.raises(ValueError, match=r"config.json has no 'hidden_size', which this model needs"):
        read_config(hf)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json; a model folder holds config.json, the tokenizer and the weights"):
        open_checkpoint(folder)


def test_overrides_are_merged_into_the_config():
    plain = rope_of(open_checkpoint(LLAMA).config)
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}  # rope_theta stays as it was
    checkpoint = open_checkpoint(LLAMA, hf_overrides=scaled)
    assert rope_of(checkpoint.config).inv_freq == tuple(f / 2 for f in plain.inv_freq)
    assert checkpoint.hf["rope_parameters"]["rope_theta"] == 1e4


def test_yarn_given_the_old_way_keeps_the_theta_given_the_new_way():
    hf = config_with(rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    config = read_config(hf | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}})
    rope = rope_of(config)
    assert rope.inv_freq[0] == 1.0 and rope.scale > 1  # the fastest feature is kept
    assert rope.inv_freq[3] == pytest.approx(1e6 ** (-6 / 8) / 4)  # the slowest is slowed by the whole factor
    assert config.max_position == 4 * 64


@pytest.mark.parametrize(
    ("name", "longest"), [("llama", 128), ("llama_linear", 512), ("llama31", 128), ("gemma3_old", 128), ("phi3_long", 128)]
)
def test_the_longest_context_counts_the_scaling(name, longest):
    assert open_checkpoint(GOLDENS / name).config.max_position == longest


def test_windows_follow_the_family():
    hf = config_with(model_type="qwen2", num_hidden_layers=4, sliding_window=7, use_sliding_window=True, max_window_layers=3)
    del hf["attention_bias"], hf["mlp_bias"]
    assert [layer.window for layer in read_config(hf).layers] == [None, None, None, 7]
    assert {layer.window for layer in read_config(hf | {"use_sliding_window": False}).layers} == {None}
    kinds = ["sliding_attention", "full_attention"] * 2
    assert [layer.window for layer in read_config(hf | {"layer_types": kinds}).layers] == [7, None, 7, None]
    assert {layer.window for layer in read_config(config_with(model_type="mistral", sliding_window=7)).layers} == {7}
    assert {layer.window for layer in read_config(config_with(model_type="mistral", sliding_window=None)).layers} == {None}


def test_longrope_is_chosen_once_for_a_context():
    config = open_checkpoint(GOLDENS / "phi3_long").config
    short, long = rope_of(config.for_context(16)), rope_of(config.for_context(17))
    assert [round(a / b, 3) for a, b in zip(short.inv_freq, long.inv_freq, strict=True)] == [1.0, 1.818, 3.333, 6.923]
    assert short.scale == long.scale > 1
    llama = open_checkpoint(LLAMA).config
    assert llama.for_context(10**6) == llama


# ---------------------------------------------------------------- pytorch_model.bin
class Runs:
    """Unpickles to a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def write_bin(path, pickled, storages=(), **more):
    with zipfile.ZipFile(path, "w", more.pop("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, body in enumerate(storages):
            archive.writestr(f"archive/data/{key}", body)
        for name, body in more.items():
            archive.writestr(f"archive/{name}", body)


def as_bin(folder, pickled, *storages, **more):
    (folder / "model.safetensors").unlink(missing_ok=True)
    write_bin(folder / "pytorch_model.bin", pickled, storages, **more)
    return folder


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_bin_runs_nothing_and_is_refused_by_name(folder, tmp_path, protocol):
    evil = pickle.dumps({"model.norm.weight": Runs(os.system, f"touch {tmp_path / 'ran'}")}, protocol)
    with pytest.raises(ValueError, match=r"pytorch_model.bin wants to use posix.system; a checkpoint may hold tensors and nothing else"):
        open_checkpoint(as_bin(folder, evil))
    assert not (tmp_path / "ran").exists()


GLOBALS = ["builtins eval", "builtins getattr", "torch._utils _rebuild_tensor_v2.__globals__", "torch load", "collections namedtuple"]


@pytest.mark.parametrize("name", GLOBALS)
def test_no_other_name_is_looked_up(folder, name):
    module, _, attribute = name.partition(" ")
    pickled = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, attribute)) + b"\x93."
    with pytest.raises(ValueError, match=f"wants to use {module}.{attribute}"):
        stored_tensors(as_bin(folder, pickled))


def tensor_pickle(storage="ctorch\nFloatStorage\n", shape="(I2\nI3\nt", strides="(I3\nI1\nt", offset="I0\n"):
    """{"a": a tensor over storage 0}, in pickle's own words."""
    place = f"((S'storage'\n{storage}S'0'\nS'cpu'\nI6\ntQ{offset}{shape}{strides}I00\n(dtR"
    return f"(dS'a'\nctorch._utils\n_rebuild_tensor_v2\n{place}s.".encode()


def test_a_bin_tensor_is_a_strided_view_of_its_storage(folder):
    body = np.arange(6, dtype=np.float32).tobytes()
    tensor = stored_tensors(as_bin(folder, tensor_pickle(shape="(I3\nI2\nt", strides="(I1\nI3\nt"), body))["a"]
    assert tensor.read(WHOLE).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensor.read((slice(1, 3), slice(1, 2))).tolist() == [[4], [5]]


@pytest.mark.parametrize(("storage", "dtype"), [("BFloat16", ml_dtypes.bfloat16), ("Half", np.float16), ("Long", np.int64)])
def test_a_bin_is_read_bit_for_bit(folder, storage, dtype):
    array = np.linspace(-3, 3, 6).reshape(2, 3).astype(dtype)
    tensor = stored_tensors(as_bin(folder, tensor_pickle(storage=f"ctorch\n{storage}Storage\n"), array.tobytes()))["a"]
    assert tensor.dtype == np.dtype(dtype)
    assert tensor.read(WHOLE).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("pickled", "sentence"),
    [
        (tensor_pickle(offset="I1\n"), r"tensor of shape \(2, 3\) at byte 4 does not fit in a file of 24 bytes"),
        (tensor_pickle(strides="(I-3\nI1\nt"), r"with strides \(-3, 1\) at 0 is not one"),
        (pickle.dumps({"epoch": 3}), "pytorch_model.bin holds 'epoch', which is not a tensor with a name"),
        (pickle.dumps([1, 2]), "pytorch_model.bin holds a list, not tensors by name"),
        (b"rubbish", "pytorch_model.bin does not hold tensors by name as torch saves them"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI2\ntR.", "a tensor lies on int, not on a storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(N(dS'x'\nI1\nstb.", "a checkpoint may hold tensors and nothing else"),
    ],
)
def test_bins_that_hold_something_else_are_refused(folder, pickled, sentence):
    with pytest.raises(ValueError, match=sentence):
        stored_tensors(as_bin(folder, pickled, bytes(24)))


def test_bins_in_other_forms_are_refused(folder):
    with pytest.raises(ValueError, match=r"lacks data/0, which a tensor in it lies on"):
        stored_tensors(as_bin(folder, tensor_pickle()))
    with pytest.raises(ValueError, match=r"written on a big-endian machine"):
        stored_tensors(as_bin(folder, tensor_pickle(), bytes(24), byteorder=b"big"))
    with pytest.raises(ValueError, match=r"data/0 in pytorch_model.bin is compressed"):
        stored_tensors(as_bin(folder, tensor_pickle(), bytes(24), compression=zipfile.ZIP_DEFLATED))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"not a zip file: it was cut short, or written by torch before 1.6"):
        stored_tensors(folder)
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"a zip file without a data.pkl"):
        stored_tensors(folder)
