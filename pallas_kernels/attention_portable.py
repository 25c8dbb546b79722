"""Paged prefill attention for any GPU from Ampere on, as a Pallas-Triton kernel, which a CPU can interpret.

It takes a tile of one row's chunk tokens, packed with their group of query heads so that a KV block is read once for all of them, and walks
the context up to the tile's last token; only blocks at the edges are masked.

Letters: N tokens, Q query heads, K kv heads, H features, P pages; R query lines in a program, S tokens in a KV block. Triton wants powers
of two, so lines and features are padded with masks. `lax.div` and `lax.rem` stand for // and %, which fail to lower inside loops.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.blocks import Prefill, features
from pallas_kernels.work import Rows, Tiles

LOW = -1e30  # below every score, and finite: LOW - LOW is 0
LOG2E, LN2 = math.log2(math.e), math.log(2)
FP8 = jnp.float8_e4m3fn
WIDENED = 2.0**8  # float16's exponent bias less e4m3's, as a factor
F16_MAX = 65504.0


def tile_tokens(group: int, blocks: Prefill) -> int:
    """Chunk tokens in a prefill tile."""
    return max(1, blocks.lines // pl.next_power_of_2(group))


def prefill(
    q_NQH: Array, k_pages: Array, v_pages: Array, rows: Rows, tiles: Tiles, blocks: Prefill, *,
    lse, sinks_Q, k_scale_K, v_scale_K, scale, window, softcap, interpret,
) -> tuple[Array, ...]:  # fmt: skip
    """Attention of the chunk lanes: (o [N, Q, H],), with `lse` also the log-sum-exp [N, Q] float32.

    The decode lanes, and chunk lanes that no row owns, are zeros, and -inf.
    """
    kv_heads = k_pages.shape[1]
    empty = (jnp.zeros_like(q_NQH), jnp.full(q_NQH.shape[:2], -jnp.inf, jnp.float32))[: 1 + lse]
    q_NQH, extras = _prepared(q_NQH, k_pages, sinks_Q, k_scale_K, v_scale_K)
    options = dict(
        lines=blocks.lines,
        group=q_NQH.shape[1] // kv_heads,
        first_lane=rows.length_M.shape[0],
        kv_block=blocks.kv_block,
        scale=scale,
        window=window,
        softcap=softcap,
        interpret=interpret,
    )
    inputs = (q_NQH, k_pages, v_pages, rows.table_MP, tiles.row_I, tiles.begin_I, tiles.size_I, tiles.position_I, *extras.values())
    attended = pl.pallas_call(
        partial(_prefill_kernel, names=tuple(extras), outputs=len(empty), **options),
        grid=(kv_heads, tiles.row_I.shape[0]),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in empty],
        input_output_aliases={len(inputs) + i: i for i in range(len(empty))},
        compiler_params=plt.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
        name="paged_prefill",
    )(*inputs, *empty)
    return tuple(attended)


def _prefill_kernel(q_ref, k_ref, v_ref, table_ref, row_ref, begin_ref, size_ref, position_ref, *refs, names, outputs, **options):
    kv_head, tile = pl.program_id(0), pl.program_id(1)
    extras, out_refs = dict(zip(names, refs, strict=False)), refs[-outputs:]
    size = plt.load(size_ref.at[tile])

    @pl.when(size > 0)
    def _():
        place = (plt.load(row_ref.at[tile]), plt.load(begin_ref.at[tile]), size, plt.load(position_ref.at[tile]))
        _prefill_tile((q_ref, k_ref, v_ref, table_ref, extras, out_refs), kv_head, place, **options)


def _prefill_tile(refs, kv_head, place, *, lines, group, first_lane, kv_block, scale, window, softcap, interpret):
    """One tile: `size` tokens of `row`, the first in chunk lane `begin` and at `position`, by the group of one kv head."""
    (q_ref, k_ref, v_ref, table_ref, extras, out_refs), (row, begin, size, position) = refs, place
    page_size, head_dim = k_ref.shape[2:]
    padded = pl.next_power_of_2(group)
    line, feature, slot = jnp.arange(max(lines, padded)), jnp.arange(features(head_dim)), jnp.arange(kv_block)
    token_R, member_R = lax.div(line, jnp.int32(padded)), lax.rem(line, jnp.int32(padded))
    real_H = (feature < head_dim)[None, :]
    live_RH = ((token_R < size) & (member_R < group))[:, None] & real_H
    index = ((first_lane + begin + token_R)[:, None], (kv_head * group + member_R)[:, None], feature[None, :])
    q_RH = plt.load(q_ref.at[index], mask=live_RH, other=0.0)
    position_R, end = position + token_R, position + size

    def turn(block, attended, *, edge):
        position_S = block * kv_block + slot
        if page_size % kv_block == 0:  # the block lies in one page: one number, and addresses that follow each other
            page = plt.load(table_ref.at[row, lax.div(block * kv_block, jnp.int32(page_size))])
            place_S = lax.rem(block * kv_block, jnp.int32(page_size)) + slot
            index = (page, kv_head, place_S[:, None], feature[None, :])
        else:
            page_S = plt.load(table_ref.at[row, lax.div(position_S, jnp.int32(page_size))], mask=position_S < end, other=0)
            index = (page_S[:, None], kv_head, lax.rem(position_S, jnp.int32(page_size))[:, None], feature[None, :])
        masks: dict[str, Any] = {}
        if edge:
            masks = dict(mask=(position_S < end)[:, None] & real_H, other=0.0)
        elif feature.shape[0] != head_dim:
            masks = dict(mask=jnp.broadcast_to(real_H, (kv_block, feature.shape[0])), other=0.0)
        s_RS = _scores(q_RH, plt.load(k_ref.at[index], **masks), k_unit, softcap, interpret)
        if edge:
            seen_RS = position_S[None, :] <= position_R[:, None]
            if window is not None:
                seen_RS &= position_S[None, :] > position_R[:, None] - window
            s_RS = jnp.where(seen_RS, s_RS, -jnp.inf)
        return _attend(attended, s_RS, plt.load(v_ref.at[index], **masks), _unit(k_unit, softcap), interpret)

    # Blocks [low, inner) cut through some token's window, [inner, outer) are seen whole by all, [outer, high) cut through the diagonal.
    block = jnp.int32(kv_block)
    high = lax.div(end + block - 1, block)
    low = inner = jnp.int32(0)
    if window is not None:
        low = lax.div(jnp.maximum(position - window + 1, 0), block)
        inner = jnp.minimum(lax.div(jnp.maximum(end - window, 0) + block - 1, block), high)
    outer = jnp.maximum(lax.div(position + 1, block), inner)
    k_unit, v_unit = _units(extras, kv_head, scale)
    attended = _nothing(line.shape[0], feature.shape[0])
    if "sinks" in extras:
        sink_R = plt.load(extras["sinks"].at[kv_head * group + member_R], mask=member_R < group, other=LOW)
        attended = (sink_R, jnp.ones_like(sink_R), attended[2])
    if window is not None:
        attended = lax.fori_loop(low, inner, partial(turn, edge=True), attended)
    attended = lax.fori_loop(inner, outer, partial(turn, edge=False), attended)
    peak_R, sum_R, o_RH = lax.fori_loop(outer, high, partial(turn, edge=True), attended)
    o_RH = o_RH / jnp.maximum(sum_R, 1e-30)[:, None]
    o_RH = o_RH if v_unit is None else o_RH * v_unit
    lane_R, head_R = first_lane + begin + token_R, kv_head * group + member_R
    plt.store(out_refs[0].at[lane_R[:, None], head_R[:, None], feature[None, :]], o_RH.astype(out_refs[0].dtype), mask=live_RH)
    if len(out_refs) > 1:
        lse_R = (peak_R + jnp.log2(jnp.maximum(sum_R, 1e-30))) * LN2
        plt.store(out_refs[1].at[lane_R, head_R], lse_R, mask=(token_R < size) & (member_R < group))


def _prepared(q_NQH: Array, k_pages: Array, sinks, k_scale, v_scale) -> tuple[Array, dict[str, Array]]:
    """q as the kernels multiply it, and what else they read: sinks in base 2, and the scale of each kv head that has one."""
    extras = {} if sinks is None else {"sinks": sinks.astype(jnp.float32) * LOG2E}
    if k_pages.dtype == FP8:
        ones = jnp.ones(k_pages.shape[1], jnp.float32)
        extras["k_scale"], extras["v_scale"] = (WIDENED * (ones if x is None else x.astype(jnp.float32)) for x in (k_scale, v_scale))
        q_NQH = jnp.clip(q_NQH, -F16_MAX, F16_MAX).astype(jnp.float16)  # q of bfloat16 has no bits that float16 would round
    return q_NQH, extras


# Four bytes to two registers of two halves: each byte to the upper end of a half, then all but its sign one bit down.
_WIDEN = """{
.reg .b32 a, b, c, d;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.u32 c, a, 1;
shr.u32 d, b, 1;
and.b32 a, a, 0x80008000;
and.b32 b, b, 0x80008000;
lop3.b32 $0, c, 0x3f803f80, a, 0xea;
lop3.b32 $1, d, 0x3f803f80, b, 0xea;
}"""


def _widened(x, interpret: bool):
    """A block of fp8 pages as float16 numbers 1 / WIDENED as large: exact, and integer arithmetic only, which Ampere has too."""
    if x.dtype != FP8:
        return x
    bits = lax.bitcast_convert_type(x, jnp.uint8)
    if not interpret:
        result = jax.ShapeDtypeStruct(x.shape, jnp.float16)
        return plt.elementwise_inline_asm(_WIDEN, args=[bits], constraints="=r,=r,r", pack=4, result_shape_dtypes=[result])[0]
    bits = bits.astype(jnp.uint16)
    return lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)


def _units(extras, kv_head, scale):
    """What a score has to be multiplied by, and an output (None: by nothing)."""
    k_unit = scale * plt.load(extras["k_scale"].at[kv_head]) if "k_scale" in extras else scale
    v_unit = plt.load(extras["v_scale"].at[kv_head]) if "v_scale" in extras else None
    return k_unit, v_unit


def _nothing(lines: int, features: int):
    """An online softmax that has seen no token: (peak of base-2 scores, sum, output), float32."""
    return jnp.full((lines,), LOW, jnp.float32), jnp.zeros((lines,), jnp.float32), jnp.zeros((lines, features), jnp.float32)


def _dot(a, b, **options):
    """A dot in float32; float32 operands are not rounded to tf32 on the way."""
    return plt.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None, **options).astype(jnp.float32)


def _scores(q_RH, k_SH, scale, softcap, interpret):
    """Scores up to `_unit`."""
    s_RS = _dot(q_RH, _widened(k_SH, interpret), trans_b=True)
    return s_RS if softcap is None else jnp.tanh(s_RS * (scale / softcap))


def _unit(scale, softcap) -> float:
    """What `_scores` leaves to multiply by, with log2(e) so that exp2 serves: as the product in a fused multiply-add it costs nothing."""
    return LOG2E * (scale if softcap is None else softcap)


def _exp2(x, interpret: bool):
    """2 ** x in one instruction; jnp's takes four, to keep denormal results, and is what an interpreter knows."""
    if interpret:
        return jnp.exp2(x)
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plt.elementwise_inline_asm("ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[result])[0]


def _attend(attended, s_RS, v_SH, unit, interpret):
    """One turn of the online softmax, over scores of which each is `unit` in the exponent; -inf for what is not seen.

    The peak starts at LOW, which is finite, so that a line which sees nothing of a block keeps it and gets zeros. A large finite number
    in place of -inf would not do: multiplied by `unit` in a fused multiply-add it is not rounded, as the peak is, and their difference
    can be 1e22.
    """
    (peak_R, sum_R, o_RH), v_SH = attended, _widened(v_SH, interpret)
    new_R = jnp.maximum(peak_R, jnp.max(s_RS, axis=1) * unit)
    p_RS = _exp2(s_RS * unit - new_R[:, None], interpret)
    keep_R = _exp2(peak_R - new_R, interpret)
    return new_R, sum_R * keep_R + jnp.sum(p_RS, axis=1), o_RH * keep_R[:, None] + _dot(p_RS.astype(v_SH.dtype), v_SH)
