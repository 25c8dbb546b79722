"""Writing new keys and values into their pages, in place.

On a GPU one Pallas-Triton kernel writes both, a program a token; elsewhere a scatter each says what is meant.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

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
    implementation = implementation or ("portable" if jax.devices()[0].platform == "gpu" else "reference")
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
