"""Paged decode attention for any GPU from Ampere on, as one Pallas-Triton kernel, which a CPU can interpret.

Flat stream-K: each worker of a fixed grid walks its share of the step's KV blocks in one loop that does not end where a row does, so that
the next row's keys are under way while the last one's are multiplied. A (row, kv head) that one worker has for itself is written out at
once. One that is cut leaves a part with each of its workers, and whichever of them is done last joins the parts, in the order of the
workers, so that the result does not depend on who that was.

Letters: M rows, Q query heads, K kv heads, H features, P pages, W workers; R query lines of a group, S tokens in a KV block, T workers
whose parts are joined in a turn. Triton wants powers of two, so lines and features are padded with masks. `lax.div` and `lax.rem` stand
for // and %, which fail to lower inside loops.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention_portable import F16_MAX, FP8, LN2, LOG2E, WIDENED, _dot, _exp2, _unit
from pallas_kernels.blocks import Decode, features
from pallas_kernels.work import Rows, Shares

LOW = -1e30  # below every score, and finite: LOW - LOW is 0
JOINED = 32  # lines of parts that are joined in one turn


def decode(
    q_NQH: Array, k_pages: Array, v_pages: Array, rows: Rows, shares: Shares, blocks: Decode, chunk: tuple[Array, ...] | None, *,
    lse, sinks_Q, k_scale_K, v_scale_K, scale, window, softcap, interpret,
) -> tuple[Array, ...]:  # fmt: skip
    """Attention of the M decode lanes: (o [M, Q, H],), zeros where no row decodes; with `lse` also the log-sum-exp [M, Q], -inf there.

    chunk: the same of all N lanes, whose first M are then written in place.
    """
    (_, kv_heads, page_size, head_dim), (_, heads, _) = k_pages.shape, q_NQH.shape
    count, workers, dtype = rows.length_M.shape[0], shares.row_W.shape[0], q_NQH.dtype
    extras = {} if sinks_Q is None else {"sinks": sinks_Q.astype(jnp.float32) * LOG2E}
    planes = 1
    if k_pages.dtype == FP8:
        planes, ones = 2, jnp.ones(kv_heads, jnp.float32)
        extras["k_scale"], extras["v_scale"] = (WIDENED * (ones if x is None else x.astype(jnp.float32)) for x in (k_scale_K, v_scale_K))
        k_pages, v_pages = _pairs(k_pages), _pairs(v_pages)
        q_NQH = jnp.clip(q_NQH, -F16_MAX, F16_MAX).astype(jnp.float16)  # q of bfloat16 has no bits that float16 would round
    q_LMQH = jnp.stack([q_NQH[:count, :, plane::planes] for plane in range(planes)])
    out = chunk or (jax.ShapeDtypeStruct((count, heads, head_dim), dtype), jax.ShapeDtypeStruct((count, heads), jnp.float32))[: 1 + lse]
    parts = 2 * workers, heads // kv_heads
    scratch = jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)
    inputs = (
        q_LMQH, k_pages, v_pages, rows.table_MP, rows.length_M, shares.first_M, shares.count_M, shares.start_M1, shares.next_M,
        shares.bound_W1, shares.row_W, *extras.values(),
    )  # fmt: skip
    arrived_W = jnp.zeros(workers, jnp.int32)
    aliases = {len(inputs): len(out) + 2} | {len(inputs) + 1 + i: i for i in range(len(chunk or ()))}
    kernel = partial(
        _kernel,
        names=tuple(extras),
        lse=lse,
        shape=_Shape(heads // kv_heads, kv_heads, page_size, head_dim, planes, blocks.kv_block, workers),
        scale=scale,
        window=window,
        softcap=softcap,
        interpret=interpret,
    )
    done = pl.pallas_call(
        kernel,
        grid=(workers,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*out, *scratch, arrived_W)],
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
        name="paged_decode",
    )(*inputs, arrived_W, *(chunk or ()))
    return tuple(done[: len(out)])


@dataclass(frozen=True)
class _Shape:
    """What is fixed when the kernel is compiled."""

    group: int
    kv_heads: int
    page_size: int
    head_dim: int
    planes: int
    kv_block: int
    workers: int

    @property
    def width(self) -> int:
        """Features of a plane."""
        return self.head_dim // self.planes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Row:
    """A row that decodes: its KV blocks are [first, end)."""

    row: Array
    length: Array
    first: Array
    end: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Place:
    """Where a worker is: a KV block of a head of a row, and the row to come after it."""

    here: _Row
    head: Array
    block: Array
    page: Array
    later: _Row


def _kernel(
    q_ref, k_ref, v_ref, table_ref, length_ref, first_ref, count_ref, start_ref, next_ref, bound_ref, row_ref, *refs,
    names, lse, shape: _Shape, scale, window, softcap, interpret,
):  # fmt: skip
    worker = pl.program_id(0)
    extras, outputs = dict(zip(names, refs, strict=False)), refs[-(4 + lse) :]
    out_refs, (part_ref, part_lse_ref, arrived_ref) = outputs[: 1 + lse], outputs[1 + lse :]
    begin, stop = plt.load(bound_ref.at[worker]), plt.load(bound_ref.at[worker + 1])
    line, feature = jnp.arange(max(16, pl.next_power_of_2(shape.group))), jnp.arange(features(shape.width))
    whole_feature = jnp.arange(features(shape.width) * shape.planes)
    slot, block_size = jnp.arange(shape.kv_block), jnp.int32(shape.kv_block)
    live_H = feature < shape.width
    live_RH = (line < shape.group)[:, None] & live_H[None, :]
    whole_RH = (line < shape.group)[:, None] & (whole_feature < shape.head_dim)[None, :]
    paged = shape.page_size % shape.kv_block == 0  # a KV block is in one page

    def row_at(row):
        first = plt.load(first_ref.at[row])
        return _Row(row, plt.load(length_ref.at[row]), first, first + plt.load(count_ref.at[row]))

    def page_at(row, block):
        return plt.load(table_ref.at[row, lax.div(block * block_size, jnp.int32(shape.page_size))]) if paged else row

    def following(at: _Place) -> _Place:
        """The next block of the flat list."""
        block = at.block + 1
        turned = block == at.here.end
        head = jnp.where(turned, at.head + 1, at.head)
        left = head == shape.kv_heads
        here = jax.tree.map(partial(jnp.where, left), at.later, at.here)
        block = jnp.where(turned, here.first, block)
        later = row_at(plt.load(next_ref.at[here.row]))
        return _Place(here, jnp.where(left, 0, head), block, page_at(here.row, block), later)

    def turn(i, state):
        at, opened, attended = state
        row, head, block = at.here.row, at.head, at.block
        position_S = block * block_size + slot
        seen_S = position_S < at.here.length
        if window is not None:
            seen_S &= position_S >= at.here.length - window
        if paged:
            place_S, page = lax.rem(block * block_size, jnp.int32(shape.page_size)) + slot, at.page
        else:
            place_S = lax.rem(position_S, jnp.int32(shape.page_size))
            page = plt.load(table_ref.at[row, lax.div(position_S, jnp.int32(shape.page_size))], mask=seen_S, other=0)[:, None]
        live_SH = seen_S[:, None] & live_H[None, :]
        index = page, head, place_S[:, None], feature[None, :]
        k_SH = _planes(plt.load(k_ref.at[index], mask=live_SH, other=0), interpret)
        v_SH = _planes(plt.load(v_ref.at[index], mask=live_SH, other=0), interpret)
        q_index = row, head * shape.group + line[:, None], feature[None, :]
        q_RH = [plt.load(q_ref.at[(plane, *q_index)], mask=live_RH, other=0) for plane in range(shape.planes)]
        opens = block == at.here.first
        opened = opens | (opened & (i != begin))
        if "sinks" in extras:
            sink_R = plt.load(extras["sinks"].at[head * shape.group + line], mask=line < shape.group, other=LOW)
            attended = (jnp.where(opens, sink_R, attended[0]), jnp.where(opens, 1.0, attended[1]), attended[2])
        k_unit = scale * plt.load(extras["k_scale"].at[head]) if "k_scale" in extras else scale
        s_RS = sum(_dot(q, k, trans_b=True) for q, k in zip(q_RH, k_SH, strict=True))
        s_RS = s_RS if softcap is None else jnp.tanh(s_RS * (k_unit / softcap))
        s_RS = jnp.where(seen_S[None, :], s_RS, -jnp.inf)
        attended = _attend(attended, s_RS, v_SH, _unit(k_unit, softcap), interpret)
        closes = block + 1 == at.here.end

        def leave(attended):
            peak_R, sum_R, o_LRH = attended
            o_RH = o_LRH[0] if shape.planes == 1 else jnp.stack(o_LRH, axis=-1).reshape(whole_RH.shape)
            o_RH = o_RH / jnp.maximum(sum_R, 1e-30)[:, None]
            o_RH = o_RH * plt.load(extras["v_scale"].at[head]) if "v_scale" in extras else o_RH
            lse_R = peak_R + jnp.log2(jnp.maximum(sum_R, 1e-30))
            whole = opened & closes
            lane = head * shape.group + line
            index = row, lane[:, None], whole_feature[None, :]
            plt.store(out_refs[0].at[index], o_RH.astype(out_refs[0].dtype), mask=whole_RH & whole)
            if lse:
                plt.store(out_refs[1].at[row, lane], lse_R * LN2, mask=(line < shape.group) & whole)
            part = 2 * worker + opened.astype(jnp.int32)
            plt.store(part_ref.at[part, line[:, None], whole_feature[None, :]], o_RH, mask=whole_RH & ~whole)
            plt.store(part_lse_ref.at[part, line], lse_R, mask=(line < shape.group) & ~whole)
            return _nothing(line.shape[0], feature.shape[0], shape.planes)

        attended = lax.cond(closes | (i + 1 == stop), leave, lambda attended: attended, attended)
        return following(at), opened, attended

    row = plt.load(row_ref.at[worker])
    count, here, offset = plt.load(count_ref.at[row]), row_at(row), begin - plt.load(start_ref.at[row])
    head, block = lax.div(offset, count), here.first + lax.rem(offset, count)
    at = _Place(here, head, block, page_at(row, block), row_at(plt.load(next_ref.at[row])))
    nothing = _nothing(line.shape[0], feature.shape[0], shape.planes)

    def empty(turn, _):
        """Zeros for the rows that do not decode."""
        row = worker + turn * shape.workers

        @pl.when(plt.load(count_ref.at[row]) == 0)
        def _():
            every = jnp.arange(pl.next_power_of_2(shape.kv_heads * shape.group))
            real = every < shape.kv_heads * shape.group
            zeros = jnp.zeros((every.shape[0], whole_feature.shape[0]), out_refs[0].dtype)
            mask = real[:, None] & (whole_feature < shape.head_dim)[None, :]
            plt.store(out_refs[0].at[row, every[:, None], whole_feature[None, :]], zeros, mask=mask)
            if lse:
                plt.store(out_refs[1].at[row, every], jnp.full(every.shape, -jnp.inf), mask=real)

        return ()

    rows = length_ref.shape[0]
    lax.fori_loop(jnp.int32(0), lax.div(rows - 1 - worker + shape.workers, jnp.int32(shape.workers)), empty, ())

    @pl.when(begin < stop)
    def _():
        end, _, _ = lax.fori_loop(begin, stop, turn, (at, jnp.bool_(False), nothing))
        _join_cut(worker, begin, stop, start_ref, count_ref, row_ref, out_refs, part_ref, part_lse_ref, arrived_ref, shape, lse, interpret)


def _join_cut(worker, begin, stop, start_ref, count_ref, row_ref, out_refs, part_ref, part_lse_ref, arrived_ref, shape, lse, interpret):
    """Count this worker as arrived at the (row, head) it began in and at that it stopped in, and join the parts of those it is the last at."""
    total = plt.load(start_ref.at[jnp.int32(start_ref.shape[0] - 1)])
    worker_of = partial(_worker_of, total=total, workers=shape.workers)
    if not interpret:
        plt.debug_barrier()  # the parts are written by all threads, the arrival by one

    def look(turn, last_first):
        # first where it began, then where it stopped; the row it stopped in is where the next worker begins, if that is cut
        w = worker + turn
        row = plt.load(row_ref.at[w])
        count, start, at = plt.load(count_ref.at[row]), plt.load(start_ref.at[row]), jnp.where(turn == 0, begin, stop)
        head = lax.div(at - start, jnp.maximum(count, 1))
        opening = start + head * count
        cut = (opening < at) & (count > 0)
        first, last = worker_of(opening), worker_of(opening + count - 1)
        cut &= first != last_first

        @pl.when(cut)
        def _():
            arrived = plt.atomic_add(arrived_ref, (first,), jnp.int32(1))

            @pl.when(arrived == last - first)
            def _():
                _join(row, head, first, last, out_refs, part_ref, part_lse_ref, shape, lse)

        return jnp.where(cut, first, last_first)

    lax.fori_loop(jnp.int32(0), jnp.where(worker + 1 < shape.workers, jnp.int32(2), jnp.int32(1)), look, jnp.int32(-1))


def _join(row, head, first, last, out_refs, part_ref, part_lse_ref, shape, lse):
    """Write a row and head from its parts, which workers [first, last] left."""
    lines = pl.next_power_of_2(shape.group)
    workers = max(1, JOINED // lines)
    line, feature = jnp.arange(lines), jnp.arange(features(shape.width) * shape.planes)
    live_RH = (line < shape.group)[:, None] & (feature < shape.head_dim)[None, :]

    def turn(i, state):
        peak_R, total_R, o_RH = state
        worker_T = first + i * workers + jnp.arange(workers)
        live_TR = (worker_T <= last)[:, None] & (line < shape.group)[None, :]
        part_T = 2 * worker_T + (worker_T == first).astype(jnp.int32)
        lse_TR = plt.load(part_lse_ref.at[part_T[:, None], line[None, :]], mask=live_TR, other=LOW)
        live_TRH = live_TR[:, :, None] & (feature < shape.head_dim)[None, None, :]
        index = part_T[:, None, None], line[None, :, None], feature[None, None, :]
        o_TRH = plt.load(part_ref.at[index], mask=live_TRH, other=0.0)
        new_R = jnp.maximum(peak_R, jnp.max(lse_TR, axis=0))
        weight_TR = jnp.exp2(lse_TR - new_R[None, :])
        keep_R = jnp.exp2(peak_R - new_R)
        more_RH = jnp.sum(weight_TR[:, :, None] * o_TRH, axis=0)
        return new_R, total_R * keep_R + jnp.sum(weight_TR, axis=0), o_RH * keep_R[:, None] + more_RH

    start = (jnp.full(lines, LOW, jnp.float32), jnp.zeros(lines, jnp.float32), jnp.zeros(live_RH.shape, jnp.float32))
    peak_R, total_R, o_RH = lax.fori_loop(jnp.int32(0), lax.div(last - first + workers, jnp.int32(workers)), turn, start)
    total_R, lane = jnp.maximum(total_R, 1e-30), head * shape.group + line
    o_RH = (o_RH / total_R[:, None]).astype(out_refs[0].dtype)
    plt.store(out_refs[0].at[row, lane[:, None], feature[None, :]], o_RH, mask=live_RH)
    if lse:
        plt.store(out_refs[1].at[row, lane], (peak_R + jnp.log2(total_R)) * LN2, mask=line < shape.group)


def _worker_of(entry, *, total, workers):
    """The worker whose share holds an entry of the flat list: `shares` gives the first total % workers of them one entry more."""
    size, longer = lax.div(total, jnp.int32(workers)), lax.rem(total, jnp.int32(workers))
    cut = longer * (size + 1)
    return jnp.where(entry < cut, lax.div(entry, size + 1), longer + lax.div(entry - cut, jnp.maximum(size, 1)))


def _pairs(pages: Array) -> Array:
    """fp8 pages as pairs of neighbouring features, [P, K, page_size, H / 2] uint16: the same bytes, and XLA moves none."""
    return lax.bitcast_convert_type(pages.reshape(*pages.shape[:-1], -1, 2), jnp.uint16)


# Two pairs of bytes to two halves, of the first bytes and of the second: exponent and mantissa come one bit below the sign.
_FIRST = """{
.reg .b32 a, b;
shl.b32 a, $1, 8;
shl.b32 b, $1, 7;
and.b32 a, a, 0x80008000;
lop3.b32 $0, b, 0x3f803f80, a, 0xea;
}"""
_SECOND = """{
.reg .b32 a, b;
and.b32 a, $1, 0x80008000;
shr.u32 b, $1, 1;
lop3.b32 $0, b, 0x3f803f80, a, 0xea;
}"""


def _planes(x, interpret: bool):
    """A block as what is multiplied: itself; or, of pairs of fp8 numbers, first and second numbers as float16, 1 / WIDENED as large."""
    if x.dtype != jnp.uint16:
        return [x]
    if not interpret:
        result = jax.ShapeDtypeStruct(x.shape, jnp.float16)
        widen = partial(plt.elementwise_inline_asm, args=[x], constraints="=r,r", pack=2, result_shape_dtypes=[result])
        return [widen(asm)[0] for asm in (_FIRST, _SECOND)]
    even = ((x & 0x80) << 8) | ((x & 0x7F) << 7)
    odd = (x & 0x8000) | ((x & 0x7F00) >> 1)
    return [lax.bitcast_convert_type(bits, jnp.float16) for bits in (even, odd)]


def _nothing(lines: int, width: int, planes: int):
    """An online softmax that has seen no token: (peak of base-2 scores, sum, output by plane), float32."""
    low, zero = jnp.full((lines,), LOW, jnp.float32), jnp.zeros((lines,), jnp.float32)
    return low, zero, [jnp.zeros((lines, width), jnp.float32) for _ in range(planes)]


def _attend(attended, s_RS, v_SH, unit, interpret):
    """One turn of the online softmax, over scores of which each is `unit` in the exponent; -inf for what is not seen."""
    peak_R, sum_R, o_LRH = attended
    new_R = jnp.maximum(peak_R, jnp.max(s_RS, axis=1) * unit)
    p_RS = _exp2(s_RS * unit - new_R[:, None], interpret)
    keep_R = _exp2(peak_R - new_R, interpret)
    o_LRH = [o_RH * keep_R[:, None] + _dot(p_RS.astype(v.dtype), v) for o_RH, v in zip(o_LRH, v_SH, strict=True)]
    return new_R, sum_R * keep_R + jnp.sum(p_RS, axis=1), o_LRH
