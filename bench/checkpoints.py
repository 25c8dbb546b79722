"""Checkpoints of a shape's size, to time how they are read: Hugging Face's safetensors, or what `jaxllm convert` makes of them."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bench import workloads
from converters.checkpoint import read_config, tensor_shapes
from jaxllm.source import default_model

WRITTEN = ("safetensors", "orbax")


@contextlib.contextmanager
def written(shape: str, load_format: str, keep: Path | None) -> Iterator[Path]:
    """A folder with a checkpoint of this shape in one of WRITTEN's formats, inside `keep` if given. Raises OSError if it cannot be made."""
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory() as root:
        stored, converted = (Path(root) / f"{shape}-{name}" for name in WRITTEN)
        write_safetensors(shape, stored)
        if load_format == "orbax" and not converted.is_dir():
            command = [sys.executable, "-m", "serving.cli", "convert", str(stored), str(converted)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError(done.stderr.strip())
        yield converted if load_format == "orbax" else stored


def write_safetensors(shape: str, folder: Path) -> None:
    """Makes `folder` a Hugging Face checkpoint of this shape, a file a layer, in bfloat16; left alone if it is there.

    Only its bytes matter, so every tensor is cut from one run of random numbers. Its tokenizer is the default model's.
    """
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = workloads.SHAPES[shape]
    shapes = tensor_shapes(read_config(config))
    some = (np.random.default_rng(0).normal(size=1 << 22) * 0.02).astype(ml_dtypes.bfloat16)
    numbers = np.resize(some, max(math.prod(size) for size in shapes.values()))
    files: dict[str, dict[str, np.ndarray]] = {}
    for name, size in shapes.items():
        stored, file = _stored_name(name)
        files.setdefault(file, {})[stored] = numbers[: math.prod(size)].reshape(size)
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in default_model().glob("tokenizer*.json"):
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: a folder with it is whole


_STORED = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"} | {part: f"self_attn.{part}_proj" for part in "qkvo"}


def _stored_name(name: str) -> tuple[str, str]:
    """Llama's name for a tensor, and the file it goes to. Every shape here is named like Llama."""
    layer, part, kind = name.split(".")[-3:] if name.startswith("layers") else ("", *name.split("."))
    if layer:
        return f"model.layers.{layer}.{_STORED.get(part, f'mlp.{part}_proj')}.{kind}", f"layer-{int(layer):03}.safetensors"
    return {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(name, name), "rest.safetensors"
