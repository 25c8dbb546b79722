"""Where a module gets its arrays: from a checkpoint's lazy tensors, or from a random key. Either way sharded from birth.

A device reads (or makes) its own rectangle and no more; the host holds one rectangle at a time. Fusing projections that
share an input is decided here, at load time: one array whose rows go device by device, so that cutting it again later
needs no communication.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from tqdm import tqdm

from converters.tensor import Index, Tensor
from jaxllm import parallel
from jaxllm.parallel import Axes

Shape = tuple[int, ...]
Params = Mapping[str, jax.Array]

NORMS = frozenset({"norm", "attn_in", "attn_out", "mlp_in", "mlp_out", "q_norm", "k_norm"})
THREADS = 8  # page faults of a cold file and casts run beside each other; more gains nothing on one disk
CHUNK = 16 << 20  # bytes a thread copies at a time


class Weights:
    """Arrays of a checkpoint in `dtype`. `progress`, if given, is called with the number of bytes just read."""

    def __init__(self, tensors: Mapping[str, Tensor], mesh: Mesh, dtype, progress: Callable[[int], object] = lambda size: None):
        self.tensors, self.mesh, self.dtype, self._progress = tensors, mesh, np.dtype(dtype), progress
        self._pool = ThreadPoolExecutor(THREADS, "weights")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> Shape:
        return self.tensors[name].shape

    def __call__(self, name: str, shape: Shape, axes: Axes) -> jax.Array:
        """The tensor `name`, placed by its logical axes. Raises ValueError if its shape is not `shape`."""
        tensor = self._tensor(name, shape)
        where = parallel.sharding(self.mesh, axes, shape)
        return jax.make_array_from_callback(shape, where, lambda index: self._read([(tensor, _slices(index))]), dtype=self.dtype)

    def fused(self, names: Sequence[str], shapes: Sequence[Shape], axes: Axes) -> jax.Array:
        """Several tensors as one, along their first axis: device by device, each device's rows of each tensor in order."""
        tensors = [self._tensor(name, shape) for name, shape in zip(names, shapes, strict=True)]
        shape = _fused_shape(shapes)
        parts = parallel.shards(self.mesh, axes[0])

        def read(index) -> np.ndarray:
            index = _slices(index)
            device = index[0].indices(shape[0])[0] * parts // shape[0]
            mine = [slice(size * device // parts, size * (device + 1) // parts) for size, *_ in shapes]
            return self._read([(tensor, (rows, *index[1:])) for tensor, rows in zip(tensors, mine, strict=True)])

        where = parallel.sharding(self.mesh, axes, shape)
        return jax.make_array_from_callback(shape, where, read, dtype=self.dtype)

    def _tensor(self, name: str, shape: Shape) -> Tensor:
        if (tensor := self.tensors.get(name)) is None:
            raise ValueError(f"the checkpoint has no {name!r}")
        if tensor.shape != shape:
            raise ValueError(f"{name!r} is {tensor.shape} in the checkpoint, but the model asks for {shape}")
        return tensor

    def _read(self, parts: list[tuple[Tensor, Index]]) -> np.ndarray:
        """Rectangles one under the other, in our dtype, in memory of their own (never a view of the file)."""
        stored = [tensor.read(index) for tensor, index in parts]
        out = np.empty((sum(len(part) for part in stored), *stored[0].shape[1:]), self.dtype)
        copies, at = [], 0
        for part in stored:
            step = max(1, CHUNK // max(1, part[:1].nbytes))
            for start in range(0, len(part), step):
                rows = part[start : start + step]
                copies.append((out[at + start : at + start + len(rows)], rows))
            at += len(part)
        for size in self._pool.map(_copy, copies) if len(copies) > 1 else map(_copy, copies):
            self._progress(size)
        return out


def _slices(index: Any) -> Index:
    """JAX's index of a device's part: a tuple of slices for arrays such as ours, which have one dimension at least."""
    assert index is not None
    return index


def _copy(copy: tuple[np.ndarray, np.ndarray]) -> int:
    out, stored = copy
    out[...] = stored
    return stored.nbytes


class WeightShapes:
    """Shapes, types and places instead of arrays: all that compiling wants to know, before a single weight is read.

    `shapes` as from tensor_shapes.
    """

    def __init__(self, shapes: Mapping[str, Shape], mesh: Mesh, dtype):
        self.shapes, self.mesh, self.dtype = shapes, mesh, jnp.dtype(dtype)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> Shape:
        return self.shapes[name]

    def __call__(self, name: str, shape: Shape, axes: Axes) -> Any:
        return self._struct([name], [shape], axes)

    def fused(self, names: Sequence[str], shapes: Sequence[Shape], axes: Axes) -> Any:
        return self._struct(names, shapes, axes)

    def _struct(self, names: Sequence[str], shapes: Sequence[Shape], axes: Axes) -> jax.ShapeDtypeStruct:
        """What stands for these tensors as one array. Raises ValueError if they are not `shapes` by the config."""
        if [self.shapes[name] for name in names] != list(shapes):
            raise ValueError(f"{names} are {[self.shapes[name] for name in names]} by the config, but the model asks for {shapes}")
        shape = _fused_shape(shapes)
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=parallel.sharding(self.mesh, axes, shape))


class RandomWeights(WeightShapes):
    """Arrays nobody trained: N(0, 0.02²), norms the identity, so that activations stay in range. Made on the devices.

    `norm_bias` as in ModelConfig. The same seed gives the same network, whatever the mesh.
    """

    def __init__(self, shapes: Mapping[str, Shape], mesh: Mesh, dtype, seed: int = 0, *, norm_bias: float = 0.0):
        super().__init__(shapes, mesh, dtype)
        self._one, self._key = 1.0 - norm_bias, jax.random.key(seed)

    def __call__(self, name: str, shape: Shape, axes: Axes) -> jax.Array:
        where = self._struct([name], [shape], axes).sharding
        *_, part, kind = name.split(".")
        if part in NORMS:
            return _constant(shape, self.dtype, where)(self._one if kind == "weight" else 0.0)
        return _normal((shape,), 1, self.dtype, where)([self._key_of(name)])

    def fused(self, names: Sequence[str], shapes: Sequence[Shape], axes: Axes) -> jax.Array:
        where = self._struct(names, shapes, axes).sharding
        keys = [self._key_of(name) for name in names]
        return _normal(tuple(shapes), parallel.shards(self.mesh, axes[0]), self.dtype, where)(keys)

    def _key_of(self, name: str) -> jax.Array:
        return jax.random.fold_in(self._key, zlib.crc32(name.encode()))


@lru_cache
def _normal(shapes: tuple[Shape, ...], devices: int, dtype: jnp.dtype, where: Sharding):
    """From a key a shape: those arrays, fused device by device."""

    def make(keys: list[jax.Array]) -> jax.Array:
        parts = [jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype) for key, shape in zip(keys, shapes, strict=True)]
        return parts[0] if len(parts) == 1 else _device_by_device(parts, devices)

    return jax.jit(make, out_shardings=where)


@lru_cache
def _constant(shape: Shape, dtype: jnp.dtype, where: Sharding):
    return jax.jit(lambda value: jnp.full(shape, value, dtype), out_shardings=where)


def _fused_shape(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _device_by_device(parts: Sequence[jax.Array], devices: int) -> jax.Array:
    by_device = [part.reshape(devices, -1, *part.shape[1:]) for part in parts]
    return jnp.concatenate(by_device, axis=1).reshape(_fused_shape([part.shape for part in parts]))


@dataclass(frozen=True)
class Join:
    """How arrays of `shapes` become one, as `Weights.fused` makes it of tensors. Differentiable."""

    shapes: tuple[Shape, ...]
    axes: Axes
    mesh: Mesh

    def __call__(self, parts: Sequence[jax.Array]) -> jax.Array:
        return _device_by_device(parts, parallel.shards(self.mesh, self.axes[0]))

    @property
    def sharding(self) -> Sharding:
        """Where the whole lies."""
        return parallel.sharding(self.mesh, self.axes, _fused_shape(self.shapes))

    def parts(self, dtype) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(s, jnp.dtype(dtype), sharding=parallel.sharding(self.mesh, self.axes, s)) for s in self.shapes]


class Given:
    """Arrays that are there already, under our names, nothing fused. `compiled`, if given, has an executable for each way to join them.

    Traced arrays are arrays too: so the decoder becomes a function of its parameters, and is differentiated by them.
    """

    def __init__(self, params: Params, mesh: Mesh, compiled: Mapping[Join, Callable] | None = None):
        self.params, self.mesh, self._compiled = params, mesh, compiled

    def __contains__(self, name: str) -> bool:
        return name in self.params

    def shape(self, name: str) -> Shape:
        return self.params[name].shape

    def __call__(self, name: str, shape: Shape, axes: Axes) -> jax.Array:
        if name not in self.params or self.params[name].shape != shape:
            have = self.params[name].shape if name in self.params else "absent"
            raise ValueError(f"{name!r} is {have} among the parameters, but the model asks for {shape}")
        return self.params[name]

    def fused(self, names: Sequence[str], shapes: Sequence[Shape], axes: Axes) -> jax.Array:
        parts = [self(name, shape, axes) for name, shape in zip(names, shapes, strict=True)]
        if len(parts) == 1:
            return parts[0]
        how = Join(tuple(shapes), axes, self.mesh)
        return (how if self._compiled is None else self._compiled[how])(parts)


class Once(Given):
    """Given arrays that are let go as they are asked for, so that a fused copy and all its parts are never there together."""

    def __init__(self, params: dict[str, jax.Array], mesh: Mesh, compiled: Mapping[Join, Callable]):
        super().__init__(params, mesh, compiled)
        self._left = params

    def __call__(self, name: str, shape: Shape, axes: Axes) -> jax.Array:
        array = super().__call__(name, shape, axes)
        del self._left[name]
        return array


@contextlib.contextmanager
def loading_bar(tensors: Mapping[str, Tensor]) -> Iterator[Callable[[int], object]]:
    """A progress bar with GB/s on stderr; what it gives is for `Weights(progress=...)`."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True) as bar:
        yield bar.update
