"""The linear layers of a decode step, with what stands around them: norms, biases, activation, residual, rotary turn and KV write.

Such a step is bound by the bytes of its weights and by the number of its kernels. Two ways share one set of verbs, so that a decoder layer
reads the same in both; `linears_for` says which one a step takes, if any, and there is no third place where that is decided.

- `OneRow`: a norm is part of the product it feeds, and a residual of the product that it is added to.
- `ManyRows` (Hopper): products leave parts; whoever reads a product sums them, which for the residual stream is also the next norm. A
  product that XLA's kernels are better at is theirs, and leaves one part.

N rows, D model, F features of a product, P parts.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels import matmul_one_row, matmul_sm90
from pallas_kernels.blocks import file_name
from pallas_kernels.matmul_join import join

CORES = 132  # of an H200


class Norm(NamedTuple):
    """x over its root mean square (plus eps, before the root) times (weight + offset)."""

    weight_D: Array
    eps: float
    offset: float


class Stream(NamedTuple):
    """The residual stream: h plus the parts that nobody has added yet, [N, D] and [P, N, D] float32."""

    h_ND: Array
    parts_PND: Array | None = None


class Product(NamedTuple):
    """The shape of a layer's product: weight [features, inputs]; of a gated one, [2 * features, inputs]."""

    features: int
    inputs: int
    gated: bool = False


@dataclass(frozen=True)
class OneRow:
    """Each method is one kernel, but `norm`, which is none. kind: of the device, as JAX names it."""

    kind: str
    interpret: bool = False

    def norm(self, stream: Stream, norm: Norm) -> tuple[Stream, Any]:
        """The stream, and it normed, for a product to read."""
        return stream, (stream.h_ND, norm)

    def product(self, normed: Any, weight_FD: Array) -> Array:
        """[P, N, F], to be summed over P."""
        return self._normed(normed, weight_FD)[None]

    def gated(self, normed: Any, weight_FD: Array, act: Callable[[Array], Array]) -> Array:
        """[N, F / 2]: the products with the second half of the weights, times `act` of those with the first."""
        return self._normed(normed, weight_FD, act=act)

    def add(self, stream: Stream, x_NF: Array, weight_DF: Array) -> Stream:
        """The stream with a product added."""
        return Stream(self._linear(x_NF, weight_DF, residual_1F=stream.h_ND))

    def finish(self, stream: Stream, norm: Norm) -> Array:
        """The stream normed, as an array."""
        return join(*stream, norm.weight_D, eps=norm.eps, offset=norm.offset, interpret=self.interpret)[1]

    def _normed(self, normed: tuple[Array, Norm], weight_FD: Array, **options: Any) -> Array:
        h_ND, norm = normed
        return self._linear(h_ND, weight_FD, norm_D=norm.weight_D, eps=norm.eps, offset=norm.offset, **options)

    def _linear(self, x_ND: Array, weight_FD: Array, **options: Any) -> Array:
        tile = one_row_tile(self.kind, _product(weight_FD, "act" in options))
        return matmul_one_row.linear(x_ND, weight_FD, tile=tile, interpret=self.interpret, **options)


@dataclass(frozen=True)
class ManyRows:
    """The same verbs; sums are left to `norm` and `finish`. kind: of the device, as JAX names it."""

    kind: str
    interpret: bool = False

    def norm(self, stream: Stream, norm: Norm) -> tuple[Stream, Any]:
        h_ND, normed_ND = join(*stream, norm.weight_D, eps=norm.eps, offset=norm.offset, interpret=self.interpret)
        return Stream(h_ND), normed_ND

    def product(self, normed: Any, weight_FD: Array) -> Array:
        if (tile := self._tile(normed, weight_FD)) is None:
            return _plain(normed, weight_FD)[None]
        return matmul_sm90.linear(normed, weight_FD, tile=tile, interpret=self.interpret)

    def gated(self, normed: Any, weight_FD: Array, act: Callable[[Array], Array]) -> Array:
        if (tile := self._tile(normed, weight_FD, gated=True)) is None:
            gate_NF, up_NF = jnp.split(_plain(normed, weight_FD), 2, axis=1)
            return act(gate_NF) * up_NF
        return matmul_sm90.linear(normed, weight_FD, tile=tile, act=act, interpret=self.interpret)[0]

    def add(self, stream: Stream, x_NF: Array, weight_DF: Array) -> Stream:
        assert stream.parts_PND is None, "a norm comes between two sums"
        return Stream(stream.h_ND, self.product(x_NF, weight_DF))

    def finish(self, stream: Stream, norm: Norm) -> Array:
        return self.norm(stream, norm)[1]

    def _tile(self, x_ND: Array, weight_FD: Array, gated: bool = False) -> matmul_sm90.Tile | None:
        return many_rows_tile(self.kind, len(x_ND), _product(weight_FD, gated))


Linears = OneRow | ManyRows
MOST = 1024  # rows: beyond them are prompts, whose products are so long that nothing around them matters


def linears_for(device: Any, rows: int, dtype: Any) -> Linears | None:
    """How a step of `rows` rows on one device runs its layers; None: by plain products, and XLA does the rest."""
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if capability is None or jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return None
    if rows == 1 and float(capability) >= 8:
        return OneRow(device.device_kind)
    return ManyRows(device.device_kind) if capability == "9.0" and rows <= MOST else None


WIDE = 2**23  # inputs * features: between Qwen2.5-0.5B's widest layer and 3B's; measured at 256 rows on an H200


def _plain(x_ND: Array, weight_FD: Array) -> Array:
    return jnp.einsum("nd,fd->nf", x_ND, weight_FD)


def _product(weight_FD: Array, gated: bool) -> Product:
    return Product(weight_FD.shape[0] // (2 if gated else 1), weight_FD.shape[1], gated)


def one_row_tile(kind: str, product: Product) -> matmul_one_row.Tile:
    """The tile that was the fastest on this kind of device; else one of few that were good for several products of an H200."""
    if tile := _measured(kind).get((1, product)):
        return matmul_one_row.Tile(*tile)
    if product.gated:
        return matmul_one_row.Tile(4, 256, 2) if product.inputs <= 1024 else matmul_one_row.Tile(4, 512, 4)
    if product.features > 4096:
        return matmul_one_row.Tile(16, 512, 8)
    return matmul_one_row.Tile(2 if product.features * product.inputs <= 2**22 else 4, 1024, 4)


def many_rows_tile(kind: str, rows: int, product: Product) -> matmul_sm90.Tile | None:
    """The tile that was the fastest on this kind of device; else one that keeps most multiprocessors reading.

    None if no tile fits, or if XLA's kernels are the better ones: from 256 rows on, wide layers are bound by arithmetic.
    """
    if rows not in matmul_sm90.ROWS or (rows >= 256 and product.inputs * product.features > WIDE):
        return None
    lines = 8 if rows <= 16 else 64 if rows <= 128 else 256
    if tile := _measured(kind).get((lines, product)):
        return matmul_sm90.Tile(*tile)
    inputs, best = 128 if product.inputs % 128 == 0 else 64, None
    if product.inputs % inputs:
        return None
    widest = 64 if rows > 64 and product.gated else 128
    for features in (f for f in range(8, widest + 1, 8) if product.features % f == 0):
        for parts in (1,) if product.gated else (1, 2, 4, 8):
            if product.inputs % (inputs * parts) == 0:
                tile = _tile(rows, product, features, inputs, parts)
                cost = _cost(rows, product, tile)
                best = min(best or (cost, 0, tile), (cost, features, tile), key=lambda found: found[0])
    return best[2] if best else None


def _tile(rows: int, product: Product, features: int, inputs: int, parts: int) -> matmul_sm90.Tile:
    shared = rows >= 64 and product.features // features % 2 == 0
    return matmul_sm90.Tile(features, 64 if rows >= 128 or features * (1 + product.gated) > 128 else inputs, parts, 1 + shared)


def _cost(rows: int, product: Product, tile: matmul_sm90.Tile) -> float:
    """Microseconds, roughly: a block takes 2 to start, reads 90 bytes a nanosecond, the device 4200; float32 parts are written and read."""
    blocks, lines = product.features // tile.features * tile.parts, max(rows, 8)
    block = (tile.features * (1 + product.gated) + lines) * product.inputs / tile.parts * 2
    weights = product.features * (1 + product.gated) * product.inputs * 2
    parts = 0 if tile.parts == 1 else tile.parts * rows * product.features * 8 / 4e6
    return max(-(-blocks // CORES) * (block / 90e3 + 2), weights / 4.2e6) + parts + product.inputs / tile.parts / tile.inputs * 0.05


@cache
def _measured(kind: str) -> dict[tuple[int, Product], list[int]]:
    """By rows (1; 8: up to 16, 64: up to 128, 256) and product, the tile that was the fastest on this kind of device (bench/linears.py)."""
    path = files("pallas_kernels") / "tuning" / "linear" / file_name(kind)
    if not path.is_file():
        return {}
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        product = Product(row["features"], row["inputs"], row["gated"])
        found[row["rows"], product] = row["tile"]
    return found
