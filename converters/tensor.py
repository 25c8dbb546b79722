"""Tensors still on disk: their shape and type are known, and one rectangle is read when somebody asks for it.

Every file format ends in `on_disk`, a view of a memory map, so reading a rectangle touches the pages it lies on and no others.
`rows`, `interleaved_rows` and `stack` are the only other shapes that a checkpoint's tensors take on their way to ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """`read(index)` fetches one rectangle: a slice of step 1 for each dimension. It may be a view of the file: copy before writing."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def on_disk(file: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], offset: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """A tensor in `file`, a memory map of bytes; offset and strides in bytes. Raises ValueError if it would leave the file."""
    try:
        view = np.ndarray(shape, dtype, buffer=file, offset=offset, strides=strides)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a {dtype} tensor of shape {shape} at byte {offset} does not fit in a file of {file.size} bytes") from error
    return Tensor(shape, dtype, lambda index: view[index])


def rows(tensor: Tensor, start: int, count: int) -> Tensor:
    """Rows [start, start + count) of `tensor`."""

    def read(index: Index) -> np.ndarray:
        lo, hi, _ = index[0].indices(count)
        return tensor.read((slice(start + lo, start + hi), *index[1:]))

    return Tensor((count, *tensor.shape[1:]), tensor.dtype, read)


def interleaved_rows(tensor: Tensor, part: int, parts: int, heads: int) -> Tensor:
    """Part `part` of a tensor whose rows are, head by head, `parts` runs of equal length."""
    run = tensor.shape[0] // (parts * heads)

    def read(index: Index) -> np.ndarray:
        lo, hi, _ = index[0].indices(heads * run)
        runs = []
        for head in range(lo // run, -(-hi // run)):
            first = (head * parts + part) * run
            runs.append((slice(first + max(lo - head * run, 0), first + min(hi - head * run, run)), *index[1:]))
        return np.concatenate([tensor.read(rectangle) for rectangle in runs])

    return Tensor((heads * run, *tensor.shape[1:]), tensor.dtype, read)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape and type along a new first axis."""

    def read(index: Index) -> np.ndarray:
        return np.stack([tensor.read(index[1:]) for tensor in tensors[index[0]]])

    return Tensor((len(tensors), *tensors[0].shape), tensors[0].dtype, read)
