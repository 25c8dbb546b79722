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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

# Of a mailbox, and numbers of a call and of a row: so many blocks run at once on any Hopper, also of rows that take twice the registers,
# without spilling any. A block waits for what others write, who must not wait for its place.
ROWS, MOST, LONGEST = 256, 2**20, 8192
LINE = 128  # bytes of a row's numbers in a mailbox: how often each device has written the row, and, last, how often this one has read it
THREADS = 128  # of a block


def fits(rows: int, size: int, dtype: Any) -> bool:
    """Can rows of this model be summed by mailboxes?"""
    return rows <= ROWS and rows * size <= MOST and size <= LONGEST and size % (4 * THREADS) == 0 and jnp.dtype(dtype).itemsize == 2


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
    All devices must run it, in the same order; it waits for those that have not come to it. Raises ValueError unless the shape `fits`.
    """
    rows, size = h_ND.shape
    if not fits(rows, size, h_ND.dtype):
        wanted = f"up to {ROWS} rows of 16-bit numbers, a multiple of {4 * THREADS} up to {LONGEST} in each and {MOST:,} in all"
        raise ValueError(f"devices sum {wanted}, not {h_ND.dtype}{h_ND.shape}")
    options = _Options(len(addresses_V2) - 1, size, eps, offset)
    out = jax.ShapeDtypeStruct(h_ND.shape, h_ND.dtype)
    made = plgpu.kernel(
        partial(_kernel, options),
        out_type=[out, out],
        grid=(rows,),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="join_devices",
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
        """Numbers that a thread copies at a time: 16 bytes, or 8 if they do not divide a row."""
        return 8 if self.size % (8 * THREADS) == 0 else 4

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
    """The sum of all devices' `own` of this block's row, float32. What stands here is compiled as it is, Mosaic's array included."""
    thread, row, rank = utils.thread_idx(), arith.index_cast(_int(32), gpu.block_id(gpu.Dimension.x)), _word(addresses, options.devices, 0)
    boxes, mine = [_mailbox(addresses, _number(device, 32)) for device in range(options.devices)], _mailbox(addresses, rank)
    line = _plus(mine, (row, LINE))
    read = arith.addi(line, _number(LINE - 4))
    times = utils.inline_ptx("ld.global.b32 $0, [$1];", read, result_types=_int(32), has_side_effects=True)
    time = arith.addi(times, _number(1, 32))
    turn, size = arith.andi(time, _number(1, 32)), 2 * options.size

    def place(box: Any, source: Any) -> Any:
        """Where this thread's numbers of the row from `source` lie, this time."""
        places = arith.addi(box, _number(ROWS * LINE))
        return _plus(places, (turn, options.devices * ROWS * size), (source, ROWS * size), (row, size), (thread, 2 * options.together))

    for box in boxes:
        _put(own, place(box, rank))
    utils.warpgroup_barrier()  # all threads' numbers are written before one says so
    with _when(arith.cmpi(arith.CmpIPredicate.ult, thread, _number(options.devices, 32))):
        theirs = _plus(_mailbox(addresses, thread), (row, LINE), (rank, 4))
        utils.inline_ptx("st.release.sys.global.b32 [$0], $1;", theirs, time, has_side_effects=True)
        utils.inline_ptx(_AWAIT, _plus(line, (thread, 4)), time, has_side_effects=True)
    utils.warpgroup_barrier()
    total = _take(own, place(mine, _number(0, 32)))
    for device in range(1, options.devices):
        total += _take(own, place(mine, _number(device, 32)))
    with _when(arith.cmpi(arith.CmpIPredicate.eq, thread, _number(0, 32))):
        utils.inline_ptx("st.global.b32 [$0], $1;", read, time, has_side_effects=True)
    return total


def _put(x: Any, address: Any) -> None:
    """Write a thread's numbers of a row of 16-bit ones."""
    count, names, step = _words(x)
    for i, register in enumerate(x.registers):
        whole = vector.bitcast(ir.VectorType.get((count,), _int(32)), register)
        pieces = [vector.extract(whole, dynamic_position=[], static_position=[j]) for j in range(count)]
        put = f"st.relaxed.sys.global.v{count}.b32 [${count}], {{{names}}};"
        utils.inline_ptx(put, *pieces, arith.addi(address, _number(i * step)), has_side_effects=True)


def _take(like: Any, address: Any) -> Any:
    """Read them again, as float32: past the first-level cache, which knows nothing of what others write."""
    (count, names, step), registers = _words(like), np.empty(like.registers.shape, object)
    for i, register in enumerate(like.registers):
        take, place = f"ld.relaxed.sys.global.v{count}.b32 {{{names}}}, [${count}];", arith.addi(address, _number(i * step))
        pieces = utils.inline_ptx(take, place, result_types=[_int(32)] * count, has_side_effects=True)
        registers[i] = vector.bitcast(register.type, vector.from_elements(ir.VectorType.get((count,), _int(32)), list(pieces)))
    return mosaic.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None).astype(ir.F32Type.get())


def _words(x: Any) -> tuple[int, str, int]:
    """Of a thread's copy: words of 32 bits, their names in its instruction, and bytes from one copy to the next."""
    count = x.layout.vec_size // 2
    return count, ", ".join(f"${i}" for i in range(count)), 4 * count * THREADS


def _mailbox(addresses: Any, device: Any) -> Any:
    low, high = (arith.extui(_int(64), _word(addresses, device, half)) for half in range(2))
    return arith.ori(low, arith.shli(high, _number(32)))


def _word(addresses: Any, line: Any, half: int) -> Any:
    line = _number(line, 32) if isinstance(line, int) else line
    return memref.load(addresses, [arith.index_cast(ir.IndexType.get(), number) for number in (line, _number(half, 32))])


def _plus(address: Any, *terms: tuple[Any, int]) -> Any:
    """An address, and so many bytes behind it for each of some counts."""
    for count, size in terms:
        address = arith.addi(address, arith.muli(arith.extui(_int(64), count), _number(size)))
    return address


def _number(value: int, bits: int = 64) -> Any:
    return arith.constant(_int(bits), value)


def _int(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


@contextmanager
def _when(condition: Any) -> Iterator[None]:
    with ir.InsertionPoint(scf.IfOp(condition).then_block):
        yield
        scf.yield_([])


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
