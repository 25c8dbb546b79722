"""The linear layers of a step, with what stands around them: norms, biases, activation, residual, rotary turn and KV write.

A decode step is bound by the bytes of its weights and by the number of its kernels. Two ways share one set of verbs, so that a decoder
layer reads the same in both; `linears_for` says which one a step takes, if any, and there is no third place where that is decided.

- `OneRow`: a norm is part of the product it feeds, and a residual of the product that it is added to.
- `ManyRows` (Hopper): products leave parts; whoever reads a product sums them, which for the residual stream is also the next norm. From
  `WIDE_ROWS` on, a product leaves one part, and what its padding would hold is not computed. A product of fewer rows that XLA's kernels are
  better at is theirs, and leaves one part.

N rows, D model, F features of a product, P parts.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import matmul_one_row, matmul_sm90, matmul_sm90_wide
from pallas_kernels.blocks import file_name
from pallas_kernels.kv_write import turn_and_write
from pallas_kernels.matmul_join import join
from pallas_kernels.work import Rows, live, live_rows, static


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OneRow:
    """Each method is one kernel, but `norm`, which is none. kind: of the device, as JAX names it."""

    kind: str = static()
    interpret: bool = static(default=False)

    def norm(self, stream: Stream, norm: Norm) -> tuple[Stream, Any]:
        """The stream, and it normed, for a product to read."""
        return stream, (stream.h_ND, norm)

    def product(self, normed: Any, weight_FD: Array) -> Array:
        """[P, N, F], to be summed over P."""
        return self._normed(normed, weight_FD)[None]

    def heads(
        self, normed: Any, weight_FD: Array, k_pages: Array, v_pages: Array, slot_N: Array, **options: Any
    ) -> tuple[Array, Array, Array]:
        """(q [N, Q, H], and the pages with K and V): `turn_and_write`, with its options, of a product."""
        h_ND, norm = normed
        cos_sin, plain = options.get("cos_sin"), options.get("q_norm_H") is None and options.get("k_norm_H") is None
        whole = plain and cos_sin is not None and 2 * cos_sin[0].shape[-1] == k_pages.shape[-1] and k_pages.dtype == h_ND.dtype
        if not whole:
            return turn_and_write(k_pages, v_pages, self.product(normed, weight_FD), slot_N, **options)
        kept = dict(heads=options["heads"], bias_F=options.get("bias_F"), cos_sin=cos_sin, interpret=self.interpret)
        kept |= dict(tile=one_row_tile(self.kind, _product(weight_FD, False)), norm_D=norm.weight_D, eps=norm.eps, offset=norm.offset)
        return matmul_one_row.project(h_ND, weight_FD, k_pages, v_pages, slot_N, **kept)

    def gated(self, normed: Any, weight_FD: Array, act: Callable[[Array], Array]) -> Array:
        """[N, F / 2]: the products with the second half of the weights, times `act` of those with the first."""
        return self._normed(normed, weight_FD, act=act)

    def add(self, stream: Stream, x_NF: Array, weight_DF: Array) -> Stream:
        """The stream with a product added."""
        return Stream(self._linear(x_NF, weight_DF, residual_1F=stream.h_ND))

    def covers(self, rows: int, products: Iterable[Product]) -> bool:
        """Are all of these products a kernel's of ours?"""
        return True

    def finish(self, stream: Stream, norm: Norm) -> Array:
        """The stream normed, as an array."""
        return join(*stream, norm.weight_D, eps=norm.eps, offset=norm.offset, interpret=self.interpret)[1]

    def _normed(self, normed: tuple[Array, Norm], weight_FD: Array, **options: Any) -> Array:
        h_ND, norm = normed
        return self._linear(h_ND, weight_FD, norm_D=norm.weight_D, eps=norm.eps, offset=norm.offset, **options)

    def _linear(self, x_ND: Array, weight_FD: Array, **options: Any) -> Array:
        tile = one_row_tile(self.kind, _product(weight_FD, "act" in options))
        return matmul_one_row.linear(x_ND, weight_FD, tile=tile, interpret=self.interpret, **options)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ManyRows:
    """The same verbs; sums are left to `norm` and `finish`.

    kind: of the device, as JAX names it. cores: its multiprocessors. trial: as for `many_rows_tile`. live_3: `work.live`: lanes that hold
    no token are left as they please; None if every lane is to be computed.
    """

    kind: str = static()
    cores: int = static()
    interpret: bool = static(default=False)
    trial: bool = static(default=False)
    live_3: Array | None = None

    def norm(self, stream: Stream, norm: Norm) -> tuple[Stream, Any]:
        how: dict[str, Any] = dict(eps=norm.eps, offset=norm.offset, live_3=self.live_3, interpret=self.interpret)
        h_ND, normed_ND = join(*stream, norm.weight_D, **how)
        return Stream(h_ND), normed_ND

    def product(self, normed: Any, weight_FD: Array) -> Array:
        made = self._ours(normed, weight_FD)
        return _plain(normed, weight_FD)[None] if made is None else made

    def heads(
        self, normed: Any, weight_FD: Array, k_pages: Array, v_pages: Array, slot_N: Array, **options: Any
    ) -> tuple[Array, Array, Array]:
        return turn_and_write(k_pages, v_pages, self.product(normed, weight_FD), slot_N, live_3=self.live_3, **options)

    def gated(self, normed: Any, weight_FD: Array, act: Callable[[Array], Array]) -> Array:
        if (made := self._ours(normed, weight_FD, act)) is not None:
            return made[0]
        gate_NF, up_NF = jnp.split(_plain(normed, weight_FD), 2, axis=1)
        return act(gate_NF) * up_NF

    def add(self, stream: Stream, x_NF: Array, weight_DF: Array) -> Stream:
        assert stream.parts_PND is None, "a norm comes between two sums"
        return Stream(stream.h_ND, self.product(x_NF, weight_DF))

    def covers(self, rows: int, products: Iterable[Product]) -> bool:
        return all(many_rows_tile(self.kind, rows, product, cores=self.cores, trial=self.trial) is not None for product in products)

    def finish(self, stream: Stream, norm: Norm) -> Array:
        return self.norm(stream, norm)[1]

    def _ours(self, x_ND: Array, weight_FD: Array, act: Callable[[Array], Array] | None = None) -> Array | None:
        """[P, N, F] by a kernel of ours; None: by XLA's."""
        tile = many_rows_tile(self.kind, len(x_ND), _product(weight_FD, act is not None), cores=self.cores, trial=self.trial)
        if tile is None:
            return None
        if isinstance(tile, matmul_sm90.Tile):
            return matmul_sm90.linear(x_ND, weight_FD, tile=tile, act=act, interpret=self.interpret)
        live_3 = jnp.full(3, len(x_ND), jnp.int32) if self.live_3 is None else self.live_3
        return matmul_sm90_wide.linear(x_ND, weight_FD, live_3, tile=tile, workers=self.cores, act=act, interpret=self.interpret)[None]


Linears = OneRow | ManyRows
WIDE_ROWS = 768  # from here on a product is so many tiles that leaving the empty ones out pays; with fewer, cuBLAS is often better
# Rows that have tiles of their own, and those with which these were tried.
MEASURED = {2: 8, 4: 8, 8: 8, 16: 8, 32: 64, 64: 64, 128: 128, 256: 256, 384: 384, 512: 512}


def linears_for(device: Any, rows: int, dtype: Any, *, alone: bool = True, owners: Rows | None = None) -> Linears | None:
    """How a step of `rows` rows runs its layers on a device; None: by plain products, and XLA does the rest.

    alone: it makes whole products, not parts of sums over several devices, to which no residual could be added. owners: of its lanes; those
    that have none need not be computed.
    """
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if capability is None or jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return None
    if rows == 1 and alone and float(capability) >= 8:
        return OneRow(device.device_kind)
    if capability != "9.0":
        return None
    return ManyRows(device.device_kind, device.core_count, live_3=live(owners) if owners is not None and rows >= WIDE_ROWS else None)


def head_for(device: Any, rows: int, dtype: Any, owners: Rows | None = None) -> Callable[[Array, Array], Array] | None:
    """How a device multiplies [N, D] with the head's weights [V, D] to float32 logits; None: by a plain product.

    Of one row XLA makes, without Triton's kernels, a sum over a copy of the weights in float32. owners: of the N rows; of `WIDE_ROWS` and
    more, logits of those that have no token need not be computed.
    """
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if capability is None or float(capability) < 8 or jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return None
    if rows == 1:
        return partial(_one_row_s_head, device.device_kind)
    if rows < WIDE_ROWS or owners is None or capability != "9.0":
        return None
    return partial(_live_rows_head, device.device_kind, device.core_count, live_rows(owners))


def _one_row_s_head(kind: str, x_1D: Array, weight_VD: Array) -> Array:
    return matmul_one_row.linear(x_1D, weight_VD, tile=one_row_tile(kind, _product(weight_VD, False)), dtype=jnp.float32)


def _live_rows_head(kind: str, cores: int, live_3: Array, x_ND: Array, weight_VD: Array) -> Array:
    tile = many_rows_tile(kind, len(x_ND), _product(weight_VD, False), cores=cores)
    if not isinstance(tile, matmul_sm90_wide.Tile):
        return jnp.einsum("nd,vd->nv", x_ND, weight_VD, preferred_element_type=jnp.float32)
    return matmul_sm90_wide.linear(x_ND, weight_VD, live_3, tile=tile, workers=cores, dtype=jnp.float32)


def _plain(x_ND: Array, weight_FD: Array) -> Array:
    return jnp.einsum("nd,fd->nf", x_ND, weight_FD)


def _product(weight_FD: Array, gated: bool) -> Product:
    return Product(weight_FD.shape[0] // (2 if gated else 1), weight_FD.shape[1], gated)


def one_row_tile(kind: str, product: Product) -> matmul_one_row.Tile:
    """The tile that was the fastest on this kind of device; else one of few that were good for several products of an H200."""
    if tile := _measured(kind).get((1, product)):
        return matmul_one_row.Tile(*tile[:3], *map(bool, tile[3:]))
    if product.gated and product.inputs <= 8192:  # more inputs than that would not stay in registers
        return matmul_one_row.Tile(4, 2, 1, True) if product.inputs <= 1024 else matmul_one_row.Tile(4, 2, 8)
    if product.features > 2**15 or product.inputs > 4096:
        return matmul_one_row.Tile(1, 1, 1)
    return matmul_one_row.Tile(8, 2, 4) if product.features > 4096 else matmul_one_row.Tile(2, 2, 4)


def many_rows_tile(
    kind: str, rows: int, product: Product, *, cores: int, trial: bool = False
) -> matmul_sm90.Tile | matmul_sm90_wide.Tile | None:
    """The tile that was the fastest on this kind of device; None if XLA's kernels were faster there, or nobody measured.

    From `WIDE_ROWS` on every product that the kernel can take has one, so wide that all of `cores` multiprocessors have work. trial: also
    tiles whose results no GPU's float32 has been compared with yet. No engine asks for those.
    """
    if rows >= WIDE_ROWS:
        fits = matmul_sm90_wide.fits(rows, product.features, product.inputs)
        return matmul_sm90_wide.tile_for(rows, product.features, product.gated, cores) if fits else None
    if (tile := _measured(kind, trial).get((MEASURED.get(rows, 0), product))) is None:
        return None
    return matmul_sm90_wide.Tile(*tile) if len(tile) == 2 else matmul_sm90.Tile(*tile)


@cache
def _measured(kind: str, trial: bool = False) -> dict[tuple[int, Product], list[Any]]:
    """By rows (1, or of `MEASURED`) and product, the numbers of the tile that was the fastest on this kind of device."""
    path = files("pallas_kernels") / "tuning" / "linear" / file_name(kind)
    if not path.is_file():
        return {}
    rows = [row for row in json.loads(path.read_text())["rows"] if trial or row["compared"]]
    return {(row["rows"], Product(row["features"], row["inputs"], row["gated"])): row["tile"] for row in rows}
