"""Linear layers of one row, from Ampere on, in Pallas-Triton: a program multiplies some output features, reading their weights once.

One row is bound by the weights' bytes, and would waste fifteen sixteenths of the tensor cores: it is multiplied and added without them.
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


@dataclass(frozen=True)
class Tile:
    """A program's part of the work. ahead: a turn's weights are asked for a turn early, and wait in registers."""

    features: int
    inputs: int
    num_warps: int
    ahead: bool = False


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
        partial(_kernel, tile=tile, act=act, eps=eps, offset=offset, names=tuple(extras)),
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
    count, pairs = 3 + len(extras), max(1, tile.features // 2)
    shapes = [jax.ShapeDtypeStruct((1, heads, head_dim), k_pages.dtype)]
    shapes += [jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_pages, v_pages)]
    made = pl.pallas_call(
        partial(_project_kernel, tile=replace(tile, features=pairs), heads=heads, eps=eps, offset=offset, names=tuple(extras)),
        grid=(pl.cdiv((heads + 2 * kv_heads) * head_dim // 2, pairs),),
        out_shape=shapes,
        input_output_aliases={count: 1, count + 1: 2},
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=1),
        interpret=interpret,
        name="project_one_row",
    )(x_1D, weight_FD, slot_1, *extras.values(), k_pages, v_pages)
    return made[0], made[1], made[2]


def _project_kernel(x_ref, weight_ref, slot_ref, *refs, tile, heads, eps, offset, names):
    extras, (q_ref, k_pages_ref, v_pages_ref) = dict(zip(names, refs, strict=False)), refs[-3:]
    _, kv_heads, page_size, head_dim = k_pages_ref.shape
    half = head_dim // 2
    pair_F = pl.program_id(0) * tile.features + jnp.arange(tile.features)
    live_F = _live(pair_F, (heads + 2 * kv_heads) * half, tile.features)
    head_F, place_F = lax.div(pair_F, jnp.int32(half)), lax.rem(pair_F, jnp.int32(half))
    features = [head_F * head_dim + place_F, head_F * head_dim + place_F + half]
    products = _products(x_ref, weight_ref, extras.get("norm"), features, live_F, tile, eps, offset)
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


def _kernel(x_ref, weight_ref, *refs, tile, act, eps, offset, names):
    extras, o_ref = dict(zip(names, refs, strict=False)), refs[-1]
    features, dtype = o_ref.shape[1], o_ref.dtype
    feature_F = pl.program_id(0) * tile.features + jnp.arange(tile.features)
    live_F = _live(feature_F, features, tile.features)
    halves = [feature_F] if act is None else [feature_F, features + feature_F]
    products = _products(x_ref, weight_ref, extras.get("norm"), halves, live_F, tile, eps, offset)
    out_F = products[0].astype(dtype)
    if act is not None:  # rounded between, as the plain layers round
        out_F = act(out_F.astype(jnp.float32)).astype(dtype) * products[1].astype(dtype)
    if "residual" in extras:
        residual_F = _load(extras["residual"].at[0, feature_F], live_F).astype(jnp.float32)
        out_F = (out_F.astype(jnp.float32) + residual_F).astype(dtype)
    plt.store(o_ref.at[0, feature_F], out_F, mask=live_F)


def _products(x_ref, weight_ref, norm_ref, halves, live_F, tile, eps, offset):
    """The products of the row, normed if there is a norm, with the features of each of `halves`, float32."""
    inputs, dtype = x_ref.shape[1], x_ref.dtype
    turns = pl.cdiv(inputs, tile.inputs)

    def inputs_of(i):
        input_S = i * tile.inputs + jnp.arange(tile.inputs)
        return input_S, _live(input_S, inputs, tile.inputs)

    def fetched(i):
        input_S, live_S = inputs_of(i)
        live_FS = _both(live_F, live_S, (tile.features, tile.inputs))
        return [_load(weight_ref.at[half[:, None], input_S[None, :]], live_FS) for half in halves]

    def multiplied(i, sofar, weights):
        (sums, square_S), (input_S, live_S) = sofar, inputs_of(i)
        x_S = _load(x_ref.at[0, input_S], live_S).astype(jnp.float32)
        if norm_ref is not None:
            square_S += x_S * x_S
            norm_S = _load(norm_ref.at[input_S], live_S).astype(jnp.float32) + offset
            x_S = (x_S * norm_S).astype(dtype).astype(jnp.float32)
        return [total + w_FS.astype(jnp.float32) * x_S[None, :] for total, w_FS in zip(sums, weights, strict=True)], square_S

    start = [jnp.zeros((tile.features, tile.inputs), jnp.float32) for _ in halves], jnp.zeros((tile.inputs,), jnp.float32)
    if tile.ahead:  # the last turn stands outside, because nothing comes after it

        def turn(i, state):
            sofar, weights = state
            following = fetched(i + 1)
            return multiplied(i, sofar, weights), following

        sums, square_S = multiplied(turns - 1, *lax.fori_loop(0, turns - 1, turn, (start, fetched(0))))
    else:
        sums, square_S = lax.fori_loop(0, turns, lambda i, sofar: multiplied(i, sofar, fetched(i)), start)
    products = [jnp.sum(total, axis=1) for total in sums]
    if norm_ref is None:
        return products
    unit = lax.rsqrt(jnp.sum(square_S) / inputs + eps)
    return [product * unit for product in products]


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
