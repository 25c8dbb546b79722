"""One row's way from attention's output to the next layer's queries, keys and values, in one kernel on Hopper, in Mosaic GPU.

Four products follow each other, each of all that the last one made. As kernels of their own, each begins with empty hands: three or four
microseconds pass in which the device's memory is asked for little. Here thread blocks, one a multiprocessor, stay; each takes some features
of every product. One warpgroup of a block copies weights into a ring, as far ahead as the ring is long, whatever product they belong to;
another copies x, once all blocks have made it; a third multiplies. While blocks wait for each other, the ring fills.

What is normed is multiplied as h times the norm's weight, and the products are divided by h's root mean square.
F features of a product, D model, H attention's output. A chunk is 64 inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LINES, CHUNK, COPIED = 64, 64, 8  # lines of wgmma; inputs of a swizzled line; lines that a copy of x fills, seven of them with zeros
ROWS = 128  # of weights, of a chunk each, that a stage holds, or a few less
PASS = 64  # of them, at most, in a chunk: a pass over few features reads longer runs of each row
MOST_CHUNKS = 4  # of a turn
SUMS = (0, 2)  # phases whose products are added to the residual stream: o and down
SHARED = 226 * 1024  # bytes of shared memory that are used
TILED = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
ZEROS = plgpu.OOBFillMode.ZEROS


class Rest(NamedTuple):
    """Weights from one attention to the next: the norms before the MLP and behind it, and the products. The last layer has no QKV."""

    mlp_norm_D: Array
    next_norm_D: Array
    o_DH: Array
    inputs_FD: Array
    down_DF: Array
    qkv_FD: Array | None


@dataclass(frozen=True)
class _Phase:
    """A block's part of a product's features, or of a share of them: `features`, from `begin` on, and all inputs in turns of `chunks`."""

    product: int
    begin: int
    features: int
    halves: int  # 2 if gated
    size: int  # features of the product
    blocks: int  # that take part
    chunks: int
    turns: int
    first: bool  # of its product
    last: bool


@dataclass(frozen=True)
class _Options:
    phases: tuple[_Phase, ...]
    stages: int
    rows: int  # of weights, that a stage holds
    chunks: int  # of x
    widths: tuple[int, ...]  # the phases' numbers of features
    blocks: int
    act: Callable[[Array], Array]
    eps: float
    offset: float
    interpret: bool

    @property
    def apart(self) -> int:
        """Lines from one chunk of x to the next: those in between are read and mean nothing, which an interpreter takes for a race."""
        return LINES if self.interpret else COPIED


class _Sized(Protocol):
    @property
    def features(self) -> int: ...
    @property
    def inputs(self) -> int: ...


def fits(product: _Sized) -> bool:
    """Are its inputs whole chunks, and its features whole eights?"""
    return product.features % 8 == 0 and product.inputs % CHUNK == 0


def _cut(features: int, blocks: int, whole: bool) -> int:
    """Features of a block: the fewest eights of which no more than `blocks` are needed; `whole`: and are all alike."""
    least = 8 * pl.cdiv(features, 8 * blocks)
    return next(n for n in range(least, features + 1, 8) if not whole or features % n == 0)


def rest_of_layer(
    x_1H: Array, h_1D: Array, rest: Rest, *, act: Callable, eps: float, offset: float, blocks: int, interpret: bool = False
) -> tuple[Array, Array | None]:
    """(The residual stream behind the layer [1, D], the next layer's QKV [1, F]). blocks: no more than can run at the same time."""
    products = [(rest.o_DH, 1), (rest.inputs_FD, 2), (rest.down_DF, 1)] + ([] if rest.qkv_FD is None else [(rest.qkv_FD, 1)])
    dtype, model, hidden = x_1H.dtype, h_1D.shape[1], rest.down_DF.shape[1]
    options = _options(
        [(w.shape[0] // halves, w.shape[1], halves) for w, halves in products], dtype.itemsize, act, eps, offset, blocks, interpret
    )
    sizes = dict(h_o=model, scaled_o=model, gated=hidden, h_d=model, scaled_d=model)
    sizes |= {} if rest.qkv_FD is None else dict(qkv=rest.qkv_FD.shape[0])
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM((options.apart * (options.stages * options.chunks - 1) + LINES, CHUNK), dtype, transforms=TILED),
        w_s=plgpu.SMEM((options.stages, options.rows, CHUNK), dtype, transforms=TILED),
        free_x=plgpu.Barrier(num_barriers=options.stages),
        free_w=plgpu.Barrier(num_barriers=options.stages),
        ready=plgpu.Barrier(num_barriers=len(products)),
    )
    for i, phase in enumerate(options.phases):
        scratch[f"x_here{i}"] = plgpu.Barrier(num_arrivals=phase.chunks, num_barriers=options.stages)
        scratch[f"w_here{i}"] = plgpu.Barrier(num_arrivals=phase.chunks * phase.halves, num_barriers=options.stages)
    for size in options.widths:
        scratch[f"o_s{size}"] = plgpu.SMEM((2, LINES, size), dtype)
    if interpret:
        scratch["done"] = plgpu.Barrier(num_barriers=len(products))
    made = plgpu.kernel(
        partial(_kernel, options, len(products), tuple(sizes)),
        out_type=[jax.ShapeDtypeStruct((1, size), dtype) for size in sizes.values()],
        scratch_types=scratch,
        grid=(options.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x_1H, h_1D, rest.mlp_norm_D, rest.next_norm_D, *[w for w, _ in products])
    return made[3], None if rest.qkv_FD is None else made[5]


def _options(sizes, itemsize, act, eps, offset, blocks, interpret) -> _Options:
    phases = []
    for product, (size, inputs, halves) in enumerate(sizes):
        mine = _cut(size, blocks, product in SUMS)
        passes = pl.cdiv(mine * halves, PASS)
        taking, begin = pl.cdiv(size, mine), 0
        for i in range(passes):
            n = mine // 8 // passes * 8 + (8 if i < mine // 8 % passes else 0)
            chunks = max(1, min(MOST_CHUNKS, ROWS // (n * halves), inputs // CHUNK))
            turns = pl.cdiv(inputs // CHUNK, chunks)
            phases.append(_Phase(product, begin, n, halves, size, taking, chunks, turns, i == 0, i == passes - 1))
            begin += taking * n
    widths, chunks = tuple(sorted({phase.features for phase in phases})), max(phase.chunks for phase in phases)
    rows = max(phase.features * phase.halves * phase.chunks for phase in phases)
    kept = (2 * LINES * sum(widths) + LINES * CHUNK) * itemsize + 2048
    stages = 2 if interpret else min(32, (SHARED - kept) // ((rows + COPIED * chunks) * CHUNK * itemsize))
    return _Options(tuple(phases), stages, rows, chunks, widths, max(phase.blocks for phase in phases), act, eps, offset, interpret)


def _kernel(options: _Options, count, names, x, h, mlp_norm, next_norm, *refs, **scratch):
    outs = dict(zip(names, refs[count:], strict=True))
    refs = SimpleNamespace(h=h, mlp_norm=mlp_norm, next_norm=next_norm, w=refs[:count], **outs, **scratch)
    refs.x = (x, refs.scaled_o, refs.gated, refs.scaled_d)
    if not options.interpret:
        refs.done = pl.get_global(plgpu.SemaphoreType.REGULAR((count,)))
    block, group = lax.axis_index("block"), lax.axis_index("warpgroup")

    @pl.when(group == 0)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _walk(options, block, partial(_multiply, options, refs, count))

    @pl.when(group == 1)
    def _():
        plgpu.set_max_registers(80, action="decrease")
        _drain(options, refs.free_w, _walk(options, block, partial(_fetch, options, refs, _copy_weights, "w")))

    @pl.when(group == 2)
    def _():
        plgpu.set_max_registers(80, action="decrease")
        _drain(options, refs.free_x, _walk(options, block, partial(_fetch_x, options, refs)))


def _walk(options: _Options, block, visit):
    """Call `visit(phase, its number, block, turns before it)` for each phase in which the block takes part; the turns in all."""
    turn = jnp.int32(0)
    for i, phase in enumerate(options.phases):
        if phase.blocks == options.blocks:
            visit(phase, i, block, turn)
            turn = turn + phase.turns
        else:
            pl.when(block < phase.blocks)(partial(visit, phase, i, block, turn))
            turn = turn + jnp.where(block < phase.blocks, phase.turns, 0)
    return turn


def _drain(options: _Options, free, turns):
    """Await the completions that no later copy waited for: a barrier must end even."""

    def wait(turn, _):
        plgpu.barrier_wait(free.at[lax.rem(turn, jnp.int32(options.stages))])
        return ()

    lax.fori_loop(jnp.maximum(turns - options.stages, 0), turns, wait, ())


def _fetch(options: _Options, refs, copy, which, phase, i, block, first):
    """All copies of a phase into one of the rings, as stages become free."""
    free, here = getattr(refs, f"free_{which}"), getattr(refs, f"{which}_here{i}")

    def turn(t, _):
        stage = lax.rem(first + t, jnp.int32(options.stages))
        pl.when(first + t >= options.stages)(lambda: plgpu.barrier_wait(free.at[stage]))
        for chunk in range(phase.chunks):  # past the last input, zeros
            copy(options, refs, phase, block, pl.ds((t * phase.chunks + chunk) * CHUNK, CHUNK), stage, chunk, here.at[stage])
        return ()

    lax.fori_loop(0, phase.turns, turn, ())


def _copy_weights(options, refs, phase, block, inputs, stage, chunk, here):
    feature = phase.begin + block * phase.features
    for half in range(phase.halves):
        source = refs.w[phase.product].at[pl.ds(half * phase.size + feature, phase.features), inputs]
        target = refs.w_s.at[stage, pl.ds((chunk * phase.halves + half) * phase.features, phase.features)]
        plgpu.copy_gmem_to_smem(source, target, here, oob_mode=ZEROS)


def _copy_x(options, refs, phase, block, inputs, stage, chunk, here):
    target = refs.x_s.at[pl.ds((stage * options.chunks + chunk) * options.apart, COPIED)]
    plgpu.copy_gmem_to_smem(refs.x[phase.product].at[pl.ds(0, COPIED), inputs], target, here, oob_mode=ZEROS)


def _fetch_x(options: _Options, refs, phase, i, block, first):
    """The copies of x, once all blocks have made it."""
    if phase.product and phase.first:
        before = phase.product - 1
        if options.interpret:
            plgpu.barrier_wait(refs.done.at[before])
        else:
            blocks = next(other.blocks for other in options.phases if other.product == before)
            plgpu.semaphore_wait(refs.done.at[before], blocks, decrement=False, memory_scope="gpu")
        plgpu.barrier_arrive(refs.ready.at[phase.product])
    _fetch(options, refs, _copy_x, "x", phase, i, block, first)


def _multiply(options: _Options, refs, count, phase, i, block, first):
    """A phase's products, what surrounds them, and their copy out."""
    product, size, dtype = phase.product, phase.features, refs.h.dtype
    features, shape = pl.ds(phase.begin + block * size, size), (LINES, size)
    if product and phase.first:
        plgpu.barrier_wait(refs.ready.at[product])
    if product in SUMS:  # asked for now, and used at the end
        residual = _along_lines((refs.h_o if product else refs.h).at[0, features])
        norm = _along_lines((refs.next_norm if product else refs.mlp_norm).at[features])
        out = _products(options, refs, phase, i, first, None)[0].astype(dtype)
        total = (out.astype(jnp.float32) + _spread(residual, shape)).astype(dtype)
        outs = total, (total.astype(jnp.float32) * (_spread(norm, shape) + options.offset)).astype(dtype)
        targets = (refs.h_d, refs.scaled_d) if product else (refs.h_o, refs.scaled_o)
    else:
        products, unit = _products(options, refs, phase, i, first, refs.h_o if product == 1 else refs.h_d)
        both = (products * unit).astype(dtype)
        outs, targets = (both,), (refs.qkv,) if product == 3 else (refs.gated,)
        if phase.halves == 2:  # rounded between, as the plain layers round
            gate, up = (half.astype(jnp.float32) for half in (both[:, :size], both[:, size:]))
            outs = ((options.act(gate).astype(dtype).astype(jnp.float32) * up).astype(dtype),)
    out_s = getattr(refs, f"o_s{size}")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the pass before
    for place, value in enumerate(outs):
        out_s.at[place][...] = value
    plgpu.commit_smem()
    for place, target in enumerate(targets):
        plgpu.copy_smem_to_gmem(out_s.at[place, pl.ds(0, 1)], target.at[:, features])
    if phase.last:
        plgpu.wait_smem_to_gmem(0)
    if phase.last and product + 1 < count:
        if options.interpret:
            plgpu.barrier_arrive(refs.done.at[product])
        else:
            plgpu.semaphore_signal(refs.done.at[product], memory_scope="gpu")


def _along_lines(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def _spread(row, shape):
    return lax.broadcast_in_dim(row.astype(jnp.float32), shape, [1])


def _products(options: _Options, refs, phase, i, first, h):
    """The products, gate and up beside each other; and one over the root mean square of h, if there is one."""
    accumulator = plgpu.ACC((LINES, phase.features * phase.halves), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(partial(_turns, options, refs, phase, i, first, h), accumulator)


def _turns(options: _Options, refs, phase, i, first, h, accumulator):
    x_here, w_here = getattr(refs, f"x_here{i}"), getattr(refs, f"w_here{i}")

    def release(turn):
        stage = lax.rem(turn, jnp.int32(options.stages))
        plgpu.barrier_arrive(refs.free_w.at[stage])
        plgpu.barrier_arrive(refs.free_x.at[stage])

    def turn(t, _):
        stage = lax.rem(first + t, jnp.int32(options.stages))
        plgpu.barrier_wait(w_here.at[stage])
        plgpu.barrier_wait(x_here.at[stage])
        rows = phase.features * phase.halves
        for chunk in range(phase.chunks):
            lines = refs.x_s.at[pl.ds((stage * options.chunks + chunk) * options.apart, LINES)]
            plgpu.wgmma(accumulator, lines, refs.w_s.at[stage, pl.ds(chunk * rows, rows)].T)
        plgpu.wgmma_wait(phase.chunks)  # the products of the turn before
        pl.when(t > 0)(lambda: release(first + t - 1))
        return ()

    unit, middle = None, phase.turns // 2
    lax.fori_loop(0, middle, turn, ())
    if h is not None:  # where weights wait anyway: not at the begin or end, where blocks wait for each other
        h_D = h[0].astype(jnp.float32)
        unit = lax.rsqrt(jnp.sum(h_D * h_D) / h.shape[1] + options.eps)
    lax.fori_loop(middle, phase.turns, turn, ())
    plgpu.wgmma_wait(0)
    release(first + phase.turns - 1)
    return accumulator[...], unit
