"""Paged prefill attention for Hopper in Mosaic GPU: two warpgroups attend, a third feeds them, a persistent grid of workers.

A tile is a run of one row's chunk tokens with the query heads of one kv head, packed into 2 x 64 lines, a warpgroup each. The feeding
warpgroup copies the tile's queries and the row's pages, newest first, by TMA into a ring of stages. Each attending warpgroup asks the
tensor cores for the scores of the next KV block and for the output of the last one together; the two get out of step by themselves, so that
one multiplies while the other exponentiates. Only blocks on the diagonal, or at a window's far edge, are masked.

Letters: N tokens, I tiles, R the 64 lines of a warpgroup, S tokens in a KV block, H features, C the columns that sums are kept in.
"""

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.work import Rows, Tiles

LOW = -1e30  # below every score, and finite: LOW - LOW is 0
LINES = 64  # of a warpgroup: wgmma's M
ATTENDING = 2  # warpgroups
KV_BLOCK = 128
STAGES = 2
COLUMNS = 8  # of wgmma's layout, of which each of four threads has two
LOG2E = math.log2(math.e)
LAYOUT = plgpu.Layout.WGMMA
ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]


def tile_tokens(group: int) -> int:
    """Chunk tokens in a tile."""
    return ATTENDING * (LINES // group)


@dataclass(frozen=True)
class _Options:
    """What is fixed when the kernel is compiled."""

    page_size: int
    kv_heads: int
    group: int
    head_dim: int
    first_lane: int
    workers: int
    scale: float
    window: int | None
    softcap: float | None
    interpret: bool

    @property
    def tokens(self) -> int:
        """Chunk tokens of a warpgroup."""
        return LINES // self.group

    @property
    def boxed(self) -> bool:
        """Whether a warpgroup's queries are copied as one box of [tokens, group, H]: its lines must be whole tokens."""
        return LINES % self.group == 0 and not self.interpret  # an interpreter cannot see a box as lines

    @property
    def by_rows(self):
        """How a warpgroup holds its lines to copy them between plain and swizzled memory without bank conflicts."""
        return plgpu.Layout.SMEM_GMEM_COPY((LINES, self.head_dim), jnp.bfloat16, 128)

    @property
    def unit(self) -> float:
        """What a score is multiplied by to be an exponent of 2, once it went through the softcap."""
        return LOG2E * (self.scale if self.softcap is None else self.softcap)


@partial(jax.jit, static_argnames=("workers", "scale", "window", "softcap", "interpret"))
def prefill(
    q_NQH: Array, k_pages: Array, v_pages: Array, rows: Rows, tiles: Tiles, *, workers: int, scale, window, softcap, interpret
) -> Array:
    """Attention of the lanes that `tiles` has -> [N, Q, H]; zeros in those of its gaps; the others are not written.

    tiles: see `work.tiles`. workers: thread blocks, one a multiprocessor.
    """
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    group, dtype = q_NQH.shape[1] // kv_heads, k_pages.dtype
    first_lane = rows.length_M.shape[0]
    options = _Options(page_size, kv_heads, group, head_dim, first_lane, workers, scale, window, softcap, interpret)
    copies = max(1, KV_BLOCK // page_size)
    plain = plgpu.SMEM((ATTENDING * options.tokens, group, head_dim) if options.boxed else (ATTENDING * LINES, head_dim), dtype)
    ring = plgpu.SMEM((STAGES, KV_BLOCK, head_dim), dtype, transforms=TILED)
    scratch = dict(
        q_plain=plain,
        o_plain=plain,
        q_s=plgpu.SMEM((ATTENDING, LINES, head_dim), dtype, transforms=TILED),
        k_s=ring,
        v_s=ring,
        # Each is named by a number that the kernel comes by: a constant's address would be kept from begin to end, and spilled.
        q_here=plgpu.Barrier(num_arrivals=1 if options.boxed else options.tokens, num_barriers=ATTENDING),
        q_free=plgpu.Barrier(num_arrivals=ATTENDING, num_barriers=2),
        k_here=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        v_here=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        k_free=plgpu.Barrier(num_arrivals=ATTENDING, num_barriers=STAGES),
        v_free=plgpu.Barrier(num_arrivals=ATTENDING, num_barriers=STAGES),
        clean=plgpu.Barrier(num_arrivals=ATTENDING, num_barriers=STAGES),
    )
    if interpret:
        scratch |= dict(p_s=plgpu.SMEM((ATTENDING, LINES, KV_BLOCK), dtype, transforms=TILED))
    return plgpu.kernel(
        partial(_kernel, options),
        out_type=jax.ShapeDtypeStruct(q_NQH.shape, dtype),
        scratch_types=scratch,
        grid=(workers,),
        grid_names=("worker",),
        num_threads=ATTENDING + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(
        q_NQH, k_pages, v_pages, rows.table_MP,
        tiles.row_I, tiles.begin_I, tiles.size_I, tiles.position_I, tiles.length_I, tiles.count_1,
    )  # fmt: skip


def _kernel(options: _Options, q, k, v, table, row, begin, size, position, length, count, o, **scratch):
    lists = dict(table=table, length=length, row=row, begin=begin, size=size, position=position, count=count)
    refs = SimpleNamespace(q=q, k=k, v=v, o=o, **lists, **scratch)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < ATTENDING)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _items(options, refs, partial(_attend_item, options, refs, warpgroup))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == ATTENDING)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        turns, fetched = _items(options, refs, partial(_fetch_item, options, refs))
        pl.when(fetched > 0)(lambda: _await_queries_taken(refs, fetched - 1))
        lax.fori_loop(jnp.maximum(turns - STAGES, 0), turns, partial(_drain, refs), ())


def _items(options: _Options, refs, attend):
    """Call `attend(item, turn, fetched)` for this worker's (tile, kv head)s; the KV blocks and the tiles with tokens it came by.

    The list is longest first; going over it to and fro gives every worker its part of the long ones and of the short ones.
    """
    worker = lax.axis_index("worker")
    total = refs.count[0] * options.kv_heads

    def index(lap):
        return lap * options.workers + jnp.where(lax.rem(lap, jnp.int32(2)) == 0, worker, options.workers - 1 - worker)

    def step(state):
        lap, turn, fetched, numbers = state
        following = _numbers(options, refs, index(lap + 1))  # on their way while this tile is worked on
        item = _item(options, index(lap), numbers)

        @pl.when(index(lap) < total)
        def _():
            attend(item, turn, fetched)

        blocks = jnp.where(index(lap) < total, item.blocks, 0)
        return lap + 1, turn + blocks, fetched + jnp.where(blocks > 0, 1, 0), following

    zero = jnp.int32(0)
    start = zero, zero, zero, _numbers(options, refs, index(zero))
    return lax.while_loop(lambda state: state[0] * options.workers < total, step, start)[1:3]


def _numbers(options: _Options, refs, index):
    """What the work list says of a (tile, kv head); of its last tile past the list's end."""
    tile = jnp.minimum(lax.div(index, jnp.int32(options.kv_heads)), refs.row.shape[0] - 1)
    return tuple(ref[tile] for ref in (refs.row, refs.begin, refs.size, refs.position, refs.length))


def _item(options: _Options, index, numbers):
    """Everything about one (tile, kv head): blocks are counted from the newest, `blocks` in all, the `masked`, `whole` and rest of them."""
    row, begin, size, position, length = numbers
    end, block = position + size, jnp.int32(KV_BLOCK)
    high = lax.div(end + block - 1, block)
    low = inner = jnp.int32(0)
    if options.window is not None:
        low = lax.div(jnp.maximum(position - options.window + 1, 0), block)
        inner = jnp.minimum(lax.div(jnp.maximum(end - options.window, 0) + block - 1, block), high)
    outer = jnp.maximum(lax.div(position + 1, block), inner)
    masked = 1 + jnp.maximum(high - 1 - outer, 0)
    return SimpleNamespace(
        head=lax.rem(index, jnp.int32(options.kv_heads)),
        row=row,
        lane=options.first_lane + begin,
        size=size,
        position=position,
        length=length,
        high=high,
        blocks=jnp.where(position < 0, 0, high - low),
        masked=masked,
        whole=jnp.maximum(masked, high - inner),
    )


def _fetch_item(options: _Options, refs, item, turn, fetched):
    """Copy a tile's queries, then its K and V blocks into the ring, as stages become free."""

    @pl.when(item.blocks > 0)
    def _():
        pl.when(fetched > 0)(lambda: _await_queries_taken(refs, fetched - 1))
        _fetch_queries(options, refs, item)

    last_page = lax.div(item.length - 1, jnp.int32(options.page_size))

    def fetch(i, pages, ring, here, free):
        stage = lax.rem(turn + i, jnp.int32(STAGES))
        pl.when(turn + i >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
        for source, target in _copies(options, refs, pages, ring.at[stage], item, item.high - 1 - i, last_page):
            plgpu.copy_gmem_to_smem(source, target, here.at[stage])

    def fetch_both(i, _):  # K a block ahead, as it is needed
        pl.when(i < item.blocks)(lambda: fetch(i, refs.k, refs.k_s, refs.k_here, refs.k_free))
        pl.when(i > 0)(lambda: fetch(i - 1, refs.v, refs.v_s, refs.v_here, refs.v_free))
        return ()

    lax.fori_loop(0, jnp.where(item.blocks > 0, item.blocks + 1, 0), fetch_both, ())


def _await_queries_taken(refs, fetched):
    plgpu.barrier_wait(refs.q_free.at[lax.rem(fetched, jnp.int32(2))])


def _fetch_queries(options: _Options, refs, item):
    """In one box a warpgroup, or token by token, as its group's heads lie together. Past the tile's end anything may come."""
    heads = pl.ds(item.head * options.group, options.group)
    if options.boxed:
        for warpgroup in range(ATTENDING):
            first = warpgroup * options.tokens
            source, target = (ref.at[pl.ds(at, options.tokens)] for ref, at in ((refs.q, item.lane + first), (refs.q_plain, first)))
            plgpu.copy_gmem_to_smem(source.at[:, heads], target, refs.q_here.at[warpgroup])
        return

    def fetch(token, _):
        for warpgroup in range(ATTENDING):
            lane = item.lane + jnp.minimum(warpgroup * options.tokens + token, item.size - 1)
            target = refs.q_plain.at[pl.ds(warpgroup * LINES + token * options.group, options.group)]
            plgpu.copy_gmem_to_smem(refs.q.at[lane, heads], target, refs.q_here.at[warpgroup])
        return ()

    lax.fori_loop(0, options.tokens, fetch, ())


def _lines(options: _Options, plain, warpgroup):
    """A warpgroup's part of unswizzled memory as lines."""
    lines = plain.reshape(ATTENDING * LINES, options.head_dim) if options.boxed else plain
    return lines.at[pl.ds(warpgroup * LINES, LINES)]


def _copies(options: _Options, refs, pages, tile, item, block, last_page):
    """The copies that fill one tile with KV block `block`: a part of one page, or several pages."""
    if options.page_size >= KV_BLOCK:
        per_page = options.page_size // KV_BLOCK
        page = refs.table[item.row, lax.div(block, jnp.int32(per_page))]
        slots = pl.ds(lax.rem(block, jnp.int32(per_page)) * KV_BLOCK, KV_BLOCK)
        return [(pages.at[page, item.head, slots], tile)]
    copies = KV_BLOCK // options.page_size
    # Past the row's end its last page comes again: the table says nothing there, and the barrier counts its copies.
    numbers = [refs.table[item.row, jnp.minimum(block * copies + j, last_page)] for j in range(copies)]
    return [(pages.at[page, item.head], tile.at[pl.ds(j * options.page_size, options.page_size)]) for j, page in enumerate(numbers)]


def _drain(refs, turn, _):
    """Await the completions that no later copy waited for: a barrier must end even."""
    stage = lax.rem(turn, jnp.int32(STAGES))
    plgpu.barrier_wait(refs.k_free.at[stage])
    plgpu.barrier_wait(refs.v_free.at[stage])
    return ()


def _attend_item(options: _Options, refs, warpgroup, item, turn, fetched):
    """One warpgroup's half of a tile, from queries to output."""
    o_plain = _lines(options, refs.o_plain, warpgroup)
    mine = SimpleNamespace(
        warpgroup=warpgroup, q_s=refs.q_s.at[warpgroup], p_s=refs.p_s.at[warpgroup] if options.interpret else None, turn=turn
    )

    @pl.when(item.blocks > 0)
    def _():
        plgpu.barrier_wait(refs.q_here.at[warpgroup])
        mine.q_s[...] = plgpu.load(_lines(options, refs.q_plain, warpgroup), layout=options.by_rows)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.q_free.at[lax.rem(fetched, jnp.int32(2))])
        mine.q_s[...] = _attend_blocks(options, refs, mine, item).astype(o_plain.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's copies still read o_plain
        plgpu.commit_smem()
        o_plain[...] = plgpu.load(mine.q_s, layout=options.by_rows)

    @pl.when(item.blocks == 0)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o_plain[...] = plgpu.layout_cast(jnp.zeros((LINES, options.head_dim), o_plain.dtype), options.by_rows)

    plgpu.commit_smem()
    _put(options, refs, item, warpgroup)


def _put(options: _Options, refs, item, warpgroup):
    """Copy a warpgroup's output out: in one box, or token by token where the tile has fewer of them."""
    first, heads = warpgroup * options.tokens, pl.ds(item.head * options.group, options.group)
    lane, count = item.lane + first, jnp.minimum(item.size - first, options.tokens)

    def put(token, _):
        lines = pl.ds(warpgroup * LINES + token * options.group, options.group)
        source = refs.o_plain.at[first + token] if options.boxed else refs.o_plain.at[lines]
        plgpu.copy_smem_to_gmem(source, refs.o.at[lane + token, heads])
        return ()

    if options.boxed:
        whole = count == options.tokens
        source, target = refs.o_plain.at[pl.ds(first, options.tokens)], refs.o.at[pl.ds(lane, options.tokens), heads]
        pl.when(whole)(lambda: plgpu.copy_smem_to_gmem(source, target))
        count = jnp.where(whole, 0, count)
    lax.fori_loop(0, count, put, ())


def _attend_blocks(options: _Options, refs, mine, item):
    """The tile's attention to all its blocks: scores run one block ahead of outputs."""
    stage = lax.rem(mine.turn, jnp.int32(STAGES))
    plgpu.barrier_wait(refs.k_here.at[stage])
    s_RS = _product(mine.q_s, refs.k_s.at[stage].transpose((1, 0)), (LINES, KV_BLOCK))
    plgpu.barrier_arrive(refs.k_free.at[stage])
    peak_R = plgpu.layout_cast(jnp.full((LINES,), LOW, jnp.float32), LAYOUT.reduce(1))
    sum_RC = plgpu.layout_cast(jnp.zeros((LINES, COLUMNS), jnp.float32), LAYOUT)
    peak_R, sum_RC, _, p_RS = _softmax(options, mine, item, s_RS, peak_R, sum_RC, item.high - 1)
    plgpu.barrier_wait(refs.v_here.at[stage])
    _clean_tail(refs, mine, item, stage)

    o_RH = plgpu.layout_cast(jnp.zeros((LINES, options.head_dim), jnp.float32), LAYOUT)
    state = (o_RH, peak_R, sum_RC, p_RS.astype(refs.k.dtype))
    attend = partial(_attend_interpreted if options.interpret else _attend_block, options, refs, mine, item)
    state = lax.fori_loop(1, item.masked, partial(attend, edge=True), state)
    state = lax.fori_loop(item.masked, item.whole, partial(attend, edge=False), state)
    if options.window is not None:
        state = lax.fori_loop(item.whole, item.blocks, partial(attend, edge=True), state)
    o_RH, _, sum_RC, p_RS = state

    stage = lax.rem(mine.turn + item.blocks - 1, jnp.int32(STAGES))
    pl.when(item.blocks > 1)(lambda: plgpu.barrier_wait(refs.v_here.at[stage]))
    if options.interpret:
        mine.p_s[...] = p_RS
        plgpu.commit_smem()
        o_RH += _product(mine.p_s, refs.v_s.at[stage], o_RH.shape)
    else:
        o_RH = pl.run_state(lambda out: plgpu.wgmma(out, p_RS, refs.v_s.at[stage]))(ACC.init(o_RH))
    plgpu.barrier_arrive(refs.v_free.at[stage])
    return o_RH * _each(1 / jnp.maximum(sum_RC.sum(axis=1), 1e-30), o_RH)


def _attend_block(options: _Options, refs, mine, item, i, state, *, edge):
    """One turn: the scores of block i (from the newest) and the output of block i - 1, asked for together."""
    o_RH, peak_R, sum_RC, p_RS = state
    stage, last = lax.rem(mine.turn + i, jnp.int32(STAGES)), lax.rem(mine.turn + i - 1, jnp.int32(STAGES))

    def ask(held):
        o_acc, peak, total, keep, p = held
        # Waited for before there is an accumulator: else the assembler zeroes its 64 registers, where it may tell the product not to add.
        plgpu.barrier_wait(refs.k_here.at[stage])
        pl.when(i > 1)(lambda: plgpu.barrier_wait(refs.v_here.at[last]))

        def scores(s_acc):
            plgpu.wgmma(s_acc, mine.q_s, refs.k_s.at[stage].transpose((1, 0)))
            plgpu.wgmma(o_acc, p_RS, refs.v_s.at[last])
            return lax.optimization_barrier(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))

        s_RS = pl.run_scoped(scores, ACC((LINES, KV_BLOCK), jnp.float32))
        plgpu.barrier_arrive(refs.k_free.at[stage])
        block = item.high - 1 - i if edge else None
        peak[...], total[...], keep[...], p[...] = _softmax(options, mine, item, s_RS, peak[...], total[...], block)

    new_RS = plgpu.layout_cast(jnp.zeros(p_RS.shape, jnp.float32), LAYOUT)
    o_RH, peak_R, sum_RC, keep_R, new_RS = pl.run_state(ask)((ACC.init(o_RH), peak_R, sum_RC, peak_R, new_RS))
    plgpu.barrier_arrive(refs.v_free.at[last])
    # Rounded only now: while the tensor cores still read the last weights, the new ones must not take their registers.
    o_RH, new_RS = lax.optimization_barrier((o_RH, new_RS))
    return o_RH * _each(keep_R, o_RH), peak_R, sum_RC, new_RS.astype(p_RS.dtype)


def _attend_interpreted(options: _Options, refs, mine, item, i, state, *, edge):
    """`_attend_block` for the interpreter, which knows no accumulator with a beginning and no operand in registers."""
    o_RH, peak_R, sum_RC, p_RS = state
    stage, last = lax.rem(mine.turn + i, jnp.int32(STAGES)), lax.rem(mine.turn + i - 1, jnp.int32(STAGES))
    plgpu.barrier_wait(refs.k_here.at[stage])
    pl.when(i > 1)(lambda: plgpu.barrier_wait(refs.v_here.at[last]))
    mine.p_s[...] = p_RS
    plgpu.commit_smem()
    s_RS = _product(mine.q_s, refs.k_s.at[stage].transpose((1, 0)), (LINES, KV_BLOCK))
    o_RH += _product(mine.p_s, refs.v_s.at[last], o_RH.shape)
    plgpu.barrier_arrive(refs.k_free.at[stage])
    plgpu.barrier_arrive(refs.v_free.at[last])
    peak_R, sum_RC, keep_R, new_RS = _softmax(options, mine, item, s_RS, peak_R, sum_RC, item.high - 1 - i if edge else None)
    return o_RH * _each(keep_R, o_RH), peak_R, sum_RC, new_RS.astype(p_RS.dtype)


def _masked(options: _Options, mine, item, s_RS, block):
    """-inf where a line's token does not see the slot: a finite number times `unit`, rounded or not, may be far above itself."""
    line_RS = plgpu.broadcasted_iota(jnp.int32, s_RS.shape, 0, layout=LAYOUT)
    key_RS = block * KV_BLOCK + plgpu.broadcasted_iota(jnp.int32, s_RS.shape, 1, layout=LAYOUT)
    token_RS = item.position + mine.warpgroup * options.tokens + lax.div(line_RS, jnp.int32(options.group))
    seen_RS = key_RS <= token_RS
    if options.window is not None:
        seen_RS &= key_RS > token_RS - options.window
    return jnp.where(seen_RS, s_RS, -jnp.inf)


def _softmax(options: _Options, mine, item, s_RS, peak_R, sum_RC, edge):
    """One turn of the online softmax: the peaks, the sums, what earlier outputs are to be multiplied with, and the weights.

    A line's sum is that over its columns, which are added up when all blocks are through: each thread has its own till then.
    edge: the number of a block that some tokens do not see whole, else None.
    """
    if options.softcap is not None:
        s_RS = jnp.tanh(s_RS * (options.scale / options.softcap))
    if edge is not None:
        s_RS = _masked(options, mine, item, s_RS, edge)
    new_R = jnp.maximum(peak_R, s_RS.max(axis=1) * options.unit)
    p_RS = jnp.exp2(s_RS * options.unit - _each(new_R, s_RS))
    keep_R = jnp.exp2(peak_R - new_R)
    new_RC = p_RS[:, :COLUMNS]
    for begin in range(COLUMNS, KV_BLOCK, COLUMNS):
        new_RC += p_RS[:, begin : begin + COLUMNS]
    return new_R, sum_RC * _each(keep_R, sum_RC) + new_RC, keep_R, p_RS


def _each(x_R, like):
    """A line's number in each of its columns."""
    return lax.broadcast_in_dim(x_R, like.shape, [0])


def _clean_tail(refs, mine, item, stage):
    """Zero the first block's V past the row's end, half a warpgroup each: a slot nobody wrote may hold NaN, and 0 * NaN is NaN."""
    length, half, position = item.length, KV_BLOCK // ATTENDING, (item.high - 1) * KV_BLOCK

    @pl.when(position + KV_BLOCK > length)
    def _():
        for warpgroup in range(ATTENDING):

            @pl.when(mine.warpgroup == warpgroup)
            def _(first=warpgroup * half):
                tail = refs.v_s.at[stage, pl.ds(first, half)]
                v_SH = tail[...]
                position_SH = position + first + plgpu.broadcasted_iota(jnp.int32, v_SH.shape, 0, layout=LAYOUT)
                tail[...] = jnp.where(position_SH < length, v_SH, jnp.zeros_like(v_SH))

        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.clean.at[stage])
        plgpu.barrier_wait(refs.clean.at[stage])


def _product(a, b, shape):
    """a @ b of two tiles in shared memory, in registers. A fresh accumulator each time: the interpreter knows no other."""

    def multiply(out):
        plgpu.wgmma(out, a, b)
        return out[...]

    return pl.run_scoped(multiply, ACC(shape, jnp.float32))
