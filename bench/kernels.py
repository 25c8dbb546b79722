"""Times the attention kernels on the GPU at hand: `python -m bench.kernels [--only decode|prefill|write|sweep] [--tune] [--plot FILE]`.

Each kernel runs many times inside one jit, which is one CUDA graph, over several sets of pages in turn, so that the second-level cache does
not answer; a time is the difference between two repetition counts, so that what a call costs cancels; a row is the median of several
differences. Arithmetic takes a device to its power limit, where it lowers its clock, so prefill is timed twice: rested before each run,
and in a load that never pauses. The bound is bytes over the device's measured read rate, or operations over its measured matrix rate
(`bench.workloads`). `--tune` tries block sizes for the portable kernels and writes the fastest into the package's `tuning/` folder. Every
row goes through `bench.record` as soon as its group is done.

N tokens, M rows, Q query heads, K kv heads, H features a head.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench import plots, record
from bench.workloads import MACHINES
from pallas_kernels import Rows, blocks, capability_of, implementation_for, paged_attention, plan_work, write_kv
from pallas_kernels.shapes import DECODE, FP8, LLAMA_8B, PREFILL, QWEN_05B, QWEN_3B, Case, Heads

L2_TIMES = 4  # pages of all sets together, in multiples of 64 MB: more than any device's second-level cache holds
MEMORY = 60e9  # bytes of pages that the largest case may take
REST = 0.1  # seconds before a rested run
LOADS = ("rested", "sustained")
LOADED = 0.5  # seconds of load before the first run in one: an H200 is at its limit after a tenth of that
# FlashAttention-3 as vLLM 0.24 ships it, on an H200: 32/8 heads of 128, bfloat16, page 16.
FA3 = {"NVIDIA H200": {"8b_1x8192": 1.98, "8b_16x4096": 3.69, "8b_64x4096": 4.22, "8b_256x1024": 3.81, "8b_2048": 472.0, "8b_8192": 698.0}}


# ---------------------------------------------------------------------- arrays


def draw(case: Case, shortest: int | None = None) -> tuple[list[tuple], Rows]:
    """Several sets of (q, k_pages, v_pages) and the rows. Pages of a row are scattered, as in an engine that has served for a while.

    shortest: tokens that are read of a row at least, if not all.
    """
    heads, size = case.heads, case.page_size
    needed = [-(-length // size) for length in case.lengths]
    pages = sum(needed) + 1
    each = 2 * pages * heads.kv_heads * size * heads.head_dim * jnp.dtype(case.page_dtype).itemsize
    read = each if shortest is None else each * shortest / max(case.lengths)
    sets = int(max(2, min(32, -(-L2_TIMES * 64e6 // read)))) if each < MEMORY / 2 else 1
    order = np.random.default_rng(0).permutation(pages - 1) + 1
    table, taken = np.zeros((len(needed), max(needed)), np.int32), 0
    for row, count in enumerate(needed):
        table[row, :count] = order[taken : taken + count]
        taken += count
    chunk_lens = case.chunk_lens or (0,) * len(needed)
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in (table, case.lengths, np.cumsum((0, *chunk_lens[:-1])), chunk_lens)))
    shape = (pages, heads.kv_heads, size, heads.head_dim)
    return [_arrays(case, shape, len(needed), key) for key in jax.random.split(jax.random.key(0), sets)], rows


@partial(jax.jit, static_argnums=(0, 1, 2))
def _arrays(case: Case, shape: tuple[int, ...], rows: int, key: jax.Array):
    keys = jax.random.split(key, 3)
    q = jax.random.normal(keys[0], (rows + case.chunk, case.heads.heads, case.heads.head_dim), case.dtype)
    return q, *(jax.random.normal(k, shape, jnp.bfloat16).astype(case.page_dtype) for k in keys[1:])


# ---------------------------------------------------------------------- time


@dataclass(frozen=True)
class Timed:
    """What is timed: `chain(n)` is a function of `args` that does it n times, one after another, in one CUDA graph."""

    chain: Callable[[int], Callable]
    args: tuple
    links: int

    def lowered(self) -> list[Any]:
        return [jax.jit(self.chain(times * self.links)).lower(*self.args) for times in (1, 4)]

    def seconds(self, few: Callable, many: Callable, repeats: int, load: str | None = None) -> float:
        """Seconds of one link, by the two compiled programs. load: "rested", "sustained", or as it comes."""

        def once(run: Callable) -> float:
            time.sleep(REST if load == "rested" else 0)
            start = time.perf_counter()
            jax.block_until_ready(run(*self.args))
            return time.perf_counter() - start

        for run in (few, many, few, many):  # its graph recorded
            once(run)
        loaded = time.perf_counter() + (LOADED if load == "sustained" else 0)
        while time.perf_counter() < loaded:
            once(many)
        return statistics.median((once(many) - once(few)) / (3 * self.links) for _ in range(repeats))


def seconds(timed: Timed, repeats: int) -> float:
    few, many = (program.compile() for program in timed.lowered())
    return timed.seconds(few, many, repeats)


def attention(case: Case, implementation: str, rows: Rows | None = None) -> Timed:
    """One `paged_attention`; the plan, which a step makes once for all its layers, is not timed. rows: None takes the case's own."""
    sets, own = draw(case)
    rows = own if rows is None else rows
    heads = case.heads
    shape: dict[str, Any] = dict(page_size=case.page_size, kv_heads=heads.kv_heads, group=heads.group, head_dim=heads.head_dim)
    plan = partial(
        plan_work, **shape, dtype=case.page_dtype, window=case.window, chunk=case.chunk, decodes=case.decodes, implementation=implementation
    )
    attend = jax.jit(partial(paged_attention, scale=heads.head_dim**-0.5, window=case.window, softcap=case.softcap))

    def chain(count: int) -> Callable:
        def run(sets, rows, work):
            out = sets[0][0]
            for i in range(count):
                out = attend(*sets[i % len(sets)], _after(rows, out), work)
            return out

        return run

    return Timed(chain, (sets, rows, jax.jit(plan)(rows)), max(4, len(sets)))


def attention_seconds(case: Case, implementation: str, repeats: int) -> dict[str | None, float]:
    """By load: of a case that is arithmetic, rested and sustained."""
    timed = attention(case, implementation)
    few, many = (program.compile() for program in timed.lowered())
    holding = _holding_seconds(timed.args[1].table_MP.shape, timed.links, repeats)
    return {load: timed.seconds(few, many, repeats, load) - holding for load in (LOADS if case.chunk else (None,))}


def _after(rows: Rows, out: jax.Array) -> Rows:
    """The rows, but not before `out` is there: kernels that do not depend on each other may run at the same time in a CUDA graph."""
    return replace(rows, table_MP=rows.table_MP + (out.ravel()[0].astype(jnp.float32) * 0).astype(jnp.int32))


@cache
def _holding_seconds(table: tuple[int, int], links: int, repeats: int) -> float:
    """What `_after` costs for a table of this shape."""
    rows = Rows(jnp.zeros(table, jnp.int32), *(jnp.zeros(table[0], jnp.int32) for _ in range(3)))

    def chain(count: int) -> Callable:
        def run(rows):
            for _ in range(count):
                rows = jax.lax.optimization_barrier(_after(rows, rows.table_MP))
            return rows

        return run

    return seconds(Timed(chain, (rows,), links), repeats)


def write_seconds(rows: int, heads: Heads, page_size: int, repeats: int) -> float:
    """Seconds of one `write_kv` of a decode step's tokens into one layer's pages, in place."""
    pages = jnp.zeros((rows * 2, heads.kv_heads, page_size, heads.head_dim), jnp.bfloat16)
    new = jnp.ones((rows, heads.kv_heads, heads.head_dim), jnp.bfloat16)
    random = np.random.default_rng(0)
    slots = [jnp.asarray(random.permutation(rows * 2)[:rows] * page_size + place, jnp.int32) for place in range(8)]

    def chain(count: int) -> Callable:
        def run(k_pages, v_pages, new, slots):
            for i in range(count):
                k_pages, v_pages = write_kv(k_pages, v_pages, new, new, slots[i % len(slots)])
            return k_pages[0, 0, 0, 0], v_pages[0, 0, 0, 0]

        return run

    return seconds(Timed(chain, (pages, pages + 1, new, slots), 32), repeats)


# ---------------------------------------------------------------------- work


def read_bytes(case: Case) -> int:
    """Bytes of K and V that the decode rows must read, windows apart."""
    heads = case.heads
    tokens = sum(min(length, case.window or length) for length in case.lengths)
    return 2 * tokens * heads.kv_heads * heads.head_dim * jnp.dtype(case.page_dtype).itemsize


def operations(case: Case) -> int:
    """Multiplications and additions that a causal prefill needs: two products over the pairs of tokens that see each other."""
    pairs = sum(chunk * (length - chunk) + chunk * (chunk + 1) // 2 for length, chunk in zip(case.lengths, case.chunk_lens, strict=True))
    return 4 * pairs * case.heads.heads * case.heads.head_dim


def sweep() -> Iterator[tuple[str, Case]]:
    """Decode over batch, context, page, head size and dtype; a case whose pages would not fit is left out."""
    for batch, context in itertools.product((1, 8, 64, 512), (512, 4096, 32768, 131072)):
        for page_size, heads, dtype in (
            (64, LLAMA_8B, None), (16, LLAMA_8B, None), (64, LLAMA_8B, FP8), (64, QWEN_05B, None), (64, Heads(8, 4, 256), None),
        ):  # fmt: skip
            case = Case(heads, (context,) * batch, page_size=page_size, pages=dtype)
            if read_bytes(case) < MEMORY:
                yield f"{batch}x{context}", case


# ---------------------------------------------------------------------- rows


class Bench:
    """What is timed where. Rows go to the result file, and to stdout for whoever waits."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, jax.devices()[0]
        self.machine = MACHINES.get(self.device.device_kind)
        self.rows: list[record.Row] = []

    def implementations(self, case: Case) -> list[str]:
        """The one that would be chosen, or all that were asked for."""
        heads = case.heads
        shape: dict[str, Any] = dict(head_dim=heads.head_dim, dtype=case.page_dtype, page_size=case.page_size, group=heads.group)
        return self.args.implementation or [implementation_for(capability_of(self.device), **shape)]

    def attention(self, name: str, case: Case) -> None:
        for implementation in self.implementations(case):
            try:
                times = attention_seconds(case, implementation, self.args.repeats)
            except NotImplementedError as error:
                print(f"{name}: {error}", flush=True)
                continue
            for load, took in times.items():
                self.attended(name, case, implementation, took, {} if load is None else {"load": load})

    def attended(self, name: str, case: Case, implementation: str, took: float, load: dict[str, str]) -> None:
        decode = not case.chunk
        done = (read_bytes(case) if decode else operations(case)) / took / 1e12
        limit = self.machine and (self.machine.read if decode else self.machine.ops) / 1e12
        row = {
            "name": "kernel_decode_TBps" if decode else "kernel_prefill_TFs",
            "value": round(done, 3),
            "unit": "TB/s" if decode else "TFLOP/s",
            "case": name,
            "implementation": implementation,
            "batch": len(case.lengths),
            "context": round(statistics.mean(case.lengths)),
            "tokens": case.chunk or len(case.lengths),
            "page": case.page_size,
            **asdict(case.heads),
            "dtype": case.page_dtype,
        }
        row |= ({"MB": round(read_bytes(case) / 1e6, 1)} if decode else {}) | load
        self.keep(row, took, limit, FA3.get(self.device.device_kind, {}).get(name) if case.page_dtype == "bfloat16" else None)

    def write(self, rows: int, heads: Heads) -> None:
        took = write_seconds(rows, heads, 64, self.args.repeats)
        bytes_moved = 2 * 2 * 2 * rows * heads.kv_heads * heads.head_dim  # K and V, read and written
        row = {
            "name": "kernel_write_kv_us",
            "value": round(took * 1e6, 2),
            "unit": "us",
            "batch": rows,
            "page": 64,
            **asdict(heads),
            "dtype": "bfloat16",
        }
        self.keep(row, took, self.machine and bytes_moved / self.machine.read * 1e6, None)

    def keep(self, row: record.Row, took: float, limit: float | None, anchor: float | None) -> None:
        row |= {key: round(value, 3) for key, value in (("limit", limit), ("anchor", anchor)) if value is not None}
        share = "" if limit is None or row["unit"] == "us" else f"  {100 * row['value'] / limit:5.1f}% of {limit:.4g}"
        kind = f"{row.get('implementation', '')} {row['heads']}/{row['kv_heads']}x{row['head_dim']} page {row['page']} {row['dtype']}"
        kind += f" {row.get('load', '')}"
        value = f"{row['value']:9.3f} {row['unit']:8} {took * 1e6:9.2f} us{share}"
        print(f"{row['name']:20} {row.get('case', row['batch']):>16} {kind:50} {value}", flush=True)
        self.rows.append(row)

    def save(self) -> None:
        if self.rows:
            command = record.command("python -m bench.kernels", sys.argv[1:], self.args.results, self.args.plot)
            print(record.save("kernels", self.device.device_kind, command, self.rows, self.args.results))


# ---------------------------------------------------------------------- tuning


DECODES = [
    blocks.Decode(*sizes)
    for sizes in (
        (64, 4, 2, 3), (64, 4, 2, 4), (64, 4, 3, 1), (64, 4, 3, 2), (64, 2, 2, 4), (64, 2, 3, 4), (32, 4, 3, 3), (32, 2, 3, 4),
        (64, 4, 2, 1), (128, 4, 2, 1), (128, 4, 2, 3), (128, 4, 2, 4), (128, 2, 2, 4), (128, 4, 3, 1),
    )
]  # fmt: skip
PREFILLS = [blocks.Prefill(*sizes) for sizes in itertools.product((64, 128), (32, 64), (4, 8), (2, 4))]
TUNED_LENGTHS = (1024, 4096)  # a step's plan does not know its rows' lengths: decode sizes must serve short and long ones
NOISE = 0.02  # a smaller gain is none: the default stays


def tuned_cases() -> dict[str, Case]:
    """What `--tune` measures without --case: the heads of the models in ANCHORS, alone and as tensor parallelism cuts larger ones."""
    decodes = {
        f"{heads.heads}/{heads.kv_heads}x{heads.head_dim} {pages or 'bfloat16'} {rows}": Case(
            heads, (max(TUNED_LENGTHS),) * rows, pages=pages
        )
        for heads, pages in ((LLAMA_8B, None), (QWEN_3B, None), (QWEN_05B, None), (LLAMA_8B, FP8), (QWEN_05B, FP8))
        for rows in ((1, 64, 256) if pages else (1, 8, 16, 64, 256))
    }
    return decodes | PREFILL


def tune(device_kind: str, repeats: int, cases: dict[str, Case], folder: Path) -> Path:
    """Times every candidate on every case and merges the fastest into the device's file."""
    path = folder / blocks.file_name(device_kind)
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    for name, case in cases.items():
        op, candidates = ("prefill", PREFILLS) if case.chunk else ("decode", list(DECODES))
        heads, page, rows = case.heads, case.page_size, case.chunk or len(case.lengths)
        shape = {"op": op, "head_dim": heads.head_dim, "group": heads.group, "page_size": page, "dtype": case.page_dtype, "rows": rows}
        usual = blocks.default(op, blocks.Shape(heads.head_dim, heads.group, page, case.page_dtype, rows, max(case.lengths)))
        if case.chunk:
            shape["length"] = -(-max(case.lengths) // page) * page
        best, times = chosen(usual, _tried(op, [usual, *(c for c in candidates if c != usual)], case, repeats))
        if best is None:
            continue
        before = [row for row in kept if all(row.get(key) == value for key, value in shape.items())]
        kept = [row for row in kept if row not in before]
        early = next(({"early": row["early"]} for row in before if "early" in row), {})  # told by steps, not by a kernel alone
        kept.append(shape | asdict(best) | early | {"us": {str(length): round(us * 1e6, 2) for length, us in times.items()}})
        _write_table(path, device_kind, kept)
        print(f"{name:30} {best} {kept[-1]['us']}", flush=True)
    return path


def chosen(usual: Any, times: dict[Any, dict[int, float]]) -> tuple[Any, dict[int, float]]:
    """The sizes with the least product of times over the lengths, `usual` unless another gains more than noise; None if nothing ran."""
    cost = {sizes: math.prod(each.values()) ** (1 / len(each)) for sizes, each in times.items()}
    if not cost:
        return None, {}
    best = min(cost, key=lambda sizes: cost[sizes])
    best = usual if usual in cost and cost[usual] < cost[best] * (1 + NOISE) else best
    return best, times[best]


def _write_table(path: Path, device_kind: str, rows: list[dict]) -> None:
    rows = sorted(rows, key=lambda row: [str(value) for value in row.values()])
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "device": {json.dumps(device_kind)},\n  "rows": [\n{lines}\n  ]\n}}\n')


def _tried(op: str, candidates: list, case: Case, repeats: int) -> dict[Any, dict[int, float]]:
    """Seconds by candidate and length; without the candidates that cannot be compiled, as when the shared memory is too small.

    Decode is tried on rows of all `TUNED_LENGTHS` up to the case's, in programs that are compiled once and side by side.
    """
    longest = max(case.lengths)
    lengths = [length for length in TUNED_LENGTHS if length < longest and op == "decode"] + [longest]
    drawn, tried = draw(case, min(lengths)), {}
    with ThreadPoolExecutor() as pool, mock.patch(f"{__name__}.draw", lambda case: drawn):
        for candidate in candidates:
            with mock.patch("pallas_kernels.attention.blocks", partial(_chosen, op, candidate)):
                timed = [
                    attention(case, "portable", drawn[1] if n == longest else replace(drawn[1], length_M=drawn[1].length_M * 0 + n))
                    for n in lengths
                ]
                try:
                    programs = timed[0].lowered()
                except (NotImplementedError, ValueError):
                    continue
            tried[candidate] = timed, [pool.submit(program.compile) for program in programs]
        done = {}
        for candidate, (timed, programs) in tried.items():
            try:
                few, many = (program.result() for program in programs)
            except jax.errors.JaxRuntimeError:
                continue
            held = _holding_seconds(drawn[1].table_MP.shape, timed[0].links, repeats)
            done[candidate] = {length: each.seconds(few, many, repeats) - held for length, each in zip(lengths, timed, strict=True)}
        return done


def _chosen(op: str, candidate: Any, asked: str, kind: str, shape: blocks.Shape):
    return candidate if asked == op else blocks.blocks(asked, kind, shape)


# ---------------------------------------------------------------------- command

GROUPS = ("decode", "prefill", "write", "sweep")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.kernels", description="Times the attention kernels on the GPU at hand.")
    p.add_argument("--only", choices=GROUPS, action="append", help="a group to run; without it, all of them, or those of --case")
    p.add_argument(
        "--case", choices=[*DECODE, *PREFILL], action="append", help="a case of decode or prefill to run or tune; all without it"
    )
    p.add_argument("--implementation", choices=("portable", "sm90"), action="append", help="all of these, not the one that would be chosen")
    p.add_argument("--repeats", type=int, default=7, help="differences that a median is taken of")
    p.add_argument("--tune", action="store_true", help="find block sizes for the portable kernels, and write them into the package")
    p.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the result file")
    p.add_argument("--plot", type=Path, help="a PNG to draw; needs the extra `bench`")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"bench.kernels times GPU kernels, and JAX sees no GPU here but {device.device_kind!r}")
    if args.tune:
        tuning = Path(blocks.__file__).parent / "tuning"
        print(tune(device.device_kind, args.repeats, _tuned(args.case), tuning))
        return
    bench, only = Bench(args), args.only or (GROUPS[:2] if args.case else GROUPS)
    cases = {"decode": _asked(DECODE, args.case), "prefill": _asked(PREFILL, args.case), "sweep": dict(_named(sweep()))}
    for group in only:
        if group == "write":
            for rows, heads in itertools.product((64, 256), (LLAMA_8B, QWEN_05B)):
                bench.write(rows, heads)
        else:
            for name, case in cases[group].items():
                bench.attention(name.split("#")[0], case)
                bench.save()
        bench.save()
    if args.plot:
        plots.kernels(bench.rows, args.plot, f"Attention on {device.device_kind}")


def _tuned(names: list[str] | None) -> dict[str, Case]:
    """All that `--tune` knows; of given names, any case of the bench."""
    return tuned_cases() if names is None else _asked(DECODE | PREFILL, names)


def _asked(cases: dict[str, Case], names: list[str] | None) -> dict[str, Case]:
    return {name: case for name, case in cases.items() if names is None or name in names}


def _named(cases: Iterator[tuple[str, Case]]) -> Iterator[tuple[str, Case]]:
    """Names of their own for cases that share one."""
    return ((f"{name}#{i}", replace(case)) for i, (name, case) in enumerate(cases))


if __name__ == "__main__":
    main()
