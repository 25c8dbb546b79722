"""A Hugging Face folder, read as (ModelConfig, {our name: lazy tensor}). Numpy only: no JAX, no GPU.

Everything is checked before any weight is read: the config's every key, and that the files hold exactly the tensors that the
config calls for, in their shapes. What we do not understand is refused here, in a sentence, rather than served wrongly.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import orbax
from .families import FAMILIES, Family
from .hf_config import HARMLESS, Read, merge
from .model_config import ModelConfig, tensor_shapes
from .rename import rename
from .stored import stored_tensors
from .tensor import Tensor

__all__ = ["Checkpoint", "Tensor", "open_checkpoint", "read_config", "tensor_shapes"]


@dataclass(frozen=True)
class Checkpoint:
    """tensors: empty for load_format "dummy". dtype: the checkpoint's own, by name. hf: config.json after overrides.

    converted: the tensors lie in our own form, and orbax.restore has them all.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    dtype: str
    hf: dict[str, Any]
    folder: Path
    generation: dict[str, Any]
    converted: bool = False


def open_checkpoint(folder: Path, *, load_format: str = "auto", hf_overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """load_format: auto | safetensors | pt | orbax | dummy (config.json alone; the weights are to be made up).

    Raises ValueError for a family, config key, file or tensor that does not fit; OSError for a file that is not there.
    """
    hf = merge(_json(folder / "config.json"), hf_overrides or {})
    config = read_config(hf)
    tensors = {}
    converted = load_format == "orbax" or (load_format == "auto" and (folder / orbax.NAME).is_dir())
    if converted:
        tensors = orbax.orbax_tensors(folder)
        check(tensors, config)
    elif load_format != "dummy":
        family = _family(hf)
        tensors = rename(stored_tensors(folder, load_format), family.names, {**family.defaults, **hf})
        if "lm_head.weight" not in config.parts and (head := tensors.pop("lm_head.weight", None)):
            tensors.setdefault("embed.weight", head)  # tied: one of the two is enough, and the embeddings win, as at Hugging Face
        check(tensors, config)
    generation = folder / "generation_config.json"
    return Checkpoint(config, tensors, _dtype(hf, tensors), hf, folder, _json(generation) if generation.exists() else {}, converted)


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Raises ValueError for a model type we do not know, a quantized one, or a key that nobody read."""
    family = _family(hf)
    if quantization := hf.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ValueError(f"the checkpoint is quantized ({method}), which is not supported yet; use one in bfloat16, float16 or float32")
    read = Read({**family.defaults, **hf}, "config.json")
    config = family.config(read)
    read.refuse_unread(hf, HARMLESS)
    return config


def _family(hf: Mapping[str, Any]) -> Family:
    kind = hf.get("model_type")
    if kind in FAMILIES:
        return FAMILIES[kind]
    if "text_config" in hf or "vision_config" in hf:
        raise ValueError(f"model type {kind!r} is multimodal, which is not supported; use its text-only checkpoint, if there is one")
    raise ValueError(f"model type {kind!r} is not supported; we know {', '.join(sorted(FAMILIES))}")


def check(tensors: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises ValueError unless `tensors` are exactly those that `config` calls for, in their shapes."""
    wanted = tensor_shapes(config)
    if missing := wanted.keys() - tensors.keys():
        raise ValueError(f"the checkpoint lacks {_some(missing)}, which its config calls for")
    if extra := tensors.keys() - wanted.keys():
        raise ValueError(f"the checkpoint holds {_some(extra)}, which its config has no place for")
    if misshapen := {name: (tensors[name].shape, shape) for name, shape in wanted.items() if tensors[name].shape != shape}:
        name, (is_, should) = next(iter(misshapen.items()))
        raise ValueError(f"{name!r} is {is_} in the checkpoint, but the config makes it {should} ({len(misshapen)} tensors differ)")


def _some(names: set[str]) -> str:
    first = sorted(names)[:4]
    return ", ".join(map(repr, first)) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def _dtype(hf: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    said = hf.get("dtype") or hf.get("torch_dtype")
    if said:
        return str(said).removeprefix("torch.")
    return np.dtype(tensors["embed.weight"].dtype).name if tensors else "float32"


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; a model folder holds config.json, the tokenizer and the weights")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
