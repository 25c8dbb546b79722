"""Paged attention's meaning, in plain jnp: what every other implementation is compared with, and what runs on a CPU.

One online softmax over the pages of the rows. Each query token gathers its own row's page in every turn, so any mixture of decode and
chunk tokens is one code path. Tokens go in slabs and the loop ends at the longest context of a slab: memory stays small, and the time
follows the context that is there rather than the longest that could be.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.work import INT_MAX, Lanes, Rows

SLAB = 64  # query tokens that gather pages at the same time: 16 MB a turn for 8 kv heads of 128 with pages of 64


def attend(
    q_NQH: Array,
    k_pages: Array,
    v_pages: Array,
    rows: Rows,
    lanes: Lanes,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_Q: Array | None,
    k_scale_K: Array | None,
    v_scale_K: Array | None,
) -> tuple[Array, Array]:
    """Attention of every query token to its own row's tokens up to itself: (o [N, Q, H] in q's dtype, log-sum-exp [N, Q] float32).

    Lanes that no row owns give zeros, and -inf.
    """
    count, heads, head_dim = q_NQH.shape
    slab = min(SLAB, count)
    pad = -count % slab

    def one(lane):
        q, row, position = lane
        options = dict(scale=scale, window=window, softcap=softcap, sinks_Q=sinks_Q, k_scale_K=k_scale_K, v_scale_K=v_scale_K)
        return _slab(q, k_pages, v_pages, rows.table_MP[row], position, **options)

    padded = (
        jnp.pad(q_NQH, ((0, pad), (0, 0), (0, 0))),
        jnp.pad(lanes.row_N, (0, pad)),
        jnp.pad(lanes.position_N, (0, pad), constant_values=-1),
    )
    o, lse = lax.map(one, tuple(x.reshape(-1, slab, *x.shape[1:]) for x in padded))
    return o.reshape(-1, heads, head_dim)[:count].astype(q_NQH.dtype), lse.reshape(-1, heads)[:count]


def _slab(q_NQH, k_pages, v_pages, table_NP, position_N, *, scale, window, softcap, sinks_Q, k_scale_K, v_scale_K):
    """`attend` for the tokens of one slab, in float32. table_NP: each token's own row of the page table."""
    kv_heads, page_size = k_pages.shape[1:3]
    count, heads, head_dim = q_NQH.shape
    q_NKGH = q_NQH.astype(jnp.float32).reshape(count, kv_heads, heads // kv_heads, head_dim)
    oldest_N = jnp.zeros_like(position_N) if window is None else jnp.maximum(position_N - window + 1, 0)

    def turn(i, state):
        peak_NKG, sum_NKG, o_NKGH = state
        page_N = lax.dynamic_index_in_dim(table_NP, i, axis=1, keepdims=False)
        k_NKSH, v_NKSH = k_pages[page_N].astype(jnp.float32), v_pages[page_N].astype(jnp.float32)
        k_NKSH, v_NKSH = _unscaled(k_NKSH, k_scale_K), _unscaled(v_NKSH, v_scale_K)
        s = jnp.einsum("nkgh,nksh->nkgs", q_NKGH, k_NKSH, precision="highest") * scale
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        at = i * page_size + jnp.arange(page_size)
        seen_NS = (at <= position_N[:, None]) & (at >= oldest_N[:, None])
        s = jnp.where(seen_NS[:, None, None], s, -jnp.inf)
        v_NKSH = jnp.where(seen_NS[:, None, :, None], v_NKSH, 0)  # a slot nobody wrote may hold NaN, and 0 * NaN is NaN
        new_NKG = jnp.maximum(peak_NKG, s.max(axis=-1))
        p = jnp.exp(s - new_NKG[..., None])
        keep_NKG = jnp.exp(peak_NKG - new_NKG)
        o_NKGH = o_NKGH * keep_NKG[..., None] + jnp.einsum("nkgs,nksh->nkgh", p, v_NKSH, precision="highest")
        return new_NKG, sum_NKG * keep_NKG + p.sum(axis=-1), o_NKGH

    first = jnp.min(jnp.where(position_N < 0, INT_MAX, oldest_N // page_size))
    end = jnp.max(position_N) // page_size + 1  # floor division: an empty slab, at -1, has no turn
    low = jnp.full(q_NKGH.shape[:3], jnp.finfo(jnp.float32).min)  # finite: -inf - -inf would be NaN in a row that saw nothing yet
    start = (low, jnp.zeros_like(low), jnp.zeros_like(q_NKGH))
    if sinks_Q is not None:  # a sink is a score whose value is zero
        start = (jnp.broadcast_to(sinks_Q.astype(jnp.float32).reshape(kv_heads, -1), low.shape), jnp.ones_like(low), start[2])
    peak_NKG, sum_NKG, o_NKGH = lax.fori_loop(first, end, turn, start)
    owned_NKG = jnp.broadcast_to((position_N >= 0)[:, None, None], low.shape)
    o_NKGH = jnp.where(owned_NKG[..., None], o_NKGH / jnp.maximum(sum_NKG[..., None], 1e-37), 0)
    lse_NKG = jnp.where(owned_NKG, peak_NKG + jnp.log(jnp.maximum(sum_NKG, 1e-37)), -jnp.inf)
    return o_NKGH.reshape(count, heads, head_dim), lse_NKG.reshape(count, heads)


def _unscaled(x_NKSH: Array, scale_K: Array | None) -> Array:
    return x_NKSH if scale_K is None else x_NKSH * scale_K.astype(jnp.float32)[:, None, None]
