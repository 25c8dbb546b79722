"""Joins the parts of a decode row that several workers attended to: one program a row and query head, reading only the parts that exist.

A part is a softmax over some of the row's KV blocks, already divided by its own sum, with the base-2 logarithm of that sum beside it.
Part b * K + h + w belongs to worker w's share of row b and kv head h: the flat list is in (row, head) order, so no two parts meet.
Pallas-Triton, on every GPU: the parts lie in the second-level cache and the work is too small for anything larger.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.work import Shares

LOW = -1e30  # below every score, and finite: LOW - LOW is 0
LN2 = math.log(2)
TURN = 4  # parts read at the same time


def combine(
    o_SGH: Array,
    lse_SG: Array,
    shares: Shares,
    chunk: tuple[Array, ...] | None,
    *,
    heads: int,
    group: int,
    dtype,
    packed: bool,
    lse: bool,
    interpret: bool,
) -> tuple[Array, ...]:
    """The M decode lanes: (o [M, heads, H] of dtype,), zeros where no row decodes; with `lse` also the log-sum-exp [M, heads], -inf there.

    o_SGH, lse_SG: the parts, in float32. packed: query head q of row b is line (b * heads + q) % G of its part, else line q % group.
    chunk: the same of all N lanes, whose first M are then written in place.
    """
    rows, head_dim = shares.count_M.shape[0], o_SGH.shape[2]
    out = [jax.ShapeDtypeStruct((rows, heads, head_dim), dtype), jax.ShapeDtypeStruct((rows, heads), jnp.float32)][: 1 + lse]
    chunk = chunk or ()
    kernel = partial(
        _kernel, heads=heads, group=group, head_dim=head_dim, lines=o_SGH.shape[1], packed=packed, lse=lse, workers=shares.row_W.shape[0]
    )
    joined = pl.pallas_call(
        kernel,
        grid=(heads, rows),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in chunk] or out,
        input_output_aliases={4 + i: i for i in range(len(chunk))},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="decode_combine",
    )(o_SGH, lse_SG, shares.start_M1, shares.count_M, *chunk)
    return tuple(joined)


def _kernel(o_ref, lse_ref, start_ref, count_ref, *refs, heads, group, head_dim, lines, packed, lse, workers):
    head, row, out_refs = pl.program_id(0), pl.program_id(1), refs[-1 - lse :]  # those before them, if any, are the same arrays
    kv_head = lax.div(head, jnp.int32(group))
    line = lax.rem(row * heads + head, jnp.int32(lines)) if packed else lax.rem(head, jnp.int32(group))
    count = plt.load(count_ref.at[row])
    begin = plt.load(start_ref.at[row]) + kv_head * count
    worker = partial(worker_of, total=plt.load(start_ref.at[jnp.int32(start_ref.shape[0] - 1)]), workers=workers)
    first, last = worker(begin), jnp.where(count > 0, worker(begin + count - 1), -1)
    part = row * (heads // group) + kv_head
    feature = jnp.arange(pl.next_power_of_2(head_dim))

    def turn(i, state):
        peak, total, o_H = state
        worker_T = first + i * TURN + jnp.arange(TURN)
        live_T = worker_T <= last
        lse_T = plt.load(lse_ref.at[part + worker_T, line], mask=live_T, other=LOW)
        live_TH = live_T[:, None] & (feature < head_dim)[None, :]
        o_TH = plt.load(o_ref.at[part + worker_T[:, None], line, feature[None, :]], mask=live_TH, other=0.0)
        new = jnp.maximum(peak, jnp.max(lse_T))
        weight_T = jnp.where(live_T, jnp.exp2(lse_T - new), 0.0)
        keep = jnp.exp2(peak - new)
        return new, total * keep + jnp.sum(weight_T), o_H * keep + jnp.sum(weight_T[:, None] * o_TH, axis=0)

    start = (jnp.float32(LOW), jnp.float32(0), jnp.zeros(feature.shape, jnp.float32))
    peak, total, o_H = lax.fori_loop(0, lax.div(last - first + TURN, jnp.int32(TURN)), turn, start)
    o_H = o_H / jnp.maximum(total, 1e-30)
    plt.store(out_refs[0].at[row, head, feature], o_H.astype(out_refs[0].dtype), mask=feature < head_dim)
    if lse:
        plt.store(out_refs[1].at[row, head], jnp.where(count > 0, (peak + jnp.log2(jnp.maximum(total, 1e-30))) * LN2, -jnp.inf))


def worker_of(entry, *, total, workers):
    """The worker whose share holds an entry of the flat list: `shares` gives the first total % workers of them one entry more."""
    size, longer = lax.div(total, jnp.int32(workers)), lax.rem(total, jnp.int32(workers))
    cut = longer * (size + 1)
    return jnp.where(entry < cut, lax.div(entry, size + 1), longer + lax.div(entry - cut, jnp.maximum(size, 1)))
