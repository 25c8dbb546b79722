"""The weight files of a folder: which of them are the model's, and what tensors each holds. No tensor is read here.

The choice is Hugging Face's: an index names the shards; without one there is a single file. `consolidated.*` and the
folder `original/` hold the same weights under the maker's own names, and are passed by.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from .tensor import Tensor, on_disk
from .torch_pickle import torch_tensors

LOAD_FORMATS = ("auto", "safetensors", "pt", "orbax", "dummy")

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def stored_tensors(folder: Path, load_format: str = "auto") -> dict[str, Tensor]:
    """Every tensor of the model's files, by its stored name. auto: safetensors if there are any, else .bin.

    Raises ValueError for a load format we do not have, or files that contradict each other or their index;
    FileNotFoundError if there are no weights, or a shard that the index names is absent.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load format {load_format!r} is not supported; choose one of {', '.join(LOAD_FORMATS)}")
    if load_format == "dummy":
        raise ValueError("load format 'dummy' makes weights up; it has no stored tensors")
    found: dict[str, Tensor] = {}
    if load_format in ("auto", "safetensors"):
        found = _of_files(folder, "*.safetensors", "model.safetensors.index.json", safetensors)
    if not found and load_format in ("auto", "pt"):
        found = _of_files(folder, "pytorch_model*.bin", "pytorch_model.bin.index.json", torch_tensors)
    if not found:
        wanted = {"auto": "*.safetensors or pytorch_model*.bin", "safetensors": "*.safetensors", "pt": "pytorch_model*.bin"}[load_format]
        raise FileNotFoundError(f"{folder} has no weights ({wanted}); download them, or start with --load-format dummy to make them up")
    return found


def _of_files(folder: Path, pattern: str, index_name: str, read_file) -> dict[str, Tensor]:
    index = folder / index_name
    if index.exists():
        return _of_index(folder, index, read_file)
    paths = sorted(path for path in folder.glob(pattern) if not path.name.startswith("consolidated"))
    found: dict[str, Tensor] = {}
    for path in paths:
        tensors = read_file(path)
        if twice := found.keys() & tensors.keys():
            raise ValueError(
                f"{folder} has {len(paths)} weight files and no {index_name}, and {path.name} holds {min(twice)!r}, as another file does"
            )
        found |= tensors
    return found


def _of_index(folder: Path, index: Path, read_file) -> dict[str, Tensor]:
    """The tensors that an index names, each from the shard it names."""
    where: dict[str, str] = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(where.values()))
    if absent := [shard for shard in shards if not (folder / shard).exists()]:
        raise FileNotFoundError(f"{index.name} names {len(shards)} shards, but {folder} lacks {', '.join(absent[:4])}; download it again")
    held = {shard: read_file(folder / shard) for shard in shards}
    if missing := [name for name, shard in where.items() if name not in held[shard]]:
        raise ValueError(f"{index.name} puts {missing[0]!r} in {where[missing[0]]}, but it is not there ({len(missing)} such tensors)")
    return {name: held[shard][name] for name, shard in where.items()}


def safetensors(path: Path) -> dict[str, Tensor]:
    """The format: 8 bytes of header length, a JSON header, then the tensors (github.com/huggingface/safetensors#format)."""
    file = np.memmap(path, dtype=np.uint8, mode="r")
    length = int.from_bytes(file[:8].tobytes(), "little") if file.size >= 8 else file.size
    if not 0 < length <= file.size - 8:
        raise ValueError(f"{path.name} is not a safetensors file, or was cut short: {file.size} bytes, with a header of {length}")
    try:
        header = json.loads(file[8 : 8 + length].tobytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is not a safetensors file: its header is not JSON") from error
    header.pop("__metadata__", None)
    return {name: _safetensor(path, file, 8 + length, name, entry) for name, entry in header.items()}


def _safetensor(path: Path, file: np.ndarray, start: int, name: str, entry: dict) -> Tensor:
    if (dtype := DTYPES.get(entry["dtype"])) is None:
        raise ValueError(f"{name!r} in {path.name} has type {entry['dtype']}, which is not supported; we read {', '.join(DTYPES)}")
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if end - begin != size or start + end > file.size:
        have = min(end, file.size - start) - begin
        raise ValueError(f"{name!r} in {path.name} needs {size} bytes, but the file has {have} for it; it was probably cut short")
    return on_disk(file, dtype, shape, start + begin)
