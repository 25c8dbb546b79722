"""What stands between two products of a decode step on several GPUs, as one kernel: the devices' parts are summed onto the residual
stream, and that is normed for the next product.

Each device has a mailbox, memory that the others write into. A thread block has a row. It sums its device's parts, puts the sum into every
device's mailbox, waits until every device's is in its own, and adds them up in the devices' order, so that all have the same bits. Every
row of a mailbox has two places for each device, which are taken in turn. Two are enough: who writes a place again has seen that all have
come to the time after it, which they do when they have read the place, because kernels of a device run one after another.

Mosaic GPU, for Hopper, with instructions of our own where Pallas has no words: an array knows no address on another device, and before a
kernel that asks XLA for one, XLA runs another that has all devices wait for each other.

D model, N rows, P parts, W devices, V = W + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
from jaxlib.mlir.dialects import gpu

ROWS = 256  # of a mailbox: so many blocks run at once on any Hopper, and a block waits for what others write
LINE = 128  # bytes of a row's numbers in a mailbox: how often each device has written the row, and, last, how often this one has read it
THREADS = 128  # of a block


def fits(rows: int, size: int, dtype: Any) -> bool:
    """Can rows of this model be summed by mailboxes?"""
    return rows <= ROWS and size % (2 * THREADS) == 0 and jnp.dtype(dtype).itemsize == 2


def words(size: int, devices: int) -> int:
    """int32 numbers of a mailbox, zeros at first."""
    return ROWS * LINE // 4 + 2 * devices * ROWS * size // 2


def addresses(mailboxes_WX: Array) -> np.ndarray:
    """[W, W + 1, 2] int32: for each device where every mailbox lies, low and high word, and its own number. One process has them all.

    mailboxes_WX: [W, words], a device's own on each. It must outlive what is told its addresses.
    """
    shards: Sequence[Any] = sorted(mailboxes_WX.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return told([shard.data.unsafe_buffer_pointer() for shard in shards])


def told(own: Sequence[int]) -> np.ndarray:
    """`addresses` of mailboxes that lie there."""
    return np.array([[*own, rank] for rank in range(len(own))], np.uint64).view(np.int32).reshape(len(own), -1, 2)


@partial(jax.jit, static_argnames=("eps", "offset"))
def join(h_ND: Array, parts_PND: Array, norm_D: Array, addresses_V2: Array, *, eps: float, offset: float = 0.0) -> tuple[Array, Array]:
    """(h + the sum of all devices' parts, that over its root mean square times (norm + offset)), both of h's dtype, the same everywhere.

    On each device: parts_PND are its own, addresses_V2 its line of `addresses`. A device's sum is rounded to h's dtype before it is sent.
    All devices must run it, in the same order; it waits for those that have not come to it. Shapes as `fits` says.
    """
    rows, size = h_ND.shape
    options = _Options(len(addresses_V2) - 1, size, eps, offset)
    out = jax.ShapeDtypeStruct(h_ND.shape, h_ND.dtype)
    made = plgpu.kernel(
        partial(_kernel, options),
        out_type=[out, out],
        grid=(rows,),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(h_ND, parts_PND, norm_D, addresses_V2)
    return made[0], made[1]


@dataclass(frozen=True)
class _Options:
    """What is fixed when the kernel is compiled."""

    devices: int
    size: int
    eps: float
    offset: float

    @property
    def together(self) -> int:
        """Numbers that a thread copies at a time: 16 bytes, or fewer if a row has not enough."""
        return next(count for count in (8, 4, 2) if self.size % (count * THREADS) == 0)

    @property
    def layout(self) -> Any:
        return plgpu.Layout.WG_STRIDED((self.size,), vec_size=self.together)


def _kernel(options: _Options, h, parts, norm, addresses, h_out, normed_out):
    row, dtype = lax.axis_index("row"), h.dtype

    def load(ref):
        return plgpu.load(ref, layout=options.layout, optimized=False).astype(jnp.float32)

    own_D = load(parts.at[0, row])
    for part in range(1, parts.shape[0]):
        own_D += load(parts.at[part, row])
    h_D, norm_D = load(h.at[row]), load(norm)
    made = plgpu.ShapeDtypeStruct((options.size,), jnp.float32, layout=options.layout)
    exchange = plgpu.inline_mgpu(arg_types=(options.layout, plgpu.RefType()), return_type=made)(partial(_exchange, options))
    h_D = (h_D + exchange(own_D.astype(dtype), addresses)).astype(dtype)
    h_out[row] = h_D
    h_D = h_D.astype(jnp.float32)
    unit = lax.rsqrt(jnp.sum(h_D * h_D) / options.size + options.eps)
    normed_out[row] = (h_D * unit * (norm_D + options.offset)).astype(dtype)


def _exchange(options: _Options, context: Any, own: Any, addresses: Any) -> Any:
    """The sum of all devices' `own` of this block's row, float32."""
    i32, i64, index = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.IndexType.get()
    devices, bytes_, together = options.devices, 2 * options.size, options.together
    words = together // 2

    def number(value: int, type_: Any = i64) -> Any:
        return arith.constant(type_, value)

    def wide(x: Any) -> Any:
        return arith.extui(i64, x)

    def word(device: Any, high: int) -> Any:
        return memref.load(addresses, [arith.index_cast(index, device), number(high, index)])

    def mailbox(device: Any) -> Any:
        return arith.ori(wide(word(device, 0)), arith.shli(wide(word(device, 1)), number(32)))

    def plus(address: Any, *terms: tuple[Any, int]) -> Any:
        for count, size in terms:
            address = arith.addi(address, arith.muli(wide(count), number(size)))
        return address

    thread, row = utils.thread_idx(), arith.index_cast(i32, gpu.block_id(gpu.Dimension.x))
    rank = word(number(devices, i32), 0)
    line = plus(mailbox(rank), (row, LINE))
    read = arith.addi(line, number(LINE - 4))
    time = arith.addi(utils.inline_ptx("ld.global.b32 $0, [$1];", read, result_types=i32, has_side_effects=True), number(1, i32))
    turn = arith.andi(time, number(1, i32))

    def place(box: Any, source: Any) -> Any:
        """Where this thread's numbers of the row from `source` lie, this time."""
        box = arith.addi(box, number(ROWS * LINE))
        return plus(box, (turn, devices * ROWS * bytes_), (source, ROWS * bytes_), (row, bytes_), (thread, 2 * together))

    step, each = 2 * together * THREADS, f".v{words}" if words > 1 else ""
    names = [f"${i}" for i in range(words + 1)]
    group = f"{{{', '.join(names[:words])}}}" if words > 1 else names[0]
    given = [vector.bitcast(ir.VectorType.get((words,), i32), register) for register in own.registers]
    for device in range(devices):
        at = place(mailbox(number(device, i32)), rank)
        for i, register in enumerate(given):
            pieces = [vector.extract(register, dynamic_position=[], static_position=[j]) for j in range(words)]
            put = f"st.relaxed.sys.global{each}.b32 [${words}], {group};"
            utils.inline_ptx(put, *pieces, arith.addi(at, number(i * step)), has_side_effects=True)
    utils.warpgroup_barrier()  # all threads' numbers are written before one says so
    with ir.InsertionPoint(scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, thread, number(devices, i32))).then_block):
        told = plus(mailbox(thread), (row, LINE), (rank, 4))
        utils.inline_ptx("st.release.sys.global.b32 [$0], $1;", told, time, has_side_effects=True)
        awaited = plus(line, (thread, 4))
        utils.inline_ptx(_AWAIT, awaited, time, has_side_effects=True)
        scf.yield_([])
    utils.warpgroup_barrier()
    total = None
    for device in range(devices):
        at, registers = place(mailbox(rank), number(device, i32)), np.empty(own.registers.shape, object)
        for i in range(len(registers)):
            take = f"ld.relaxed.sys.global{each}.b32 {group}, [${words}];"
            pieces = utils.inline_ptx(take, arith.addi(at, number(i * step)), result_types=[i32] * words, has_side_effects=True)
            whole = vector.from_elements(ir.VectorType.get((words,), i32), list(pieces))
            registers[i] = vector.bitcast(own.registers[i].type, whole)
        sent = mosaic.FragmentedArray(_registers=registers, _layout=own.layout, _is_signed=None).astype(ir.F32Type.get())
        total = sent if total is None else total + sent
    with ir.InsertionPoint(scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, thread, number(0, i32))).then_block):
        utils.inline_ptx("st.global.b32 [$0], $1;", read, time, has_side_effects=True)
        scf.yield_([])
    return total


# Until the number at an address has come to a time, which may have passed the largest number there is.
_AWAIT = """{
.reg .pred early;
.reg .b32 seen;
again:
ld.acquire.sys.global.b32 seen, [$0];
sub.s32 seen, seen, $1;
setp.lt.s32 early, seen, 0;
@early bra again;
}"""
