"""Writing new keys and values into their pages."""

from jax import Array


def write_kv(k_pages: Array, v_pages: Array, k_NKH: Array, v_NKH: Array, slot_N: Array) -> tuple[Array, Array]:
    """The pages with token n's K and V in slot `slot_N[n]` = page * page_size + place in the page.

    k_pages, v_pages: [P, K, page_size, H]; donate them to the jit around the call, and the write happens in place. k_NKH and v_NKH are
    cast to the pages' dtype. Lanes that hold no token name a slot of page 0, which nobody reads. Which of two tokens with the same slot
    wins is not said. Raises ValueError if the shapes do not fit together.
    """
    _, kv_heads, page_size, head_dim = k_pages.shape
    if v_pages.shape != k_pages.shape:
        raise ValueError(f"k_pages {k_pages.shape} and v_pages {v_pages.shape} differ in shape")
    wanted = (slot_N.shape[0], kv_heads, head_dim)
    if k_NKH.shape != wanted or v_NKH.shape != wanted:
        raise ValueError(f"k and v must be {wanted} for slots {slot_N.shape}, pages {k_pages.shape}; got {k_NKH.shape}, {v_NKH.shape}")
    page_N, place_N = slot_N // page_size, slot_N % page_size
    return (
        k_pages.at[page_N, :, place_N].set(k_NKH.astype(k_pages.dtype)),
        v_pages.at[page_N, :, place_N].set(v_NKH.astype(v_pages.dtype)),
    )
