"""Linear layers for up to 256 rows on Hopper, in Mosaic GPU: weights stream through a ring of TMA copies into wgmma.

A decode step's products are bound by the weights' bytes. A thread block takes some output features of all rows; the rows are wgmma's
64 lines, so a block may be as narrow as eight features and every multiprocessor reads its own part of the weights, all at once. Where the
output has too few features for that, the inputs are split as well, and the parts are left to be summed by whoever reads them.

N rows, F output features of a block, S inputs of a turn, P parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LINES = 64  # of wgmma
SHARED = 226 * 1024  # bytes of a multiprocessor's shared memory that its blocks may take together
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
ROWS = (2, 4, 8, 16, 32, 64, 128, 256)  # what a kernel is made for


@dataclass(frozen=True)
class Tile:
    """A block's part of the work. parts: the inputs are split in so many. cluster: blocks that share their copies of x."""

    features: int  # the last block may have fewer
    inputs: int
    parts: int = 1
    cluster: int = 1
    blocks: int = 1  # on a multiprocessor at a time


@partial(jax.jit, static_argnames=("tile", "act", "interpret"))
def linear(
    x_ND: Array,
    weight_FD: Array,
    *,
    tile: Tile,
    act: Callable[[Array], Array] | None = None,
    interpret: bool = False,
) -> Array:
    """[P, N, F], to be summed over P; float32 if P is not 1. With `act`, [1, N, F / 2]: the second half gated by the first."""
    rows, inputs = x_ND.shape
    features = weight_FD.shape[0] // (1 if act is None else 2)
    padded = max(LINES, rows)
    groups, lines = (1, 1) if padded == LINES else (2, padded // (2 * LINES))
    dtype = x_ND.dtype if tile.parts == 1 else jnp.float32
    turns = inputs // (tile.inputs * tile.parts)
    halves = 1 if act is None else 2
    depth = stages(rows, inputs, tile, halves=halves, itemsize=x_ND.dtype.itemsize)
    options = _Options(tile, act, rows, inputs, features, depth, turns, groups, lines, halves)
    cluster: dict = dict(cluster=(tile.cluster,), cluster_names=("member",)) if tile.cluster > 1 else {}
    free = (
        plgpu.ClusterBarrier(collective_axes=("member",), num_barriers=depth, num_arrivals=groups)
        if tile.cluster > 1
        else plgpu.Barrier(num_barriers=depth, num_arrivals=groups)
    )
    return plgpu.kernel(
        partial(_kernel, options),
        out_type=jax.ShapeDtypeStruct((tile.parts, rows, features), dtype),
        scratch_types=dict(
            x_s=plgpu.SMEM((depth, padded, tile.inputs), x_ND.dtype, transforms=TILED),
            w_s=plgpu.SMEM((depth, halves * tile.features, tile.inputs), x_ND.dtype, transforms=TILED),
            o_s=plgpu.SMEM((groups, LINES, width(tile)), dtype),
            here=plgpu.Barrier(num_arrivals=1 + halves, num_barriers=depth),
            free=free,
        ),
        grid=(pl.cdiv(features, tile.features * tile.cluster), tile.parts),
        grid_names=("tile", "part"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        kernel_name="linear_many_rows",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        **cluster,
    )(x_ND, weight_FD)


def width(tile: Tile) -> int:
    """Features that are copied out at a time: parts, of four bytes a number, would take room that the ring needs."""
    return LINES if tile.parts > 1 and tile.features % LINES == 0 else tile.features


def stages(rows: int, inputs: int, tile: Tile, *, halves: int, itemsize: int) -> int:
    """How many turns' copies the shared memory holds at a time."""
    padded = max(LINES, rows)
    kept = (1 if padded == LINES else 2) * LINES * width(tile) * (itemsize if tile.parts == 1 else 4)
    turn = (padded + halves * tile.features) * tile.inputs * itemsize
    return min(inputs // (tile.inputs * tile.parts), (SHARED // tile.blocks - kept - 1024) // turn)


@dataclass(frozen=True)
class _Options:
    """What is fixed when the kernel is compiled. groups: warpgroups that multiply, each `lines` runs of 64 rows. halves: 2 if gated."""

    tile: Tile
    act: Callable[[Array], Array] | None
    rows: int
    inputs: int
    features: int
    stages: int
    turns: int
    groups: int
    lines: int
    halves: int


def _kernel(options, x, w, o, **scratch):
    refs = SimpleNamespace(x=x, w=w, o=o, **scratch)
    tile = lax.axis_index("tile")
    if options.tile.cluster > 1:
        tile = tile * options.tile.cluster + lax.axis_index("member")
    feature, group = tile * options.tile.features, lax.axis_index("warpgroup")

    @pl.when(group == options.groups)
    def _():
        if options.lines > 1:
            plgpu.set_max_registers(40, action="decrease")
        lax.fori_loop(0, options.turns, partial(_fetch, options, refs, feature), ())
        # Every completion must be awaited: a barrier ends even.
        lax.fori_loop(options.turns - options.stages, options.turns, partial(_await_free, options, refs), ())

    @pl.when(group < options.groups)
    def _():
        if options.lines > 1:  # two runs of rows in registers: more of them than three warpgroups would get
            plgpu.set_max_registers(232, action="increase")
        _multiply(options, refs, feature, group)
        plgpu.wait_smem_to_gmem(0)


def _await_free(options, refs, turn, _):
    plgpu.barrier_wait(refs.free.at[lax.rem(turn, jnp.int32(options.stages))])
    return ()


def _fetch(options, refs, feature, turn, _):
    """Copy one turn's inputs of the block's weights and of all rows into the ring, once its stage is free."""
    stage = lax.rem(turn, jnp.int32(options.stages))

    @pl.when(turn >= options.stages)
    def _():
        _await_free(options, refs, turn, ())

    inputs = pl.ds((lax.axis_index("part") * options.turns + turn) * options.tile.inputs, options.tile.inputs)
    size, ragged = options.tile.features, options.features % (options.tile.features * options.tile.cluster)
    for half in range(options.halves):  # past the last feature, zeros or the other half's: their products are not stored
        plgpu.copy_gmem_to_smem(
            refs.w.at[pl.ds(half * options.features + feature, size), inputs],
            refs.w_s.at[stage, pl.ds(half * size, size)],
            refs.here.at[stage],
            oob_mode=plgpu.OOBFillMode.ZEROS if ragged else None,
        )
    copied = max(8, options.rows)  # fewer rows are filled up with zeros; what lies below eight and more is whatever was there
    source = refs.x.at[:, inputs] if copied == options.rows else refs.x.at[pl.ds(0, copied), inputs]
    plgpu.copy_gmem_to_smem(
        source,
        refs.x_s.at[stage, pl.ds(0, copied)],
        refs.here.at[stage],
        collective_axes="member" if options.tile.cluster > 1 else None,
        oob_mode=None if copied == options.rows else plgpu.OOBFillMode.ZEROS,
    )
    return ()


def _multiply(options, refs, feature, group):
    """All turns of one warpgroup's rows, and their copy out."""
    features = options.tile.features
    first = group * options.lines * LINES
    products = pl.run_scoped(
        partial(_turns, options, refs, first),
        *[plgpu.ACC((LINES, options.halves * features), jnp.float32) for _ in range(options.lines)],  # pyright: ignore[reportPrivateImportUsage]
    )
    out_s, wide, count = refs.o_s.at[group], width(options.tile), min(LINES, options.rows)
    for line, out in enumerate(products):
        if options.act is not None:  # rounded between, as the plain layers round
            dtype = refs.x.dtype
            gate, up = (half.astype(dtype).astype(jnp.float32) for half in (out[:, :features], out[:, features:]))
            out = options.act(gate).astype(dtype).astype(jnp.float32) * up
        for begin in range(0, features, wide):
            if line or begin:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s[...] = out[:, begin : begin + wide].astype(refs.o.dtype)
            plgpu.commit_smem()
            target = refs.o.at[lax.axis_index("part"), pl.ds(first + line * LINES, count), pl.ds(feature + begin, wide)]
            plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, count)], target)


def _turns(options, refs, first, *accumulators):
    """The products of this warpgroup's runs of 64 rows with the weights, both halves beside each other."""

    def turn(i, _):
        stage = lax.rem(i, jnp.int32(options.stages))
        plgpu.barrier_wait(refs.here.at[stage])
        for line in range(options.lines):
            rows = refs.x_s.at[stage, pl.ds(first + line * LINES, LINES)]
            plgpu.wgmma(accumulators[line], rows, refs.w_s.at[stage].T)
        plgpu.wgmma_wait(len(accumulators))  # the products of the turn before

        @pl.when(i > 0)
        def _():
            plgpu.barrier_arrive(refs.free.at[lax.rem(i + options.stages - 1, jnp.int32(options.stages))])

        return ()

    lax.fori_loop(0, options.turns, turn, ())
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.free.at[(options.turns - 1) % options.stages])
    return [accumulator[...] for accumulator in accumulators]
