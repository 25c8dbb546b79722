"""Times the linear layers of a decode step on the GPU at hand, product by product: `python -m bench.linears [--tune] [--rows N ...]`.

Beside each time stands what reading the weights must take. Before it is timed, whatever is ours is compared with float64. For 8, 64, 128,
256, 384 and 512 rows the tile in the package's `tuning/linear/` folder, if it has one, is timed beside XLA's own product, compiled as in a
step of so many rows, and marked as compared. `--tune` tries tiles first (`bench.tiles`), and writes the fastest into that folder, unless
XLA's product is faster. `--widths` only prints what tiles of each width take, of 768 rows and more. Of several devices one's part is timed.
For one row the head is a product as well.
"""

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from bench import calls, record
from bench.calls import Call, compiled, products, with_head
from bench.tiles import MANY, time_widths, tune, tune_many, tuned, write
from bench.workloads import MACHINES, SHAPES
from pallas_kernels.matmul import WIDE_ROWS, Product, many_rows_tile, one_row_tile

MODELS = ("qwen2.5-0.5b", "qwen2.5-3b", "llama-3.1-8b")


def compare(
    kind: str, model: str, name: str, product: Product, rows: int, cores: int, devices: int = 1
) -> tuple[list[record.Row], dict[str, Any] | None]:
    """What is in use for so many rows on each of the devices, and XLA's product, as rows; the tuning file's row, if that is one of it."""
    call, floor = Call.draw(product, name, rows), record.rounded(1e6 * Call.bytes(product) / MACHINES[kind].read)
    common = {"model": model, "product": name, "batch": rows, "dtype": "bfloat16", "tp": devices, "limit": floor}
    runs = {"xla": compiled(call, lambda x, weight, around: jnp.einsum("nd,fd->nf", x, weight))}
    tile = one_row_tile(kind, product) if (rows, devices) == (1, 1) else many_rows_tile(kind, rows, product, cores=cores, trial=True)
    if tile is not None:
        runs["ours"] = compiled(call, partial(calls.ours, tile, call.act))
        calls.check(call, runs["ours"], f"{name} of {model}, {rows} rows: {tile}")
    times = {by: calls.timed([run], call)[0] for by, run in runs.items()}
    found = [{"name": "linear_us", "value": record.rounded(us), "unit": "us", "by": by} | common for by, us in times.items()]
    for row in found:
        print(f"{name:8} {row['by']:5}", record.describe(row), flush=True)
    return found, tuned(product, rows, tile, found[-1]["value"]) if rows in MANY and tile is not None else None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.linears", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--model", nargs="+", choices=list(SHAPES), default=list(MODELS), help=f"default: {' '.join(MODELS)}")
    made.add_argument("--rows", nargs="*", type=int, default=[1, *MANY], help="rows of the steps that are timed")
    made.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="one device's part among so many (default: 1)")
    made.add_argument("--tune", action="store_true", help="find the tiles for these rows, and write them into the package")
    made.add_argument("--widths", action="store_true", help=f"print what tiles of each width take for these rows, {WIDE_ROWS} and more")
    made.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the result files")
    return made


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, device = parser().parse_args(argv), jax.devices()[0]
    if device.platform != "gpu" or device.device_kind not in MACHINES:
        raise SystemExit(
            f"this times kernels of an NVIDIA GPU whose limits are known ({', '.join(MACHINES)}), and here is {device.device_kind}"
        )
    kind, folder = device.device_kind, Path(pallas_kernels.__file__).parent / "tuning" / "linear"
    if args.tune and args.tensor_parallel_size > 1 and 1 in args.rows:
        raise SystemExit("--tune finds no tiles for one row of several devices, whose products are XLA's; leave 1 out of --rows")
    if args.tune and (unknown := sorted({*args.rows} - {1, *MANY})):
        raise SystemExit(
            f"--tune finds tiles for {', '.join(map(str, (1, *MANY)))} rows, and --rows asks for {', '.join(map(str, unknown))}"
        )
    if args.tune:
        for model, rows in itertools.product(args.model, args.rows):
            devices = args.tensor_parallel_size
            each = with_head(model, rows, devices)
            if rows == 1:
                found = [tune(kind, name, product) for name, product in each.items()]
            else:
                found = [tune_many(kind, model, name, product, rows, device.core_count, devices) for name, product in each.items()]
            path = write(kind, [row for row in found if row is not None], folder, [(rows, product) for product in each.values()])
            print(f"written: {path}; the next process takes them", flush=True)
        return
    if args.widths:
        if few := [rows for rows in args.rows if rows < WIDE_ROWS]:
            raise SystemExit(f"--widths is for {WIDE_ROWS} rows and more, and --rows asks for {', '.join(map(str, few))}")
        for model, rows in itertools.product(args.model, args.rows):
            for name, product in products(model, args.tensor_parallel_size).items():
                time_widths(kind, name, product, rows, device.core_count)
        return
    command = record.command("python -m bench.linears", argv, args.results)
    for model in args.model:
        for count in args.rows:
            each = with_head(model, count, args.tensor_parallel_size)
            made = [
                compare(kind, model, name, product, count, device.core_count, args.tensor_parallel_size) for name, product in each.items()
            ]
            record.save("linears", kind, command, [row for rows, _ in made for row in rows], args.results)
            write(kind, [row for _, row in made if row is not None], folder)


if __name__ == "__main__":
    main()
