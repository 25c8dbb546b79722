"""Writing new keys and values into their pages, in place: as they are (`write_kv`), or as a product left them (`turn_and_write`).

On a GPU one Pallas-Triton kernel does either, a program for tokens, or some of their heads; elsewhere plain jax.numpy says what is meant.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.blocks import default_device
from pallas_kernels.work import each_live, programs

FP8_MAX = 448.0


def write_kv(
    k_pages: Array,
    v_pages: Array,
    k_NKH: Array,
    v_NKH: Array,
    slot_N: Array,
    *,
    k_scale_K: Array | None = None,
    v_scale_K: Array | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The pages with token n's K and V in slot `slot_N[n]` = page * page_size + place in the page.

    k_pages, v_pages: [P, K, page_size, H]; donate them to the jit around the call, and the write happens in place. k_NKH and v_NKH are
    cast to the pages' dtype; in float8_e4m3fn pages a number is stored as number / scale of its kv head (None is 1), and what is beyond
    that format's 448 becomes 448. Lanes that hold no token name a slot of page 0, which nobody reads. Which of two tokens with the same
    slot wins is not said, nor what a slot outside the pages does. implementation: as `implementation_for` names it; None takes the one
    for the default device. Raises ValueError if the shapes do not fit together.
    """
    _, kv_heads, _, head_dim = k_pages.shape
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(f"k_pages {k_pages.dtype}{k_pages.shape} and v_pages {v_pages.dtype}{v_pages.shape} differ")
    wanted = (slot_N.shape[0], kv_heads, head_dim)
    if k_NKH.shape != wanted or v_NKH.shape != wanted:
        raise ValueError(f"k and v must be {wanted} for slots {slot_N.shape}, pages {k_pages.shape}; got {k_NKH.shape}, {v_NKH.shape}")
    implementation = implementation or ("portable" if default_device().platform == "gpu" else "reference")
    if implementation not in ("reference", "portable", "sm90"):
        raise ValueError(f"implementation must be one of portable, sm90, reference, got {implementation!r}")
    k_NKH, v_NKH = _stored(k_NKH, k_pages.dtype, k_scale_K), _stored(v_NKH, v_pages.dtype, v_scale_K)
    if implementation != "reference":
        return _write(k_pages, v_pages, k_NKH, v_NKH, slot_N, interpret)
    page_N, place_N = slot_N // k_pages.shape[2], slot_N % k_pages.shape[2]
    return k_pages.at[page_N, :, place_N].set(k_NKH), v_pages.at[page_N, :, place_N].set(v_NKH)


def _stored(x_NKH: Array, dtype, scale_K: Array | None) -> Array:
    """Numbers as pages of this dtype hold them."""
    if dtype != jnp.float8_e4m3fn:
        if scale_K is not None:
            raise ValueError(f"k_scale_K and v_scale_K are for float8_e4m3fn pages, these are {dtype}")
        return x_NKH.astype(dtype)
    x_NKH = x_NKH if scale_K is None else x_NKH / scale_K[:, None]
    return jnp.clip(x_NKH, -FP8_MAX, FP8_MAX).astype(dtype)  # the cast alone makes NaN of them


def _write(k_pages, v_pages, k_NKH, v_NKH, slot_N, interpret):
    return tuple(
        pl.pallas_call(
            _write_kernel,
            grid=slot_N.shape,
            out_shape=[jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_pages, v_pages)],
            input_output_aliases={3: 0, 4: 1},
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name="write_kv",
        )(k_NKH, v_NKH, slot_N, k_pages, v_pages)
    )


def _write_kernel(k_ref, v_ref, slot_ref, _k, _v, k_pages_ref, v_pages_ref):
    token = pl.program_id(0)
    _, kv_heads, page_size, head_dim = k_pages_ref.shape
    slot = plt.load(slot_ref.at[token])
    page, place = lax.div(slot, jnp.int32(page_size)), lax.rem(slot, jnp.int32(page_size))
    head_K1 = jnp.arange(pl.next_power_of_2(kv_heads))[:, None]
    feature_1H = jnp.arange(pl.next_power_of_2(head_dim))[None, :]
    live_KH = (head_K1 < kv_heads) & (feature_1H < head_dim)
    for ref, pages_ref in ((k_ref, k_pages_ref), (v_ref, v_pages_ref)):
        new_KH = plt.load(ref.at[token, head_K1, feature_1H], mask=live_KH, other=0.0)
        plt.store(pages_ref.at[page, head_K1, place, feature_1H], new_KH, mask=live_KH)


HEADS = 8  # that a program turns and writes at a time


def turn_and_write(
    k_pages: Array,
    v_pages: Array,
    qkv_PNF: Array,
    slot_N: Array,
    *,
    heads: int,
    bias_F: Array | None = None,
    cos_sin: tuple[Array, Array] | None = None,
    q_norm_H: Array | None = None,
    k_norm_H: Array | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    live_3: Array | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """(q [N, Q, H] ready for attention, and the pages with K and V in slots `slot_N`), all of the pages' dtype.

    qkv_PNF: parts whose sum is q, k and v of `heads` query heads and of the pages' kv heads, one after the other, F = (Q + 2 K) H.
    bias_F is added to the sum. q_norm_H and k_norm_H (with eps and offset): each head of q and of k over its root mean square, times the
    norm plus the offset. cos_sin: [N, 1, pairs] float32 each; feature i < pairs of each head of q and k is turned with feature i + pairs.
    live_3: `work.live`: a kernel leaves out lanes that hold no token, whose q is then anything. Pages, slots, implementation as for
    `write_kv`. Raises ValueError if the shapes do not fit together.
    """
    _, kv_heads, _, head_dim = k_pages.shape
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(f"k_pages {k_pages.dtype}{k_pages.shape} and v_pages {v_pages.dtype}{v_pages.shape} differ")
    wanted = (slot_N.shape[0], (heads + 2 * kv_heads) * head_dim)
    if qkv_PNF.shape[1:] != wanted:
        given = f"slots {slot_N.shape}, {heads} query heads, pages {k_pages.shape}"
        raise ValueError(f"the parts of q, k and v must be {wanted} for {given}; got {qkv_PNF.shape[1:]}")
    pairs = 0 if cos_sin is None else cos_sin[0].shape[-1]
    if 2 * pairs > head_dim:
        raise ValueError(f"cos_sin turns {2 * pairs} features, a head has {head_dim}")
    if (implementation or ("portable" if default_device().platform == "gpu" else "reference")) == "reference":
        return _turn_reference(k_pages, v_pages, qkv_PNF, slot_N, heads, bias_F, cos_sin, q_norm_H, k_norm_H, eps, offset)
    extras = {"bias": bias_F, "q_norm": q_norm_H, "k_norm": k_norm_H, "live": live_3}
    if cos_sin is not None:
        extras |= {"cos": cos_sin[0].reshape(-1, pairs), "sin": cos_sin[1].reshape(-1, pairs)}
    extras = {name: x for name, x in extras.items() if x is not None}
    count, pages, parts = 2 + len(extras), (k_pages, v_pages), qkv_PNF.shape[0]
    made = pl.pallas_call(
        partial(_turn_kernel, names=tuple(extras), heads=heads, parts=parts, pairs=pairs, eps=eps, offset=offset),
        grid=(programs(slot_N.shape[0], live_3), pl.cdiv(heads + 2 * kv_heads, HEADS)),
        out_shape=[jax.ShapeDtypeStruct((slot_N.shape[0], heads, head_dim), k_pages.dtype)]
        + [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages],
        input_output_aliases={count: 1, count + 1: 2},
        compiler_params=plt.CompilerParams(num_warps=4 if parts == 1 else 8, num_stages=1),
        interpret=interpret,
        name="turn_and_write",
    )(qkv_PNF, slot_N, *extras.values(), *pages)
    return made[0], made[1], made[2]


def _turn_reference(k_pages, v_pages, qkv_PNF, slot_N, heads, bias_F, cos_sin, q_norm_H, k_norm_H, eps, offset):
    _, kv_heads, page_size, head_dim = k_pages.shape
    qkv_NF = qkv_PNF.astype(jnp.float32).sum(0)
    qkv_NF = qkv_NF if bias_F is None else qkv_NF + bias_F.astype(jnp.float32)
    q, k, v = jnp.split(qkv_NF.reshape(len(slot_N), -1, head_dim), [heads, heads + kv_heads], axis=1)

    def ready(x, norm_H):
        if norm_H is not None:
            x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * (norm_H.astype(jnp.float32) + offset)
        if cos_sin is None:
            return x
        (cos, sin), pairs = cos_sin, cos_sin[0].shape[-1]
        a, b, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    q, k, v = (x.astype(k_pages.dtype) for x in (ready(q, q_norm_H), ready(k, k_norm_H), v))
    page_N, place_N = slot_N // page_size, slot_N % page_size
    return q, k_pages.at[page_N, :, place_N].set(k), v_pages.at[page_N, :, place_N].set(v)


def _turn_kernel(qkv_ref, slot_ref, *refs, names, **options):
    extras, first = dict(zip(names, refs, strict=False)), pl.program_id(1) * HEADS
    each_live(extras.get("live"), lambda token: _turn_token(qkv_ref, slot_ref, extras, refs[-3:], token, first, **options))


def _turn_token(qkv_ref, slot_ref, extras, outputs, token, first, *, heads, parts, pairs, eps, offset):
    """A token's heads from `first` on, in pieces of features: those that are turned with each other, and those that are not turned."""
    q_ref, k_pages_ref, v_pages_ref = outputs
    _, kv_heads, page_size, head_dim = k_pages_ref.shape
    head_K1 = (first + jnp.arange(HEADS))[:, None]
    is_q, is_v = head_K1 < heads, head_K1 >= heads + kv_heads

    def piece(begin, size):
        """A piece's features, and whether they exist."""
        feature_1S = begin + jnp.arange(pl.next_power_of_2(size))[None, :]
        return feature_1S, (head_K1 < heads + 2 * kv_heads) & (feature_1S < begin + size)

    def load(ref, *index, mask):
        return plt.load(ref.at[*index], mask=mask, other=0.0).astype(jnp.float32)

    def summed(feature, live):
        column = head_K1 * head_dim + feature
        total = load(qkv_ref, 0, token, column, mask=live)
        for part in range(1, parts):
            total += load(qkv_ref, part, token, column, mask=live)
        return total + load(extras["bias"], column, mask=live) if "bias" in extras else total

    def normed(x, unit, feature, live):
        for name, own in (("q_norm", is_q), ("k_norm", ~is_q & ~is_v)):
            if name in extras:
                weight = load(extras[name], jnp.broadcast_to(feature, live.shape), mask=live) + offset
                x = jnp.where(own, x * unit * weight, x)
        return x

    pieces = [piece(begin, size) for begin, size in ((0, pairs), (pairs, pairs), (2 * pairs, head_dim - 2 * pairs)) if size]
    out = [summed(*each) for each in pieces]
    if "q_norm" in extras or "k_norm" in extras:
        squares_K = sum((jnp.sum(x * x, axis=1) for x in out), jnp.zeros(HEADS, jnp.float32))
        unit = lax.rsqrt(squares_K[:, None] / head_dim + eps)
        out = [normed(x, unit, *each) for x, each in zip(out, pieces, strict=True)]
    if pairs:
        (a, b, *rest), (pair, _) = out, pieces[0]
        cos, sin = (load(extras[name], token, pair, mask=pair < pairs) for name in ("cos", "sin"))
        out = [jnp.where(is_v, a, a * cos - b * sin), jnp.where(is_v, b, b * cos + a * sin), *rest]
    slot = plt.load(slot_ref.at[token])
    page, place = lax.div(slot, jnp.int32(page_size)), lax.rem(slot, jnp.int32(page_size))
    for x, (feature, live) in zip(out, pieces, strict=True):
        x = x.astype(q_ref.dtype)
        plt.store(q_ref.at[token, head_K1, feature], x, mask=live & is_q)
        plt.store(k_pages_ref.at[page, head_K1 - heads, place, feature], x, mask=live & ~is_q & ~is_v)
        plt.store(v_pages_ref.at[page, head_K1 - heads - kv_heads, place, feature], x, mask=live & is_v)
