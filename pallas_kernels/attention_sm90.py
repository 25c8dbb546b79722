"""Paged decode attention for Hopper in Mosaic GPU: TMA copies, mbarriers and wgmma, the whole grid resident.

Flat stream-K, as in `attention_portable`: each worker (one thread block) walks its share of the KV blocks of the step and leaves a part
for every (row, kv head) it met. One warpgroup copies pages into a ring of stages, the other multiplies; wgmma takes 64 lines at least, so
the up to 64 query heads of a group ride for the price of one.

Letters: R the 64 lines, S tokens in a KV block, H features, G lines of the group copied in and out.
"""

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention_combine import LOW
from pallas_kernels.work import Rows, Shares

LINES = 64
FASTER_HEAD_DIMS: tuple[int, ...] = ()  # than portable's decode as tuned on an H200: 53 to 45 us for 256 rows of 1024 with 14/2 heads of 64
KV_BLOCK = 64
LOG2E = math.log2(math.e)
LAYOUT = plgpu.Layout.WGMMA
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
STAGES = {64: 4, 128: 4}  # by head_dim: 64 and 128 kB of K and V in flight
WORKERS_PER_CORE = {64: 2, 128: 1}  # what the shared memory holds: 97 and 185 kB a worker


def group_lines(group: int) -> int:
    """Lines that a group takes in a part: TMA copies tiles of eight."""
    return -(-group // 8) * 8


def packs(group: int) -> bool:
    """Whether each group lies within one run of aligned lines of q as it is: [N, Q, H] then needs no padding."""
    return group % 8 == 0 or 8 % group == 0


def decode(
    q_NQH: Array, k_pages: Array, v_pages: Array, rows: Rows, shares: Shares, *, scale, window, softcap, interpret
) -> tuple[Array, Array]:
    """The parts of every decode row, for `combine`: o [parts, G, H] and base-2 log-sum-exp [parts, G], float32."""
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    group, dtype = q_NQH.shape[1] // kv_heads, k_pages.dtype
    lines, stages, workers = group_lines(group), STAGES[head_dim], shares.row_W.shape[0]
    parts = rows.length_M.shape[0] * kv_heads + workers
    copies = max(1, KV_BLOCK // page_size)
    options = _Options(page_size, kv_heads, group, lines, stages, scale, window, softcap)
    return plgpu.kernel(
        partial(_kernel, options),
        out_type=(jax.ShapeDtypeStruct((parts, lines, head_dim), jnp.float32), jax.ShapeDtypeStruct((parts, lines), jnp.float32)),
        scratch_types=dict(
            q_s=plgpu.SMEM((LINES, head_dim), dtype, transforms=TILED),
            k_s=plgpu.SMEM((stages, KV_BLOCK, head_dim), dtype, transforms=TILED),
            v_s=plgpu.SMEM((stages, KV_BLOCK, head_dim), dtype, transforms=TILED),
            p_s=plgpu.SMEM((LINES, KV_BLOCK), dtype, transforms=TILED),
            o_s=plgpu.SMEM((LINES, head_dim), jnp.float32),
            lse_s=plgpu.SMEM((LINES,), jnp.float32),
            q_here=plgpu.Barrier(),
            k_here=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            v_here=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            k_free=plgpu.Barrier(num_barriers=stages),
            v_free=plgpu.Barrier(num_barriers=stages),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(
        _lines(q_NQH, group, rows.length_M.shape[0]), k_pages, v_pages, rows.table_MP, rows.length_M, shares.first_M, shares.count_M,
        shares.start_M1, shares.next_M, shares.bound_W1, shares.row_W,
    )  # fmt: skip


@dataclass(frozen=True)
class _Options:
    """What is fixed when the kernel is compiled."""

    page_size: int
    kv_heads: int
    group: int
    lines: int
    stages: int
    scale: float
    window: int | None
    softcap: float | None


def _lines(q_NQH: Array, group: int, rows: int) -> Array:
    """q as lines [n, H], so that `_line_of` finds a group by eights."""
    count, heads, head_dim = q_NQH.shape
    if packs(group):
        return jnp.pad(q_NQH.reshape(count * heads, head_dim), ((0, -count * heads % 8), (0, 0)))
    q_MKGH = q_NQH[:rows].reshape(rows, heads // group, group, head_dim)
    q_MKGH = jnp.pad(q_MKGH, ((0, 0), (0, 0), (0, group_lines(group) - group), (0, 0)))
    return q_MKGH.reshape(-1, head_dim)


def _line_of(row, head, options: _Options):
    """The first line to copy for a group: its own first one, or the aligned one before it."""
    step = options.group if packs(options.group) else options.lines
    return lax.div((row * options.kv_heads + head) * step, jnp.int32(options.lines)) * options.lines


def _kernel(options: _Options, q, k, v, table, length, first, count, start, following, bound, row, o, lse, **scratch):
    lists = dict(table=table, length=length, first=first, count=count, start=start, following=following, bound=bound, row=row)
    refs = SimpleNamespace(q=q, k=k, v=v, o=o, lse=lse, **lists, **scratch)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        _segments(refs, partial(_attend_segment, options, refs))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _():
        turns = _segments(refs, partial(_fetch_segment, options, refs))
        lax.fori_loop(jnp.maximum(turns - options.stages, 0), turns, partial(_drain, options, refs), ())


def _segments(refs, segment):
    """Call `segment(row, head, block, blocks, turn)` for each (row, kv head) of this worker's share; the number of turns, one a KV block.

    Both warpgroups walk the same list, so that `turn % stages` is the same stage to both.
    """
    worker = lax.axis_index("worker")
    end = refs.bound[worker + 1]

    def step(state):
        at, row, turn = state
        count = refs.count[row]
        offset = at - refs.start[row]
        head, skipped = lax.div(offset, count), lax.rem(offset, count)
        blocks = jnp.minimum(count - skipped, end - at)
        segment(row, head, refs.first[row] + skipped, blocks, turn)
        at += blocks
        return at, jnp.where(at >= refs.start[row + 1], refs.following[row], row), turn + blocks

    return lax.while_loop(lambda state: state[0] < end, step, (refs.bound[worker], refs.row[worker], jnp.int32(0)))[2]


def _fetch_segment(options, refs, row, head, block, blocks, turn):
    """Copy the segment's K and V blocks into the ring, as stages become free."""
    last_page = lax.div(refs.length[row] - 1, jnp.int32(options.page_size))
    rings = ((refs.k, refs.k_s, refs.k_here, refs.k_free), (refs.v, refs.v_s, refs.v_here, refs.v_free))

    def fetch(i, _):
        stage = lax.rem(turn + i, jnp.int32(options.stages))
        for pages, ring, here, free in rings:

            @pl.when(turn + i >= options.stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[stage])

            for source, target in _copies(options, refs, pages, ring.at[stage], row, head, block + i, last_page):
                plgpu.copy_gmem_to_smem(source, target, here.at[stage])
        return ()

    lax.fori_loop(0, blocks, fetch, ())


def _copies(options, refs, pages, tile, row, head, block, last_page):
    """The copies that fill one tile with KV block `block`: a part of one page, or several pages."""
    if options.page_size >= KV_BLOCK:
        per_page = options.page_size // KV_BLOCK
        page = refs.table[row, lax.div(block, jnp.int32(per_page))]
        slots = pl.ds(lax.rem(block, jnp.int32(per_page)) * KV_BLOCK, KV_BLOCK)
        return [(pages.at[page, head, slots], tile)]
    copies = KV_BLOCK // options.page_size
    # Past the row's end its last page comes again: the table says nothing there, and the barrier counts its copies.
    numbers = [refs.table[row, jnp.minimum(block * copies + j, last_page)] for j in range(copies)]
    return [(pages.at[page, head], tile.at[pl.ds(j * options.page_size, options.page_size)]) for j, page in enumerate(numbers)]


def _drain(options, refs, turn, _):
    """Await the completions that no later copy waited for: a barrier must end even."""
    stage = lax.rem(turn, jnp.int32(options.stages))
    plgpu.barrier_wait(refs.k_free.at[stage])
    plgpu.barrier_wait(refs.v_free.at[stage])
    return ()


def _attend_segment(options, refs, row, head, block, blocks, turn):
    """Attend to the segment's KV blocks and copy its part out."""
    plgpu.copy_gmem_to_smem(
        refs.q.at[pl.ds(_line_of(row, head, options), options.lines)], refs.q_s.at[pl.ds(0, options.lines)], refs.q_here
    )
    plgpu.barrier_wait(refs.q_here)
    length, head_dim = refs.length[row], refs.q.shape[-1]
    peak_R = plgpu.layout_cast(jnp.full((LINES,), LOW, jnp.float32), LAYOUT.reduce(1))
    sum_R = plgpu.layout_cast(jnp.zeros((LINES,), jnp.float32), LAYOUT.reduce(1))
    o_RH = plgpu.layout_cast(jnp.zeros((LINES, head_dim), jnp.float32), LAYOUT)
    attend = partial(_attend_block, options, refs, length, block, turn)
    peak_R, sum_R, o_RH = lax.fori_loop(0, blocks, attend, (peak_R, sum_R, o_RH))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last part's copy still reads o_s
    refs.o_s[...] = o_RH / lax.broadcast_in_dim(jnp.maximum(sum_R, 1e-30), o_RH.shape, [0])
    refs.lse_s[...] = peak_R + jnp.log(jnp.maximum(sum_R, 1e-30)) * LOG2E
    plgpu.commit_smem()
    part = row * options.kv_heads + head + lax.axis_index("worker")
    plgpu.copy_smem_to_gmem(refs.o_s.at[pl.ds(0, options.lines)], refs.o.at[part])
    plgpu.copy_smem_to_gmem(refs.lse_s.at[pl.ds(0, options.lines)], refs.lse.at[part])


def _attend_block(options, refs, length, first_block, first_turn, i, state):
    """One turn of the online softmax, over KV block `first_block + i`."""
    peak_R, sum_R, o_RH = state
    stage = lax.rem(first_turn + i, jnp.int32(options.stages))
    position = (first_block + i) * KV_BLOCK
    oldest = jnp.int32(0) if options.window is None else jnp.maximum(length - options.window, 0)

    plgpu.barrier_wait(refs.k_here.at[stage])
    s_RS = _product(refs.q_s, refs.k_s.at[stage].transpose((1, 0)), (LINES, KV_BLOCK))
    plgpu.barrier_arrive(refs.k_free.at[stage])
    if options.softcap is None:
        s_RS = s_RS * (options.scale * LOG2E)
    else:
        s_RS = jnp.tanh(s_RS * (options.scale / options.softcap)) * (options.softcap * LOG2E)
    position_RS = position + plgpu.broadcasted_iota(jnp.int32, (LINES, KV_BLOCK), 1, layout=LAYOUT)
    seen_RS = position_RS < length
    if options.window is not None:
        seen_RS &= position_RS >= oldest
    s_RS = jnp.where(seen_RS, s_RS, LOW)

    new_R = jnp.maximum(peak_R, s_RS.max(axis=1))
    keep_R = jnp.exp2(peak_R - new_R)
    p_RS = jnp.exp2(s_RS - lax.broadcast_in_dim(new_R, s_RS.shape, [0]))
    sum_R = sum_R * keep_R + p_RS.sum(axis=1)
    o_RH = o_RH * lax.broadcast_in_dim(keep_R, o_RH.shape, [0])
    refs.p_s[...] = p_RS.astype(refs.p_s.dtype)
    plgpu.commit_smem()

    plgpu.barrier_wait(refs.v_here.at[stage])

    @pl.when((position + KV_BLOCK > length) | (position < oldest))
    def _():  # slots outside [oldest, length) may hold NaN, and 0 * NaN is NaN
        v_SH = refs.v_s[stage]
        position_SH = position + plgpu.broadcasted_iota(jnp.int32, v_SH.shape, 0, layout=LAYOUT)
        seen_SH = (position_SH < length) & (position_SH >= oldest)
        refs.v_s[stage] = jnp.where(seen_SH, v_SH, jnp.zeros_like(v_SH))
        plgpu.commit_smem()

    o_RH = o_RH + _product(refs.p_s, refs.v_s.at[stage], o_RH.shape)
    plgpu.barrier_arrive(refs.v_free.at[stage])
    return new_R, sum_R, o_RH


def _product(a, b, shape):
    """a @ b of two tiles in shared memory, in registers. A fresh accumulator each time: the interpreter knows no other."""

    def multiply(out):
        plgpu.wgmma(out, a, b)
        return out[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]
