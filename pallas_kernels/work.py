"""What a step's rows are, and the work lists that every attention call of the step shares.

`Rows` is what the caller knows: page tables, lengths, and which row owns which chunk lanes. `Work` is what a kernel wants to know: which
worker reads which KV blocks, which tile holds which query tokens. It is computed on the device, once a step for all layers that have the
same window, so that no layer pays for it and the host never waits.

M rows, P pages of a row's table, T chunk lanes, N = M + T query tokens, K kv heads, W workers. A KV block is the run of consecutive
tokens of one row that a kernel takes in one turn of its loop. All integers are int32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.blocks import Decode, Prefill

INT_MAX = jnp.iinfo(jnp.int32).max


def static(**kwargs):
    """A field that is part of the tree's structure: a different value is a different compiled program."""
    return field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The rows of one step.

    table_MP: the pages of each row in order; entries past a row's length are never used.
    length_M: tokens of each row whose K and V are in pages after this step's write; 0 is an empty row.
    chunk_start_M, chunk_len_M: row i with chunk_len > 0 owns the chunk lanes [chunk_start, chunk_start + chunk_len), at positions
        length - chunk_len .. length - 1, and its decode lane is empty. With chunk_len 0 and length > 0 it decodes in lane i, at
        position length - 1.
    """

    table_MP: Array
    length_M: Array
    chunk_start_M: Array
    chunk_len_M: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lanes:
    """Each query token's row and position in it; position -1 is a lane that no row owns."""

    row_N: Array
    position_N: Array


# What a line of `Shares.row_MF` says of a row: its KV blocks inside the window, 0 if it does not decode; the next row that decodes, and
# the length of that one.
ROW = ("count", "next", "next_length")
# What a line of `Shares.cut_WF` says of the place where a worker begins: the entry of the list, its row, head and block, counted from the
# row's begin, and the page of the block's first token; the row's length, the next row and its length; how many rows do not decode; if the
# cut is inside a (row, head), the first and the last worker that have a part of it, else -1; and a counter, zero between two calls, of the
# workers that have left their part of the (row, head) that this worker is the first to have a part of. A line is 64 bytes.
CUT = ("entry", "row", "head", "block", "page", "length", "next", "next_length", "idle", "opener", "closer", "arrived", *["unused"] * 4)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shares:
    """The decode work list: the flat list of (row, kv head, KV block), cut into W shares of equal length.

    row_MF: F numbers of each row, see ROW. cut_WF: [W + 1, F], see CUT; worker w takes the entries from cut w to cut w + 1. All that a
    worker must know to ask for its first keys is in its line, because what it had to look up by another number would cost each call one
    more read of the device's memory.
    """

    row_MF: Array
    cut_WF: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """The prefill work list: tile i holds the chunk tokens [begin, begin + size) of the chunk lanes, all of one row.

    position_I: the position of a tile's first token; -1 where no row owns the lanes. size_I: its tokens, 0 for the unused tiles, which
    come last. length_I: the length of its row. The longest contexts come first. count_1: how many tiles are used.
    """

    row_I: Array
    begin_I: Array
    size_I: Array
    position_I: Array
    length_I: Array
    count_1: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Work:
    """What `plan_work` found out, and for which call: `paged_attention` refuses another shape, window or implementation.

    blocks: the portable kernels' block sizes, which shares and tiles were cut for.
    """

    lanes: Lanes | None
    shares: Shares | None
    tiles: Tiles | None
    implementation: str = static()
    page_size: int = static()
    kv_heads: int = static()
    group: int = static()
    head_dim: int = static()
    dtype: str = static()
    window: int | None = static()
    chunk: int = static()
    interpret: bool = static()
    blocks: tuple[Decode, Prefill] = static()


def lanes(rows: Rows, chunk: int) -> Lanes:
    """The row and position of every query token of a step with `chunk` chunk lanes."""
    count = rows.length_M.shape[0]
    decodes_M = (rows.length_M > 0) & (rows.chunk_len_M == 0)
    lane_T = jnp.arange(chunk, dtype=jnp.int32)
    offset_MT = lane_T - rows.chunk_start_M[:, None]
    inside_MT = (offset_MT >= 0) & (offset_MT < rows.chunk_len_M[:, None])
    row_T = jnp.argmax(inside_MT, axis=0).astype(jnp.int32)
    position_MT = (rows.length_M - rows.chunk_len_M)[:, None] + offset_MT
    position_T = jnp.max(jnp.where(inside_MT, position_MT, -1), axis=0, initial=-1)
    return Lanes(
        row_N=jnp.concatenate([jnp.arange(count, dtype=jnp.int32), row_T]),
        position_N=jnp.concatenate([jnp.where(decodes_M, rows.length_M - 1, -1), position_T]).astype(jnp.int32),
    )


def live(rows: Rows) -> Array:
    """Which of a step's N = M + T lanes hold a token, int32 [3]: none but [0, first) and [second, third). The rest is padding."""
    count = rows.length_M.shape[0]
    decodes_M = (rows.length_M > 0) & (rows.chunk_len_M == 0)
    last = jnp.max(jnp.where(decodes_M, jnp.arange(1, count + 1, dtype=jnp.int32), 0))
    chunk = jnp.max(jnp.where(rows.chunk_len_M > 0, rows.chunk_start_M + rows.chunk_len_M, 0))
    return jnp.stack([last, jnp.int32(count), count + chunk]).astype(jnp.int32)


def live_rows(rows: Rows) -> Array:
    """`live` of an array with a line for each of the M rows: those with a token in this step, whichever lanes it is in."""
    count = rows.length_M.shape[0]
    last = jnp.max(jnp.where(rows.length_M > 0, jnp.arange(1, count + 1, dtype=jnp.int32), 0))
    return jnp.stack([last, jnp.int32(count), jnp.int32(count)])


PROGRAMS = 1024  # enough to fill a GPU


def programs(rows: int, live_3: Array | None) -> int:
    """How many a Pallas-Triton kernel has that calls `each_live`: one a lane, if all are wanted.

    Else there are no more than can run at a time: beginning 7,000 that find their lanes empty takes longer than 2,000 need for theirs.
    """
    return rows if live_3 is None else min(rows, PROGRAMS)


def each_live(live_ref: Any, run: Callable[[Any], None]) -> None:
    """Calls `run` with the lanes of this program of `programs`: one, or its share of those that hold a token, as `live` made `live_ref`."""
    program, count = pl.program_id(0), pl.num_programs(0)
    if live_ref is None:
        run(program)
        return
    first, begin, end = (plt.load(live_ref.at[jnp.int32(i)]) for i in range(3))

    def turn(i, _):
        place = program + i * count
        run(jnp.where(place < first, place, begin + place - first))
        return ()

    lax.fori_loop(jnp.int32(0), lax.div(first + end - begin - program + count - 1, jnp.int32(count)), turn, ())


def shares(rows: Rows, *, kv_heads: int, page_size: int, kv_block: int, window: int | None, workers: int) -> Shares:
    """Cut the decode rows' KV blocks into `workers` shares whose lengths differ by one at most."""
    count = rows.length_M.shape[0]
    decodes_M = (rows.length_M > 0) & (rows.chunk_len_M == 0)
    first_M = jnp.zeros_like(rows.length_M) if window is None else jnp.maximum(rows.length_M - window, 0) // kv_block
    count_M = jnp.where(decodes_M, -(-rows.length_M // kv_block) - first_M, 0)
    start_M1 = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_M * kv_heads).astype(jnp.int32)])
    row_M = jnp.arange(count, dtype=jnp.int32)
    later_MM = (row_M[None, :] > row_M[:, None]) & decodes_M[None, :]
    next_M = jnp.min(jnp.where(later_MM, row_M[None, :], count - 1), axis=1)
    row = {"count": count_M, "next": next_M, "next_length": rows.length_M[next_M]}
    worker_W1, total = jnp.arange(workers + 1, dtype=jnp.int32), start_M1[-1]
    entry_W1 = worker_W1 * (total // workers) + jnp.minimum(worker_W1, total % workers)  # worker * total would overflow int32
    row_W1 = jnp.minimum(_entry(start_M1, entry_W1), count - 1)
    offset_W1, blocks_W1, first_W1 = entry_W1 - start_M1[row_W1], jnp.maximum(count_M[row_W1], 1), first_M[row_W1]
    before_W1 = offset_W1 % blocks_W1  # blocks of the (row, head) before the cut
    block_W1, holder = first_W1 + before_W1, partial(worker_of, total=total, workers=workers)
    place_W1 = jnp.minimum(block_W1 * kv_block // page_size, rows.table_MP.shape[1] - 1)
    cut = {
        "entry": entry_W1,
        "row": row_W1,
        "head": offset_W1 // blocks_W1,
        "block": block_W1,
        "page": rows.table_MP[row_W1, place_W1],
        "length": rows.length_M[row_W1],
        **{name: x_M[row_W1] for name, x_M in row.items()},
        "idle": jnp.sum(~decodes_M, dtype=jnp.int32),
        "opener": jnp.where(before_W1 > 0, holder(entry_W1 - before_W1), -1),
        "closer": jnp.where(before_W1 > 0, holder(entry_W1 - before_W1 + blocks_W1 - 1), -1),
        "arrived": 0,
        "unused": 0,
    }
    return Shares(
        row_MF=jnp.stack([row[name] for name in ROW], axis=1),
        cut_WF=jnp.stack([jnp.broadcast_to(cut[name], worker_W1.shape) for name in CUT], axis=1),
    )


def worker_of(entry, *, total, workers):
    """The worker whose share holds an entry of the flat list: `shares` gives the first total % workers of them one entry more."""
    size, longer = lax.div(total, jnp.int32(workers)), lax.rem(total, jnp.int32(workers))
    cut = longer * (size + 1)
    return jnp.where(entry < cut, lax.div(entry, size + 1), longer + lax.div(entry - cut, jnp.maximum(size, 1)))


def tiles(rows: Rows, *, chunk: int, tile: int, gaps: bool = False, decodes: bool = True) -> Tiles:
    """Cut each row's chunk into tiles of `tile` tokens, the longest contexts first; with gaps, the lanes that no row owns as well.

    decodes: False puts the decode lanes, at begin -M to -1, among those gaps.
    """
    first = 0 if decodes or not gaps else -rows.length_M.shape[0]
    runs = [_owned(rows), _gaps(rows, first, chunk)] if gaps else [_owned(rows)]
    begin_U, size_U, position_U, row_U = (jnp.concatenate(parts) for parts in zip(*runs, strict=True))
    slots = min(-(-(chunk - first) // tile) + size_U.shape[0], chunk - first)
    count_U = -(-size_U // tile)
    start_U1 = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_U).astype(jnp.int32)])
    index_I = jnp.arange(slots, dtype=jnp.int32)
    run_I = jnp.minimum(_entry(start_U1, index_I), size_U.shape[0] - 1)
    offset_I = (index_I - start_U1[run_I]) * tile
    size_I = jnp.where(index_I < start_U1[-1], jnp.minimum(size_U[run_I] - offset_I, tile), 0)
    position_I = jnp.where(position_U[run_I] < 0, -1, position_U[run_I] + offset_I)
    row_I = row_U[run_I]
    unsorted = Tiles(row_I, begin_U[run_I] + offset_I, size_I, position_I, rows.length_M[row_I], start_U1[-1:])
    order_I = _descending(jnp.where(size_I > 0, position_I, -2))
    return jax.tree.map(lambda x: x if x.shape == (1,) else x[order_I], unsorted)


def _owned(rows: Rows) -> tuple[Array, Array, Array, Array]:
    """Begin, size, first position and row of the runs of chunk lanes that a row owns."""
    row_M = jnp.arange(rows.length_M.shape[0], dtype=jnp.int32)
    return rows.chunk_start_M, rows.chunk_len_M, rows.length_M - rows.chunk_len_M, row_M


def _gaps(rows: Rows, first: int, chunk: int) -> tuple[Array, Array, Array, Array]:
    """The same of the M + 1 runs of lanes between them, from lane `first` on: one after each row's run, and one before all."""
    size_M1 = jnp.concatenate([rows.chunk_len_M, jnp.ones(1, jnp.int32)])
    begin_M = jnp.where(rows.chunk_len_M > 0, rows.chunk_start_M, chunk)
    end_M1 = jnp.concatenate([rows.chunk_start_M + rows.chunk_len_M, jnp.full(1, first, jnp.int32)])
    next_M1 = jnp.min(jnp.where(begin_M[None, :] >= end_M1[:, None], begin_M[None, :], chunk), axis=1)
    gap_M1 = jnp.where(size_M1 > 0, next_M1 - end_M1, 0)
    return end_M1, gap_M1, jnp.full_like(end_M1, -1), jnp.zeros_like(end_M1)


def _descending(key_I: Array) -> Array:
    """The order that puts large keys first, equal ones as they were: comparing all with all is one kernel, and a sort is many."""
    index_I = jnp.arange(key_I.shape[0], dtype=jnp.int32)
    before_II = (key_I[None, :] > key_I[:, None]) | ((key_I[None, :] == key_I[:, None]) & (index_I[None, :] < index_I[:, None]))
    return jnp.zeros_like(index_I).at[before_II.sum(axis=1, dtype=jnp.int32)].set(index_I, unique_indices=True)


def _entry(start_M1: Array, index: Array) -> Array:
    """The row whose run of the flat list holds each index: the last one that starts at or before it and is not empty."""
    return jnp.sum(start_M1[1:, None] <= index[None, :], axis=0, dtype=jnp.int32)
