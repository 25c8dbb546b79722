"""Linear layers of one row, from Ampere on, in Pallas-Triton: a program multiplies some output features, reading their weights once.

One row is bound by the weights' bytes, and would waste fifteen sixteenths of the tensor cores: it is multiplied and added without them.
Memory brings an H200's multiprocessor nine weights a clock, for each of which it then has 14 instructions, and conversion and product take
two. So that the rest is few as well, the row is read and normed once for several features, and no thread waits for another's part of it.
What surrounds a product happens in its kernel. The norm of its input needs no pass of its own: the products are of x times the norm's
weight, the squares of x are summed beside them, and their mean divides what comes out. The rotary turn takes a feature with the one half a
head away, so the program of one has the other as well.

F output features of a program, or pairs of them, S inputs of a turn, Q query heads, K kv heads, H features a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.launch import launch_next

PACK = 8  # inputs of a turn that a thread has: 16 bytes


@dataclass(frozen=True)
class Tile:
    """A program's part of the work.

    together: features of a run. With several runs the row stays in registers; with one it comes along with the weights, turn by turn.
    ahead: the weights of a run, or of a turn, are asked for a run or a turn early, and wait in registers. early: from Hopper on, the next
    kernel may be launched as soon as all programs have read their weights; it waits for this one's end before it reads anything.
    """

    features: int
    together: int
    num_warps: int
    ahead: bool = False
    early: bool = False

    @property
    def inputs(self) -> int:
        """Of a turn: as many as threads, of which each has 16 bytes of them, so that the row and its weights lie in the same threads."""
        return 32 * PACK * self.num_warps


def linear(
    x_1D: Array,
    weight_FD: Array,
    *,
    tile: Tile,
    norm_D: Array | None = None,
    residual_1F: Array | None = None,
    act: Callable[[Array], Array] | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    dtype: Any = None,
    interpret: bool = False,
) -> Array:
    """[1, F], or with `act` [1, F / 2]: the second half of the products gated by `act` of the first. dtype: of what comes out, else x's.

    norm_D: x is taken over its root mean square (plus eps), times the norm plus offset. residual_1F is added to what comes out.
    """
    features = weight_FD.shape[0] // (1 if act is None else 2)
    extras = {name: x for name, x in (("norm", norm_D), ("residual", residual_1F)) if x is not None}
    return pl.pallas_call(
        partial(_kernel, tile=tile, act=act, eps=eps, offset=offset, names=tuple(extras), interpret=interpret),
        grid=(pl.cdiv(features, tile.features),),
        out_shape=jax.ShapeDtypeStruct((1, features), dtype or x_1D.dtype),
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=1),
        interpret=interpret,
        name="linear_one_row",
    )(x_1D, weight_FD, *extras.values())


def project(
    x_1D: Array,
    weight_FD: Array,
    k_pages: Array,
    v_pages: Array,
    slot_1: Array,
    *,
    tile: Tile,
    heads: int,
    cos_sin: tuple[Array, Array],
    norm_D: Array | None = None,
    bias_F: Array | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """`linear`, then what `turn_and_write` does with it: (q [1, Q, H], and the pages with K and V). Turned are all features of a head."""
    _, kv_heads, _, head_dim = k_pages.shape
    extras = {"cos": cos_sin[0].reshape(-1), "sin": cos_sin[1].reshape(-1), "norm": norm_D, "bias": bias_F}
    extras = {name: x for name, x in extras.items() if x is not None}
    count = 3 + len(extras)
    pairs = replace(tile, features=max(1, tile.features // 2), together=max(1, tile.together // 2))
    shapes = [jax.ShapeDtypeStruct((1, heads, head_dim), k_pages.dtype)]
    shapes += [jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_pages, v_pages)]
    made = pl.pallas_call(
        partial(_project_kernel, tile=pairs, heads=heads, eps=eps, offset=offset, names=tuple(extras), interpret=interpret),
        grid=(pl.cdiv((heads + 2 * kv_heads) * head_dim // 2, pairs.features),),
        out_shape=shapes,
        input_output_aliases={count: 1, count + 1: 2},
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=1),
        interpret=interpret,
        name="project_one_row",
    )(x_1D, weight_FD, slot_1, *extras.values(), k_pages, v_pages)
    return made[0], made[1], made[2]


def _project_kernel(x_ref, weight_ref, slot_ref, *refs, tile, heads, eps, offset, names, interpret):
    extras, (q_ref, k_pages_ref, v_pages_ref) = dict(zip(names, refs, strict=False)), refs[-3:]
    _, kv_heads, page_size, head_dim = k_pages_ref.shape
    half = head_dim // 2

    def places(pair_F):
        head_F, place_F = lax.div(pair_F, jnp.int32(half)), lax.rem(pair_F, jnp.int32(half))
        return head_F, place_F, [head_F * head_dim + place_F, head_F * head_dim + place_F + half]

    def finish(pair_F, live_F, products):
        head_F, place_F, features = places(pair_F)
        a_F, b_F = (product.astype(x_ref.dtype).astype(jnp.float32) for product in products)  # rounded, as when a kernel lies between
        if "bias" in extras:
            a_F, b_F = (x_F + _load(extras["bias"].at[f], live_F).astype(jnp.float32) for x_F, f in zip((a_F, b_F), features, strict=True))
        cos_F, sin_F = (_load(extras[name].at[place_F], live_F) for name in ("cos", "sin"))
        is_q, is_v = head_F < heads, head_F >= heads + kv_heads
        turned = jnp.where(is_v, a_F, a_F * cos_F - b_F * sin_F), jnp.where(is_v, b_F, b_F * cos_F + a_F * sin_F)
        slot = plt.load(slot_ref.at[jnp.int32(0)])
        page, token = lax.div(slot, jnp.int32(page_size)), lax.rem(slot, jnp.int32(page_size))
        for x_F, feature_F in zip(turned, (place_F, place_F + half), strict=True):
            x_F = x_F.astype(q_ref.dtype)
            plt.store(q_ref.at[0, head_F, feature_F], x_F, mask=_and(is_q, live_F))
            plt.store(k_pages_ref.at[page, head_F - heads, token, feature_F], x_F, mask=_and(~is_q & ~is_v, live_F))
            plt.store(v_pages_ref.at[page, head_F - heads - kv_heads, token, feature_F], x_F, mask=_and(is_v, live_F))

    row = _Row(x_ref, extras.get("norm"), tile, eps, offset, interpret)
    _multiply(row, weight_ref, (heads + 2 * kv_heads) * half, lambda pair_F: places(pair_F)[2], finish)


def _kernel(x_ref, weight_ref, *refs, tile, act, eps, offset, names, interpret):
    extras, o_ref = dict(zip(names, refs, strict=False)), refs[-1]
    features, dtype = o_ref.shape[1], o_ref.dtype

    def finish(feature_F, live_F, products):
        out_F = products[0].astype(dtype)
        if act is not None:  # rounded between, as the plain layers round
            out_F = act(out_F.astype(jnp.float32)).astype(dtype) * products[1].astype(dtype)
        if "residual" in extras:
            residual_F = _load(extras["residual"].at[0, feature_F], live_F).astype(jnp.float32)
            out_F = (out_F.astype(jnp.float32) + residual_F).astype(dtype)
        plt.store(o_ref.at[0, feature_F], out_F, mask=live_F)

    row = _Row(x_ref, extras.get("norm"), tile, eps, offset, interpret)
    _multiply(row, weight_ref, features, lambda feature_F: [feature_F] if act is None else [feature_F, features + feature_F], finish)


@dataclass(frozen=True)
class _Row:
    """What is multiplied: the row, which comes by turns, and how."""

    x_ref: Any
    norm_ref: Any
    tile: Tile
    eps: float
    offset: float
    interpret: bool

    @property
    def turns(self) -> int:
        return pl.cdiv(self.x_ref.shape[1], self.tile.inputs)

    def inputs(self, i) -> tuple[Array, Array | None]:
        """Which inputs a turn takes, and which of them exist."""
        input_S = i * self.tile.inputs + jnp.arange(self.tile.inputs)
        return input_S, _live(input_S, self.x_ref.shape[1], self.tile.inputs)

    def take(self, i, square_S) -> tuple[Array, Array]:
        """A turn's inputs times the norm, float32, and the sums of squares with theirs."""
        input_S, live_S = self.inputs(i)
        x_S = _load(self.x_ref.at[0, input_S], live_S).astype(jnp.float32)
        if self.norm_ref is None:
            return x_S, square_S
        norm_S = _load(self.norm_ref.at[input_S], live_S).astype(jnp.float32)
        normed_S = x_S * (norm_S + self.offset if self.offset else norm_S)
        return normed_S.astype(self.x_ref.dtype).astype(jnp.float32), self.add_product(square_S, x_S, x_S)

    def scaled(self, product, square_S):
        """A product over the root mean square, if there is a norm."""
        return product if self.norm_ref is None else product * lax.rsqrt(jnp.sum(square_S) / self.x_ref.shape[1] + self.eps)

    def add_product(self, total, a, b):
        """total + a * b, rounded once: left to itself the compiler multiplies, rounds and adds, in two instructions."""
        if self.interpret:
            return total + a * b
        result = jax.ShapeDtypeStruct(total.shape, jnp.float32)
        asm, constraints = "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"
        return plt.elementwise_inline_asm(asm, args=[a, b, total], constraints=constraints, pack=1, result_shape_dtypes=[result])[0]


def _multiply(row: _Row, weight_ref, size: int, halves: Callable[[Array], list[Array]], finish: Callable[..., None]) -> None:
    """A program's share of `size` features, or pairs of them: their products with the row, float32, go to `finish`, a run at a time.

    halves: the rows of the weights that belong to some features.
    """
    tile, runs = row.tile, row.tile.features // row.tile.together
    begin, nothing_S = pl.program_id(0) * tile.features, jnp.zeros((tile.inputs,), jnp.float32)

    def run(i):
        feature_F = begin + i * tile.together + jnp.arange(tile.together)
        return feature_F, _live(feature_F, size, tile.features)

    def fetched(i, turn):
        (feature_F, live_F), (input_S, live_S) = run(i), row.inputs(turn)
        live_FS = _both(live_F, live_S, (tile.together, tile.inputs))
        return [_load(weight_ref.at[half_F[:, None], input_S[None, :]], live_FS) for half_F in halves(feature_F)]

    def multiplied(sums, x_S, weights):
        x_FS = jnp.broadcast_to(x_S[None, :], (tile.together, tile.inputs))
        return [row.add_product(total, w_FS.astype(jnp.float32), x_FS) for total, w_FS in zip(sums, weights, strict=True)]

    nothing = [jnp.zeros((tile.together, tile.inputs), jnp.float32)] * len(halves(run(0)[0]))

    def finished(i, sums, square_S):
        if tile.early and not row.interpret:
            sums = [*sums[:-1], launch_next(sums[-1], i == runs - 1, pack=PACK)]
        finish(*run(i), [row.scaled(jnp.sum(total, axis=1), square_S) for total in sums])

    if runs == 1:  # the row comes along, turn by turn

        def turn(i, state, weights):
            sums, square_S = state
            x_S, square_S = row.take(i, square_S)
            return multiplied(sums, x_S, weights), square_S

        finished(0, *_repeated(row.turns, turn, (nothing, nothing_S), partial(fetched, 0), tile.ahead))
        return

    turns, xs, square_S = range(row.turns), [], nothing_S
    for i in turns:
        x_S, square_S = row.take(i, square_S)
        xs.append(x_S)

    def one(i, _, weights):
        sums = nothing
        for x_S, w in zip(xs, weights, strict=True):
            sums = multiplied(sums, x_S, w)
        finished(i, sums, square_S)
        return ()

    _repeated(runs, one, (), lambda i: [fetched(i, turn) for turn in turns], tile.ahead)


def _repeated(count: int, turn: Callable[..., Any], state: Any, fetched: Callable[[Any], Any], ahead: bool) -> Any:
    """The state after so many turns, of which each has what is `fetched` for it. ahead: a turn early; nothing comes after the last."""
    if not ahead:
        return lax.fori_loop(0, count, lambda i, state: turn(i, state, fetched(i)), state)

    def both(i, carried):
        following = fetched(i + 1)
        return turn(i, *carried), following

    return turn(count - 1, *lax.fori_loop(0, count - 1, both, (state, fetched(0))))


def _live(index, size: int, step: int):
    """Which of a tile's indices exist; None if all of all tiles do."""
    return None if size % step == 0 else index < size


def _and(mask_F, live_F):
    return mask_F if live_F is None else mask_F & live_F


def _both(live_F, live_S, shape):
    if live_F is None and live_S is None:
        return None
    found = jnp.full(shape, True) if live_F is None else jnp.broadcast_to(live_F[:, None], shape)
    return found if live_S is None else found & live_S[None, :]


def _load(ref, live):
    return plt.load(ref) if live is None else plt.load(ref, mask=live, other=0.0)
