"""Paged decode attention for any GPU from Ampere on, as one Pallas-Triton kernel, which a CPU can interpret.

Flat stream-K: each worker of a fixed grid walks its share of the step's KV blocks in one loop that does not end where a row does, so that
the next row's keys are under way while the last one's are multiplied. A (row, kv head) that one worker has for itself is written out at
once. One that is cut leaves a part with each of its workers, and whichever of them is done last joins the parts, in the order of the
workers, so that the result does not depend on who that was. A part is a softmax over some of the row's KV blocks, already divided by its
own sum, with the base-2 logarithm of that sum beside it.

Letters: M rows, Q query heads, K kv heads, H features, P pages, W workers; R query lines of a group, S tokens in a KV block, T workers
whose parts are joined in a turn, L planes of features. Triton wants powers of two, so lines and features are padded with masks. `lax.div`
and `lax.rem` stand for // and %, which fail to lower inside loops.
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention_portable import F16_MAX, FP8, LN2, LOG2E, LOW, WIDENED, _dot, _exp2, _unit
from pallas_kernels.blocks import Decode, features
from pallas_kernels.launch import launch_next
from pallas_kernels.work import CUT, ROW, Rows, Shares

JOINED = 64  # numbers of parts that a thread joins in one turn: one row of 640 tokens has ten parts, and a turn waits for memory
UNREAD = ("arrived", "unused")  # of a line of the plan


@partial(jax.jit, static_argnames=("blocks", "lse", "scale", "window", "softcap", "interpret"))
def decode(
    q_NQH: Array, k_pages: Array, v_pages: Array, rows: Rows, shares: Shares, blocks: Decode, chunk: tuple[Array, ...] | None, *,
    lse, sinks_Q, k_scale_K, v_scale_K, scale, window, softcap, interpret,
) -> tuple[Array, ...]:  # fmt: skip
    """Attention of the M decode lanes: (o [M, Q, H],), zeros where no row decodes; with `lse` also the log-sum-exp [M, Q], -inf there.

    chunk: the same of all N lanes, whose first M are then written in place. The plan's counters are counted up and set back: calls that
    share a plan run one after another, as those of a step's layers do.
    """
    (_, kv_heads, page_size, head_dim), heads = k_pages.shape, q_NQH.shape[1]
    count, workers, planes = rows.length_M.shape[0], shares.cut_WF.shape[0] - 1, 2 if k_pages.dtype == FP8 else 1
    out = (jax.ShapeDtypeStruct((count, heads, head_dim), q_NQH.dtype), jax.ShapeDtypeStruct((count, heads), jnp.float32))[: 1 + lse]
    q_LNQH, extras = q_NQH[None], {} if sinks_Q is None else {"sinks": sinks_Q.astype(jnp.float32) * LOG2E}
    if planes == 2:
        ones = jnp.ones(kv_heads, jnp.float32)
        extras["k_scale"], extras["v_scale"] = (WIDENED * (ones if x is None else x.astype(jnp.float32)) for x in (k_scale_K, v_scale_K))
        k_pages, v_pages = _pairs(k_pages), _pairs(v_pages)
        q_MQH = jnp.clip(q_NQH[:count], -F16_MAX, F16_MAX).astype(jnp.float16)  # q of bfloat16 has no bits that float16 would round
        q_LNQH = jnp.stack([q_MQH[..., plane::2] for plane in range(2)])
    inputs = (q_LNQH, k_pages, v_pages, rows.table_MP, shares.row_MF, shares.cut_WF, *extras.values())
    written, parts = chunk or (), (2 * workers, heads // kv_heads)
    outputs = *(chunk or out), jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)
    options = _Options(heads // kv_heads, kv_heads, page_size, head_dim, planes, blocks, workers, lse, scale, window, softcap, interpret)
    done = pl.pallas_call(
        partial(_kernel, options, tuple(extras)),
        grid=(workers,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        input_output_aliases={len(inputs) + i: i for i in range(len(written))},
        compiler_params=plt.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
        name="paged_decode",
    )(*inputs, *written)
    return tuple(done[: len(out)])


@dataclass(frozen=True)
class _Options:
    """What is fixed when the kernel is compiled."""

    group: int
    kv_heads: int
    page_size: int
    head_dim: int
    planes: int  # 2 for fp8 pages: even features and odd ones
    blocks: Decode
    workers: int
    lse: bool
    scale: float
    window: int | None
    softcap: float | None
    interpret: bool

    @property
    def kv_block(self) -> int:
        return self.blocks.kv_block

    @property
    def paged(self) -> bool:
        """Whether a KV block is in one page."""
        return self.page_size % self.kv_block == 0

    @property
    def lines(self) -> Array:
        return jnp.arange(max(16, pl.next_power_of_2(self.group)))

    @property
    def plane(self) -> Array:
        """The features of a plane, padded."""
        return jnp.arange(features(self.head_dim // self.planes))

    @property
    def features(self) -> Array:
        """Those of all planes."""
        return jnp.arange(features(self.head_dim // self.planes) * self.planes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Row:
    """A row that decodes."""

    row: Array
    length: Array

    def begin(self, options: "_Options") -> Array:
        """Its first KV block inside the window."""
        if options.window is None:
            return jnp.int32(0)
        return lax.div(jnp.maximum(self.length - options.window, 0), jnp.int32(options.kv_block))

    def end(self, options: "_Options") -> Array:
        """The KV block after its last."""
        return lax.div(self.length + (options.kv_block - 1), jnp.int32(options.kv_block))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Place:
    """Where a worker is: a KV block of a head of a row, its page or those of its tokens, and the row to come after this one."""

    here: _Row
    head: Array
    block: Array
    page: Array
    later: _Row


def _kernel(options: _Options, names, q, k, v, table, row, cut, *rest):
    extras, outputs = dict(zip(names, rest, strict=False)), rest[-3 - options.lse :]
    refs = SimpleNamespace(q=q, k=k, v=v, table=table, row=row, cut=cut, extras=extras, o=outputs[0])
    refs.lse = outputs[1] if options.lse else None
    refs.part, refs.part_lse = outputs[-2:]
    worker = pl.program_id(0)
    here, there = _line(refs.cut, CUT, worker), _line(refs.cut, CUT, worker + 1)  # the next worker begins where this one stops
    pl.when(here.idle > 0)(partial(_zeros, options, refs, worker))
    begin, stop = here.entry, there.entry
    row = _Row(here.row, here.length)
    page = here.page if options.paged else _pages(options, refs, row, here.block)
    at = _Place(row, here.head, here.block, page, _Row(here.next, here.next_length))

    @pl.when(begin < stop)
    def _():
        start = at, jnp.bool_(False), _nothing(options)
        lax.fori_loop(begin, stop, partial(_turn, options, refs, worker, stop), start)
        _join_cut(options, refs, (here, there))


def _line(ref, names, place):
    """The numbers of a line of the plan, by name."""
    return SimpleNamespace(**{name: plt.load(ref.at[place, jnp.int32(column)]) for column, name in enumerate(names) if name not in UNREAD})


def _pages(options: _Options, refs, here: _Row, block):
    """The page of a KV block, or of each of its tokens. It is looked up a turn before its keys are wanted."""
    position, size = block * options.kv_block, jnp.int32(options.page_size)
    if options.paged:
        return plt.load(refs.table.at[here.row, lax.div(position, size)])
    position_S = position + jnp.arange(options.kv_block)
    return plt.load(refs.table.at[here.row, lax.div(position_S, size)], mask=position_S < here.length, other=0)


def _following(options: _Options, refs, at: _Place) -> _Place:
    """The next block of the flat list. All that it loads is for the turn after the next, but for the page."""
    block = at.block + 1
    turned = block == at.here.end(options)
    head = jnp.where(turned, at.head + 1, at.head)
    left = head == options.kv_heads
    here = jax.tree.map(partial(jnp.where, left), at.later, at.here)
    block = jnp.where(turned, here.begin(options), block)
    line = _line(refs.row, ROW, here.row)
    return _Place(here, jnp.where(left, 0, head), block, _pages(options, refs, here, block), _Row(line.next, line.next_length))


def _turn(options: _Options, refs, worker, stop, i, state):
    """Attend to one KV block. opened: whether this worker has the (row, head) from its first block on."""
    (at, opened, attended), group = state, options.group
    line, feature, live_H = options.lines, options.plane, options.plane < options.head_dim // options.planes
    position = at.block * options.kv_block
    position_S = position + jnp.arange(options.kv_block)
    seen_S = position_S < at.here.length
    if options.window is not None:
        seen_S &= position_S >= at.here.length - options.window
    if options.paged:
        page, place_S = at.page, lax.rem(position, jnp.int32(options.page_size)) + jnp.arange(options.kv_block)
    else:
        page, place_S = at.page[:, None], lax.rem(position_S, jnp.int32(options.page_size))
    index, live_SH = (page, at.head, place_S[:, None], feature[None, :]), seen_S[:, None] & live_H[None, :]
    k_LSH, v_LSH = (_planes(plt.load(ref.at[index], mask=live_SH, other=0), options.interpret) for ref in (refs.k, refs.v))
    index, live_RH = (at.here.row, at.head * group + line[:, None], feature[None, :]), (line < group)[:, None] & live_H[None, :]
    q_LRH = [plt.load(refs.q.at[(plane, *index)], mask=live_RH, other=0) for plane in range(options.planes)]

    opens, closes = at.block == at.here.begin(options), at.block + 1 == at.here.end(options)
    opened |= opens
    if "sinks" in refs.extras:
        sink_R = plt.load(refs.extras["sinks"].at[at.head * group + line], mask=line < group, other=LOW)
        attended = (jnp.where(opens, sink_R, attended[0]), jnp.where(opens, 1.0, attended[1]), attended[2])
    unit = options.scale * plt.load(refs.extras["k_scale"].at[at.head]) if "k_scale" in refs.extras else options.scale
    s_RS = sum(_dot(q_RH, k_SH, trans_b=True) for q_RH, k_SH in zip(q_LRH, k_LSH, strict=True))
    s_RS = s_RS if options.softcap is None else jnp.tanh(s_RS * (unit / options.softcap))
    s_RS = jnp.where(seen_S[None, :], s_RS, -jnp.inf)
    attended = _attend(attended, s_RS, v_LSH, _unit(unit, options.softcap), options.interpret)
    leave = partial(_leave, options, refs, worker, at, opened, closes)
    attended = lax.cond(closes | (i + 1 == stop), leave, lambda attended: attended, attended)
    return _following(options, refs, at), opened, attended


def _leave(options: _Options, refs, worker, at: _Place, opened, closes, attended):
    """Write what this worker has of a (row, head): the whole of it to its place, a piece to a part. Each worker has two parts at most."""
    peak_R, sum_R, o_LRH = attended
    line, feature = options.lines, options.features
    sum_R, live_R, whole, lane_R = jnp.maximum(sum_R, 1e-30), line < options.group, opened & closes, at.head * options.group + line
    o_RH = o_LRH[0] if options.planes == 1 else jnp.stack(o_LRH, axis=-1).reshape(line.shape[0], -1)
    o_RH = o_RH / sum_R[:, None]
    o_RH = o_RH * plt.load(refs.extras["v_scale"].at[at.head]) if "v_scale" in refs.extras else o_RH
    lse_R, live_RH = peak_R + jnp.log2(sum_R), live_R[:, None] & (feature < options.head_dim)[None, :]
    plt.store(refs.o.at[at.here.row, lane_R[:, None], feature[None, :]], o_RH.astype(refs.o.dtype), mask=live_RH & whole)
    if options.lse:
        plt.store(refs.lse.at[at.here.row, lane_R], lse_R * LN2, mask=live_R & whole)
    part = 2 * worker + opened.astype(jnp.int32)
    plt.store(refs.part.at[part, line[:, None], feature[None, :]], o_RH, mask=live_RH & ~whole)
    plt.store(refs.part_lse.at[part, line], lse_R, mask=live_R & ~whole)
    return _nothing(options)


def _zeros(options: _Options, refs, worker):
    """Write the lanes of rows that do not decode, each by one worker."""
    head, feature = jnp.arange(pl.next_power_of_2(options.kv_heads * options.group)), options.features
    live_Q, rows = head < options.kv_heads * options.group, refs.row.shape[0]

    def zero(turn, _):
        row = worker + turn * options.workers

        @pl.when(_line(refs.row, ROW, row).count == 0)
        def _():
            index, live_QH = (row, head[:, None], feature[None, :]), live_Q[:, None] & (feature < options.head_dim)[None, :]
            plt.store(refs.o.at[index], jnp.zeros(live_QH.shape, refs.o.dtype), mask=live_QH)
            if options.lse:
                plt.store(refs.lse.at[row, head], jnp.full(head.shape, -jnp.inf), mask=live_Q)

        return ()

    lax.fori_loop(jnp.int32(0), lax.div(rows - 1 - worker + options.workers, jnp.int32(options.workers)), zero, ())


def _join_cut(options: _Options, refs, cuts):
    """Arrive at the (row, head) that this worker began inside of and at the one it stopped in; join the parts where it is the last to.

    cuts: the lines of the plan for both, read before the loop: whoever is last has nothing more to look up.
    """
    if not options.interpret:
        plt.debug_barrier()  # all threads have written their parts before one of them says so

    def look(turn, joined):
        row, head, first, last = (
            jnp.where(turn == 0, *(getattr(cut, name) for cut in cuts)) for name in ("row", "head", "opener", "closer")
        )
        cut = (first >= 0) & (first != joined)

        @pl.when(cut)
        def _():
            # One worker at most has a given one as the first of a cut (row, head). The atomic releases and acquires.
            counter = first, jnp.int32(CUT.index("arrived"))
            arrived = plt.atomic_add(refs.cut, counter, jnp.int32(1))

            @pl.when(arrived == last - first)
            def _():
                plt.store(refs.cut.at[counter], jnp.int32(0))  # as the next layer must find it
                _join(options, refs, row, head, first, last, arrived)

        return jnp.where(cut, first, joined)

    lax.fori_loop(jnp.int32(0), jnp.int32(2), look, jnp.int32(-1))


def _join(options: _Options, refs, row, head, first, last, arrived):
    """Write a (row, head) from the parts that workers [first, last] left. arrived: how many had before this one."""
    lines = pl.next_power_of_2(options.group)
    line, feature = jnp.arange(lines), options.features
    together = max(1, JOINED * 32 * options.blocks.num_warps // (lines * feature.shape[0]))
    live_R, live_H = line < options.group, feature < options.head_dim

    def turn(i, state):
        peak_R, sum_R, o_RH = state
        worker_T = first + i * together + jnp.arange(together)
        part_T = 2 * worker_T + (worker_T == first).astype(jnp.int32)
        live_TR = (worker_T <= last)[:, None] & live_R[None, :]
        lse_TR = plt.load(refs.part_lse.at[part_T[:, None], line[None, :]], mask=live_TR, other=LOW)
        index = part_T[:, None, None], line[None, :, None], feature[None, None, :]
        o_TRH = plt.load(refs.part.at[index], mask=live_TR[:, :, None] & live_H[None, None, :], other=0.0)
        new_R = jnp.maximum(peak_R, jnp.max(lse_TR, axis=0))
        weight_TR, keep_R = jnp.exp2(lse_TR - new_R[None, :]), jnp.exp2(peak_R - new_R)
        more_RH = jnp.sum(weight_TR[:, :, None] * o_TRH, axis=0)
        return new_R, sum_R * keep_R + jnp.sum(weight_TR, axis=0), o_RH * keep_R[:, None] + more_RH

    low_R = jnp.full(lines, LOW, jnp.float32)
    if options.blocks.early and not options.interpret:
        low_R = launch_next(low_R, arrived + 1)  # always, and not before this worker knows that it is the last
    nothing = low_R, jnp.zeros(lines, jnp.float32), jnp.zeros((lines, feature.shape[0]), jnp.float32)
    peak_R, sum_R, o_RH = lax.fori_loop(jnp.int32(0), lax.div(last - first + together, jnp.int32(together)), turn, nothing)
    sum_R, lane_R = jnp.maximum(sum_R, 1e-30), head * options.group + line
    o_RH = (o_RH / sum_R[:, None]).astype(refs.o.dtype)
    plt.store(refs.o.at[row, lane_R[:, None], feature[None, :]], o_RH, mask=live_R[:, None] & live_H[None, :])
    if options.lse:
        plt.store(refs.lse.at[row, lane_R], (peak_R + jnp.log2(sum_R)) * LN2, mask=live_R)


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


def _nothing(options: _Options):
    """An online softmax that has seen no token: (peak of base-2 scores, sum, output by plane), float32."""
    lines, width = options.lines.shape[0], options.plane.shape[0]
    low, zero = jnp.full((lines,), LOW, jnp.float32), jnp.zeros((lines,), jnp.float32)
    return low, zero, [jnp.zeros((lines, width), jnp.float32) for _ in range(options.planes)]


def _attend(attended, s_RS, v_SH, unit, interpret):
    """One turn of the online softmax, over scores of which each is `unit` in the exponent; -inf for what is not seen."""
    peak_R, sum_R, o_LRH = attended
    new_R = jnp.maximum(peak_R, jnp.max(s_RS, axis=1) * unit)
    p_RS = _exp2(s_RS * unit - new_R[:, None], interpret)
    keep_R = _exp2(peak_R - new_R, interpret)
    o_LRH = [o_RH * keep_R[:, None] + _dot(p_RS.astype(v.dtype), v) for o_RH, v in zip(o_LRH, v_SH, strict=True)]
    return new_R, sum_R * keep_R + jnp.sum(p_RS, axis=1), o_LRH
