"""Linear layers for hundreds of rows and more on Hopper, in Mosaic GPU: persistent blocks, and rows that nobody has are left out.

Such a product is bound by arithmetic. A thread block multiplies a tile of rows with a tile of output features: one warpgroup copies their
inputs into a ring by TMA, two multiply, half of the rows each, and copy their output out while the next tile's inputs are on their way.
Two blocks of a cluster may take rows that follow each other, and share the copies of their weights. Tiles that are left when every block
has had as many as the others are cut into narrower ones, so that all blocks end together. How wide a product's tiles are is chosen by
arithmetic, for the same reason. A step's shape has more lanes than its rows and prompts fill; which of them are filled is data, and a tile
that holds none of those is not computed.

N rows, D inputs, F output features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.matmul_sm90 import LINES, SHARED, TILED

GROUPS = 2  # warpgroups that multiply, LINES rows each
ROWS = GROUPS * LINES  # of a tile
WIDTHS = range(256, LINES - 1, -32)  # features of a tile, of gate and up together, the widest first: wgmma's
WIDE = WIDTHS[0]
COPIED = 64  # at the most: products are a multiple
INPUTS = 64  # of a turn
COLD = 2000  # clocks until a stage has weights from the device's memory: by 1,024 rows of 0.5B's down, 76 turns of 64 features in 29 us
BAND = 8  # tiles of features that all rows go through before the next ones: their weights stay in the second-level cache
ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Tile:
    """cluster: 1, or 2 blocks that share the copies of their weights. features: of a gated product, gate's and up's together."""

    cluster: int = 2
    features: int = WIDE


def fits(rows: int, features: int, inputs: int) -> bool:
    """Can the kernel take so many rows of this product? Copies go by eight rows, and by 64 features and inputs."""
    return rows % 8 == 0 and features % COPIED == 0 and inputs % INPUTS == 0


def tile_for(rows: int, features: int, gated: bool, workers: int) -> Tile:
    """The tile that should take the fewest clocks; the widest one, which reads the least, unless another saves 3% of them.

    Of the widest, a product of few features has so few tiles that some blocks get none, or one less than the others.
    """
    tiles = [Tile(features=width) for width in WIDTHS]
    return min(tiles, key=lambda tile: clocks(rows, features, gated, workers, tile) * (0.97 if tile.features == WIDE else 1))


def clocks(rows: int, features: int, gated: bool, workers: int, tile: Tile) -> float:
    """How long a turn of all tiles should take, every lane filled: of a block's whole ones, and of what the last ones are cut into."""
    wide, clusters = tile.features // (1 + gated), workers // tile.cluster
    waves, left = divmod(-(-rows // (ROWS * tile.cluster)) * -(-features // wide), clusters)
    copied = _copied(wide, itemsize=2)
    cut = max((pieces for pieces in _cuts(wide, copied) if left * pieces <= clusters), default=1)
    last = _turn(tile.features // cut) if left else 0
    if not waves:  # all are narrow, and none finds its weights in the second-level cache
        last = max(last, COLD / (_stages(tile.features, 2 * copied) - 1))
    return waves * _turn(tile.features) + last


def _turn(features: int) -> int:
    """Clocks of a tile's turn, by what takes longer: the tensor cores or shared memory.

    The tensor cores need four for a feature, and reach four fifths of that. Shared memory moves 128 bytes in each, a row's inputs: what is
    copied goes in, and for each warpgroup its rows and all features out again.
    """
    return max(5 * features, ROWS + features + GROUPS * (LINES + features))


def _copied(wide: int, itemsize: int) -> int:
    """Features that are copied out at a time: 128 bytes of a row if a tile is some times so many, else 64 or 32."""
    return next(size for size in (128, 64, 32) if wide * itemsize % size == 0) // itemsize


def _cuts(wide: int, copied: int) -> list[int]:
    """How many narrower tiles one may become: whole copies, and no narrower than wgmma's lines."""
    return [pieces for pieces in (4, 3, 2) if wide % (pieces * copied) == 0 and wide // pieces >= LINES]


def _stages(features: int, copied: int) -> int:
    """Turns that the ring holds: shared memory, but for two copies of `copied` bytes a row on their way out of each warpgroup."""
    return (SHARED - 1024 - 2 * ROWS * copied) // ((ROWS + features) * INPUTS * 2)


@dataclass(frozen=True)
class _Options:
    """What is fixed when the kernel is compiled. halves: 2 if gated. workers: clusters in the grid, of `cluster` blocks each. wide: output
    features of a whole tile. copied: those that are copied out at a time. stages: turns that the ring holds."""

    act: Callable[[Array], Array] | None
    rows: int
    features: int
    turns: int
    workers: int
    cluster: int
    wide: int
    copied: int
    stages: int

    @property
    def halves(self) -> int:
        return 1 if self.act is None else 2

    @property
    def high(self) -> int:
        """Rows of a cluster's tile."""
        return ROWS * self.cluster

    @property
    def cuts(self) -> list[int]:
        return _cuts(self.wide, self.copied)


@partial(jax.jit, static_argnames=("tile", "act", "workers", "dtype", "interpret"))
def linear(
    x_ND: Array,
    weight_FD: Array,
    live_3: Array,
    *,
    tile: Tile,
    workers: int,
    act: Callable[[Array], Array] | None = None,
    dtype: Any = None,
    interpret: bool = False,
) -> Array:
    """x @ weight.T -> [N, F]; with `act`, [N, F / 2]: the second half gated by the first. Numbers are of 16 bits, D and what F comes to
    multiples of 64.

    dtype: of what comes out, if not x's: float32.
    live_3: `work.live`: only rows [0, live[0]) and [live[1], live[2]) matter; some of the others hold anything. workers: thread blocks,
    one a multiprocessor.
    """
    rows, inputs = x_ND.shape
    halves = 1 if act is None else 2
    features, wide, dtype = weight_FD.shape[0] // halves, tile.features // halves, jnp.dtype(dtype or x_ND.dtype)
    copied = _copied(wide, dtype.itemsize)
    stages = _stages(tile.features, copied * dtype.itemsize)
    options = _Options(act, rows, features, inputs // INPUTS, workers // tile.cluster, tile.cluster, wide, copied, stages)
    tiled = plgpu.TilingTransform((8, copied)), plgpu.SwizzleTransform(copied * dtype.itemsize)  # pyright: ignore[reportAbstractUsage]
    free: dict[str, Any] = dict(num_arrivals=GROUPS, num_barriers=stages)
    clusters: dict[str, Any] = dict(cluster=(tile.cluster,), cluster_names=("member",)) if tile.cluster > 1 else {}
    return plgpu.kernel(
        partial(_kernel, options),
        out_type=jax.ShapeDtypeStruct((rows, features), dtype),
        scratch_types=dict(
            x_s=plgpu.SMEM((stages, ROWS, INPUTS), x_ND.dtype, transforms=TILED),
            w_s=plgpu.SMEM((stages, tile.features, INPUTS), x_ND.dtype, transforms=TILED),
            o_s=plgpu.SMEM((GROUPS, 2, LINES, copied), dtype, transforms=tiled),
            here=plgpu.Barrier(num_arrivals=1 + halves, num_barriers=stages),
            free=plgpu.ClusterBarrier(collective_axes=("member",), **free) if tile.cluster > 1 else plgpu.Barrier(**free),
        ),
        grid=(options.workers,),
        grid_names=("worker",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        kernel_name="linear_wide",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        **clusters,
    )(x_ND, weight_FD, live_3)


def _kernel(options: _Options, x, w, live, o, **scratch):
    refs = SimpleNamespace(x=x, w=w, live=live, o=o, **scratch)
    group = lax.axis_index("warpgroup")

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        turns = _tiles(options, refs, partial(_fetch_tile, options, refs))
        # Every completion must be awaited: a barrier ends even.
        lax.fori_loop(jnp.maximum(turns - options.stages, 0), turns, partial(_await_free, options, refs), ())

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _tiles(options, refs, partial(_multiply_tile, options, refs, group))
        plgpu.wait_smem_to_gmem(0)


def _tiles(options: _Options, refs, each):
    """Call `each(row, feature, turn, wide)` for this block's tiles: their first row and feature, the turns before, how wide it is.

    Gives how many turns of copies that took.
    """
    first, begin, end = (refs.live[i] for i in range(3))
    size, member = jnp.int32(options.high), lax.axis_index("member") if options.cluster > 1 else 0
    head = lax.div(first + size - 1, size)
    last = jnp.where(end > begin, lax.div(end + size - 1, size), 0)
    begin = jnp.maximum(head, lax.div(begin, size))
    high = head + jnp.maximum(last - begin, 0)
    across, workers, worker = -(-options.features // options.wide), jnp.int32(options.workers), lax.axis_index("worker")
    left, cut = lax.rem(high * across, workers), jnp.int32(1)
    for pieces in reversed(options.cuts):
        cut = jnp.where(left * pieces <= workers, pieces, cut)
    count = high * across - jnp.where(cut > 1, left, 0)

    def corner(index):
        strip = lax.div(index, high * BAND)
        inside, width = index - strip * high * BAND, jnp.minimum(BAND, across - strip * BAND)
        place = lax.div(inside, width)
        row = jnp.where(place < head, place, begin + place - head) * size + member * ROWS
        return row, (strip * BAND + lax.rem(inside, width)) * options.wide

    def whole(state):
        index, turn = state
        each(*corner(index), turn, options.wide)
        return index + workers, turn + options.turns

    turn = lax.while_loop(lambda state: state[0] < count, whole, (worker, jnp.int32(0)))[1]
    for pieces in options.cuts:
        mine, wide = (cut == pieces) & (worker < left * pieces), options.wide // pieces

        @pl.when(mine)
        def _(pieces=pieces, wide=wide, turn=turn):
            row, feature = corner(count + lax.div(worker, jnp.int32(pieces)))
            each(row, feature + lax.rem(worker, jnp.int32(pieces)) * wide, turn, wide)

        turn += jnp.where(mine, options.turns, 0)
    return turn


def _await_free(options: _Options, refs, turn, _):
    plgpu.barrier_wait(refs.free.at[lax.rem(turn, jnp.int32(options.stages))])
    return ()


def _fetch_tile(options: _Options, refs, row, feature, turn, wide):
    """Copy a tile's rows and weights into the ring, as stages become free."""
    zeros = plgpu.OOBFillMode.ZEROS
    outside_x, outside_w = zeros if options.rows % options.high else None, zeros if options.features % options.wide else None

    def fetch(i, _):
        stage = lax.rem(turn + i, jnp.int32(options.stages))

        @pl.when(turn + i >= options.stages)
        def _():
            _await_free(options, refs, turn + i, ())

        inputs, here = pl.ds(i * INPUTS, INPUTS), refs.here.at[stage]
        plgpu.copy_gmem_to_smem(refs.x.at[pl.ds(row, ROWS), inputs], refs.x_s.at[stage], here, oob_mode=outside_x)
        for half in range(options.halves):  # past the last feature, zeros or the other half's: their products are not stored
            source = refs.w.at[pl.ds(half * options.features + feature, wide), inputs]
            target, shared = refs.w_s.at[stage, pl.ds(half * wide, wide)], "member" if options.cluster > 1 else None
            plgpu.copy_gmem_to_smem(source, target, here, collective_axes=shared, oob_mode=outside_w)
        return ()

    lax.fori_loop(0, options.turns, fetch, ())


def _multiply_tile(options: _Options, refs, group, row, feature, turn, wide):
    """One warpgroup's half of a tile's rows, and their copy out."""
    shape, dtype = (LINES, options.halves * wide), refs.x.dtype
    out = pl.run_scoped(partial(_turns, options, refs, group, turn), ACC(shape, jnp.float32))
    if options.act is not None:  # rounded between, as the plain layers round
        gate, up = (half.astype(dtype).astype(jnp.float32) for half in (out[:, :wide], out[:, wide:]))
        out = options.act(gate).astype(dtype).astype(jnp.float32) * up
    for copy, begin in enumerate(range(0, wide, options.copied)):
        out_s = refs.o_s.at[group, copy % 2]
        # The last copy but one has left this place; a tile's first may find its own in use, by a tile of one copy.
        plgpu.wait_smem_to_gmem(1 if copy else 0, wait_read_only=True)
        out_s[...] = out[:, begin : begin + options.copied].astype(refs.o.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, refs.o.at[pl.ds(row + group * LINES, LINES), pl.ds(feature + begin, options.copied)])


def _turns(options: _Options, refs, group, turn, accumulator):
    """The products of this warpgroup's rows with the weights, both halves beside each other."""
    width = accumulator.shape[1]

    def multiply(i, _):
        stage = lax.rem(turn + i, jnp.int32(options.stages))
        plgpu.barrier_wait(refs.here.at[stage])
        plgpu.wgmma(accumulator, refs.x_s.at[stage, pl.ds(group * LINES, LINES)], refs.w_s.at[stage, pl.ds(0, width)].T)
        plgpu.wgmma_wait(1)  # the product of the turn before

        @pl.when(i > 0)
        def _():
            plgpu.barrier_arrive(refs.free.at[lax.rem(turn + i - 1, jnp.int32(options.stages))])

        return ()

    lax.fori_loop(0, options.turns, multiply, ())
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.free.at[lax.rem(turn + options.turns - 1, jnp.int32(options.stages))])
    return accumulator[...]
