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
SHARED = 220 * 1024  # bytes of a multiprocessor's shared memory that its blocks may take together
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
ROWS = (2, 4, 8, 16, 32, 64, 128, 256)  # what a kernel is made for


@dataclass(frozen=True)
class Tile:
    """A block's part of the work. parts: the inputs are split in so many. cluster: blocks that share their copies of x."""

    features: int
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
            w_s=plgpu.SMEM((depth, halves, tile.features, tile.inputs), x_ND.dtype, transforms=TILED),
            o_s=plgpu.SMEM((groups, LINES, tile.features), dtype),
            here=plgpu.Barrier(num_arrivals=1 + halves, num_barriers=depth),
            free=free,
        ),
        grid=(features // tile.features // tile.cluster, tile.parts),
        grid_names=("tile", "part"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        **cluster,
    )(x_ND, weight_FD)


def stages(rows: int, inputs: int, tile: Tile, *, halves: int, itemsize: int) -> int:
    """How many turns' copies the shared memory holds at a time."""
    padded = max(LINES, rows)
    kept = (1 if padded == LINES else 2) * LINES * tile.features * (itemsize if tile.parts == 1 else 4)
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
        lax.fori_loop(0, options.turns, partial(_fetch, options, refs, feature), ())
        # Every completion must be awaited: a barrier ends even.
        lax.fori_loop(options.turns - options.stages, options.turns, partial(_await_free, options, refs), ())

    @pl.when(group < options.groups)
    def _():
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

    size = options.tile.inputs
    inputs = pl.ds((lax.axis_index("part") * options.turns + turn) * size, size)
    for half in range(options.halves):
        features = pl.ds(half * options.features + feature, options.tile.features)
        plgpu.copy_gmem_to_smem(refs.w.at[features, inputs], refs.w_s.at[stage, half], refs.here.at[stage])
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
    shape = (LINES, options.tile.features)
    first = group * options.lines * LINES
    products = pl.run_scoped(
        partial(_turns, options, refs, first),
        *[plgpu.ACC(shape, jnp.float32) for _ in range(options.lines * options.halves)],  # pyright: ignore[reportPrivateImportUsage]
    )
    out_s = refs.o_s.at[group]
    for line in range(options.lines):
        out = products[line * options.halves]
        if options.act is not None:  # rounded between, as the plain layers round
            dtype = refs.x.dtype
            gate, up = (product.astype(dtype).astype(jnp.float32) for product in products[2 * line : 2 * line + 2])
            out = options.act(gate).astype(dtype).astype(jnp.float32) * up
        if line:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_s[...] = out.astype(refs.o.dtype)
        plgpu.commit_smem()
        count = min(LINES, options.rows)
        target = refs.o.at[lax.axis_index("part"), pl.ds(first + line * LINES, count), pl.ds(feature, options.tile.features)]
        plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, count)], target)


def _turns(options, refs, first, *accumulators):
    """The products of this warpgroup's runs of 64 rows, for each half of the weights."""

    def turn(i, _):
        stage = lax.rem(i, jnp.int32(options.stages))
        plgpu.barrier_wait(refs.here.at[stage])
        for line in range(options.lines):
            rows = refs.x_s.at[stage, pl.ds(first + line * LINES, LINES)]
            for half in range(options.halves):
                plgpu.wgmma(accumulators[line * options.halves + half], rows, refs.w_s.at[stage, half].T)
        plgpu.wgmma_wait(len(accumulators))  # the products of the turn before

        @pl.when(i > 0)
        def _():
            plgpu.barrier_arrive(refs.free.at[lax.rem(i + options.stages - 1, jnp.int32(options.stages))])

        return ()

    lax.fori_loop(0, options.turns, turn, ())
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.free.at[(options.turns - 1) % options.stages])
    return [accumulator[...] for accumulator in accumulators]
