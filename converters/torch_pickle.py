"""pytorch_model.bin without torch, and without running what is in it.

The file is a zip of a pickle and raw storages. A pickle is a program, so ours may call three things only: make an ordered dict,
lay a tensor over a storage, and wrap a tensor as a parameter. Any other name in it is refused before it is looked up.
Storages stay on disk, mapped: a tensor is a strided view of its storage.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .tensor import Tensor, on_disk

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Storage(NamedTuple):
    """`size` bytes at `offset` of the file."""

    dtype: np.dtype
    offset: int
    size: int


class _StorageType(NamedTuple):
    dtype: np.dtype


def torch_tensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError for a file that is not torch's zip format, or that holds anything but tensors by name."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path.name} is not a zip file: it was cut short, or written by torch before 1.6; save it again as safetensors")
    file = np.memmap(path, dtype=np.uint8, mode="r")
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in entries:
            raise ValueError(f"{path.name} is a zip file without a data.pkl: torch did not write it")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError(f"{path.name} was written on a big-endian machine, which is not supported; save it again as safetensors")
        with archive.open(entries["data.pkl"]) as stream:
            try:
                held = _Tensors(stream, path.name, file, entries).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, struct.error) as error:
                raise ValueError(f"{path.name} does not hold tensors by name as torch saves them: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path.name} holds a {type(held).__name__}, not tensors by name")
    if other := [name for name, value in held.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise ValueError(f"{path.name} holds {other[0]!r}, which is not a tensor with a name")
    return dict(held)


class _Tensors(pickle.Unpickler):
    """Unpickles tensors by name, and nothing else."""

    def __init__(self, stream, name: str, file: np.ndarray, entries: dict[str, zipfile.ZipInfo]):
        super().__init__(stream, encoding="utf-8")
        self.name, self.file, self.entries = name, file, entries

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _Call(self.file, name)
        raise ValueError(f"{self.name} wants to use {module}.{name}; a checkpoint may hold tensors and nothing else, so it was not loaded")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), _, int()):
                return _Storage(dtype, *self._place(f"data/{key}"))
        raise ValueError(f"{self.name} refers to {pid!r}, which is not a storage")

    def _place(self, entry: str) -> tuple[int, int]:
        """Offset and size, in bytes, of a zip entry's content. The entry's own header says how long that header is."""
        if (info := self.entries.get(entry)) is None:
            raise ValueError(f"{self.name} lacks {entry}, which a tensor in it lies on; it was probably cut short")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry} in {self.name} is compressed; torch does not write such files")
        header = self.file[info.header_offset : info.header_offset + 30].tobytes()
        name_length, extra_length = struct.unpack("<26xHH", header)
        offset = info.header_offset + 30 + name_length + extra_length
        if offset + info.file_size > self.file.size:
            raise ValueError(f"{entry} in {self.name} would end beyond the file; it was probably cut short")
        return offset, info.file_size


class _Call:
    """What the pickle may call. No __dict__ and no attributes to set, so that a pickle cannot change us for the next file."""

    __slots__ = ("_file", "_name")

    def __init__(self, file: np.ndarray, name: str):
        object.__setattr__(self, "_file", file)
        object.__setattr__(self, "_name", name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError("a checkpoint may hold tensors and nothing else")

    def __call__(self, first: Any, *rest: Any) -> Tensor:
        if self._name == "_rebuild_parameter":
            if not isinstance(first, Tensor):
                raise ValueError(f"a parameter is made of {type(first).__name__}, not of a tensor")
            return first
        if not isinstance(first, _Storage):
            raise ValueError(f"a tensor lies on {type(first).__name__}, not on a storage")
        offset, shape, strides = rest[:3]  # in elements; then requires_grad and hooks, which loading does not need
        return _view(self._file, first, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _view(file: np.ndarray, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A strided view of a storage. Raises ValueError if it would reach beyond the storage."""
    size = storage.dtype.itemsize
    if len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0:
        raise ValueError(f"a tensor of shape {shape} with strides {strides} at {offset} is not one")
    inside = file[storage.offset : storage.offset + storage.size]
    return on_disk(inside, storage.dtype, shape, offset * size, tuple(stride * size for stride in strides))
