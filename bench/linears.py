"""Times the linear layers of a decode step on the GPU at hand, product by product: `python -m bench.linears [--tune] [--rows N ...]`.

Weights are cold: each call reads another copy, and all of them together are more than the second-level cache holds. A time is the median
of a kernel's runs as JAX's profiler saw them, and beside it stands what reading the weights must take. Before it is timed, whatever is
ours is compared with float64. For 8, 64, 128 and 256 rows the tile in the package's `tuning/linear/` folder is timed beside XLA's own
product, and marked as compared. `--tune` tries tiles first, and writes the fastest into that folder, if it is faster than XLA's product. A
product of more rows than one may leave parts, which are dear to whoever sums them, so it is tuned together with its reader: the norm
behind o and down, the turn and write behind QKV. Of several devices one's part is timed.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from bench import record
from bench.profile import spans
from bench.workloads import MACHINES, SHAPES, Shape
from pallas_kernels.blocks import file_name
from pallas_kernels.kv_write import turn_and_write
from pallas_kernels.matmul import Product, many_rows_tile, one_row_tile
from pallas_kernels.matmul_join import join
from pallas_kernels.matmul_one_row import Tile, linear
from pallas_kernels.matmul_sm90 import LINES, stages
from pallas_kernels.matmul_sm90 import Tile as ManyTile
from pallas_kernels.matmul_sm90 import linear as many_rows_linear
from pallas_kernels.matmul_sm90_wide import Tile as WideTile
from pallas_kernels.matmul_sm90_wide import linear as wide_linear

MODELS = ("qwen2.5-0.5b", "qwen2.5-3b", "llama-3.1-8b")
COLD = 200e6  # bytes of weights between two reads of the same one
RIGHT = 1e-2  # share of an error that rounding to bfloat16 explains
WIDEST = 2**15  # weights of a turn: what registers hold
MANY = (8, 64, 128, 256)  # rows that the tuning file has tiles for, beside one
FASTER = 0.98  # of another's time: a smaller gain is noise, and no reason to change
CANDIDATES = [
    Tile(2, 1024, 4), Tile(4, 512, 4), Tile(16, 512, 8), Tile(4, 256, 2), Tile(4, 512, 2), Tile(8, 256, 4),
    Tile(1, 2048, 2), Tile(1, 4096, 4), Tile(2, 2048, 4), Tile(2, 4096, 8), Tile(1, 8192, 8), Tile(2, 8192, 8), Tile(2, 1024, 2),
    Tile(2, 1024, 4, True), Tile(2, 1024, 2, True), Tile(4, 512, 4, True), Tile(1, 2048, 4, True), Tile(2, 2048, 8, True),
    Tile(8, 256, 4, True), Tile(4, 1024, 8, True), Tile(1, 1024, 2, True), Tile(2, 512, 2, True),
]  # fmt: skip


def products(model: str, devices: int = 1) -> dict[str, Product]:
    """A device's part of the four products of a layer: QKV, o, gate and up, down. Raises SystemExit if the devices do not divide it."""
    shape = Shape.of(SHAPES[model])
    assert shape is not None
    if shape.kv_heads % devices or shape.intermediate % devices:
        raise SystemExit(f"{devices} devices do not divide {model}: {shape.kv_heads} KV heads, {shape.intermediate} MLP features")
    heads, hidden = shape.heads * shape.head_dim // devices, shape.intermediate // devices
    return {
        "qkv": Product(heads + 2 * shape.kv_heads * shape.head_dim // devices, shape.hidden),
        "o": Product(shape.hidden, heads),
        "gate_up": Product(hidden, shape.hidden, True),
        "down": Product(shape.hidden, hidden),
    }


AnyTile = Tile | ManyTile | WideTile


@dataclass(frozen=True)
class Call:
    """One product with what stands around it in a layer, and what it means in float64."""

    product: Product
    weights: list[jax.Array]
    x: jax.Array
    around: dict[str, jax.Array]  # a norm before, or a residual behind

    @classmethod
    def draw(cls, product: Product, name: str, rows: int) -> "Call":
        key, size = jax.random.key(1), (product.features * (1 + product.gated), product.inputs)
        copies = max(2, min(48, int(COLD / cls.bytes(product)) + 1))
        weights = [jax.random.normal(jax.random.fold_in(key, i), size, jnp.bfloat16) * product.inputs**-0.5 for i in range(copies)]
        x = jax.random.normal(jax.random.fold_in(key, 100), (rows, product.inputs), jnp.bfloat16)
        if rows > 1:
            return cls(product, weights, x, {})
        if name in ("qkv", "gate_up"):
            return cls(product, weights, x, {"norm_D": 1 + jax.random.normal(key, (product.inputs,), jnp.bfloat16) / 8})
        return cls(product, weights, x, {"residual_1F": jax.random.normal(key, (1, product.features), jnp.bfloat16)})

    def meant(self) -> np.ndarray:
        x, weight = np.asarray(self.x, np.float64), np.asarray(self.weights[0], np.float64)
        if "norm_D" in self.around:
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(self.around["norm_D"], np.float64)
        y = x @ weight.T
        if self.product.gated:
            gate, up = np.split(y, 2, axis=1)
            y = gate / (1 + np.exp(-gate)) * up
        return y + np.asarray(self.around.get("residual_1F", 0.0), np.float64)

    @property
    def act(self) -> Callable[[jax.Array], jax.Array] | None:
        return jax.nn.silu if self.product.gated else None

    @staticmethod
    def bytes(product: Product) -> int:
        return 2 * product.features * (1 + product.gated) * product.inputs


def candidates(product: Product) -> list[Tile]:
    """Tiles whose turn is no longer than the inputs and fits into registers."""
    longest = 1 << (product.inputs - 1).bit_length()
    halved = [Tile(max(1, t.features // 2), t.inputs, t.num_warps, t.ahead) if product.gated else t for t in CANDIDATES]
    fitting = [t for t in halved if t.inputs <= longest and t.features * t.inputs * (1 + product.gated) <= WIDEST]
    return list(dict.fromkeys(t for t in fitting if not t.ahead or t.inputs < product.inputs))


def many_rows_candidates(product: Product, rows: int, cores: int) -> list[ManyTile]:
    """For each way to split the inputs and to share the copies of x, the tile whose blocks fill the multiprocessors best, in one wave."""
    lines, halves, found = max(1, rows // (2 * LINES)), 1 + product.gated, {}
    for features, inputs, parts, cluster in itertools.product(range(24, 136, 8), (64, 128), (1, 2, 4, 7), (1, 2, 4)):
        tile, wide, turns = ManyTile(features, inputs, parts, cluster), features * halves, product.inputs // (inputs * parts)
        blocks = -(-product.features // (features * cluster)) * cluster * parts
        # Other clusters gained nothing; wider turns leave too few of them in shared memory.
        usual = cluster == 1 if rows < LINES else cluster > 1 if rows <= 2 * LINES else cluster < 4 and (inputs == 64 or wide <= LINES)
        fits = product.inputs % (inputs * parts) == 0 and wide * lines <= 256 and not (product.gated and parts > 1)
        held = usual and fits and stages(rows, product.inputs, tile, halves=halves, itemsize=2) >= min(3, turns)
        if held and cores / 2 <= blocks <= cores:
            found.setdefault((inputs, parts, cluster), tile)
    return list(found.values())


def apart(found: Any, meant: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - meant) / np.linalg.norm(meant))


def timed(calls: Sequence[Callable], call: Call) -> list[float]:
    """Microseconds of each of `calls` on cold weights: the kernels of a run together, in the median of its runs."""
    marks, rounds = [], 2
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        for _ in range(rounds):
            for i, run in enumerate(calls):
                for weight in call.weights:
                    out = run(call.x, weight, call.around)
                    marks.append(i)
            jax.block_until_ready(out)
        jax.profiler.stop_trace()
        kernels = sorted(
            (s for s in spans(Path(folder)) if s.plane.startswith("/device:GPU") and "Stream" in s.line), key=lambda s: s.start
        )
    per_run = len(kernels) / len(marks)
    if per_run != int(per_run):
        raise SystemExit(f"{len(kernels)} kernels ran in {len(marks)} runs: give each call the same number of kernels")
    found = defaultdict(list)
    for place, i in enumerate(marks):
        found[i].append(sum(s.duration for s in kernels[place * int(per_run) : (place + 1) * int(per_run)]))
    return [median(found[i]) for i in range(len(calls))]


def compiled(call: Call, run: Callable) -> Callable:
    return jax.jit(run).lower(call.x, call.weights[0], call.around).compile()


def tune(kind: str, name: str, product: Product) -> dict[str, Any]:
    """The fastest tile of one row, as the tuning file has it."""
    used = one_row_tile(kind, product)
    call, tiles = Call.draw(product, name, 1), list(dict.fromkeys([used, *candidates(product)]))

    def made(tile: Tile) -> Callable:
        return compiled(call, lambda x, weight, around: linear(x, weight, tile=tile, act=call.act, eps=1e-6, **around))

    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(made, tiles))
    meant = call.meant()
    if wrong := [t for t, run in zip(tiles, runs, strict=True) if not apart(run(call.x, call.weights[0], call.around), meant) < RIGHT]:
        raise SystemExit(f"{product}: these tiles compute something else: {wrong}")
    times = timed(runs, call)
    order = sorted(range(len(tiles)), key=lambda i: times[i])
    reading = 1e6 * Call.bytes(product) / MACHINES[kind].read
    print(f"{name:8} {product}: in use {astuple(used)} {times[0]:.2f} us; reading {reading:.2f}; tried:")
    print("         " + ", ".join(f"{astuple(tiles[i])} {times[i]:.2f}" for i in order[:8]), flush=True)
    return tuned(product, 1, tiles[order[0]], times[order[0]])


@dataclass(frozen=True)
class Reader:
    """What stands behind a product of many rows in a layer of the model, and sums its parts."""

    name: str
    shape: Shape

    def draw(self, rows: int) -> dict[str, jax.Array]:
        """What it reads besides the product."""
        key, shape = jax.random.key(2), self.shape
        if self.name in ("o", "down"):
            return {"h_ND": jax.random.normal(key, (rows, shape.hidden), jnp.bfloat16), "norm_D": jnp.ones(shape.hidden, jnp.bfloat16)}
        if self.name == "gate_up":
            return {}
        pages = jnp.zeros((-(-rows // 64), shape.kv_heads, 64, shape.head_dim), jnp.bfloat16)
        angle = jax.random.uniform(key, (rows, 1, shape.head_dim // 2))
        return {"k_pages": pages, "v_pages": pages, "slot_N": jnp.arange(rows), "cos": jnp.cos(angle), "sin": jnp.sin(angle)}

    def __call__(self, parts_PNF: jax.Array, around: dict[str, jax.Array]) -> Any:
        if self.name in ("o", "down"):
            return join(around["h_ND"], parts_PNF, around["norm_D"], eps=1e-6)[1]
        if self.name == "gate_up":
            return parts_PNF
        pages, turns = (around["k_pages"], around["v_pages"]), (around["cos"], around["sin"])
        return turn_and_write(*pages, parts_PNF, around["slot_N"], heads=self.shape.heads, cos_sin=turns)


def tune_many(kind: str, model: str, name: str, product: Product, rows: int, cores: int) -> dict[str, Any] | None:
    """The fastest tile of so many rows as the tuning file has it, the product's reader considered; None if XLA's product is faster."""
    shape, used = Shape.of(SHAPES[model]), many_rows_tile(kind, rows, product, trial=True)
    assert shape is not None
    plain, reader = Call.draw(product, name, rows), Reader(name, shape)
    call = replace(plain, around=reader.draw(rows))
    in_use: list[AnyTile] = [] if used is None else [used]
    tiles = list(dict.fromkeys([*in_use, *many_rows_candidates(product, rows, cores)]))

    def run_of(tile: AnyTile | None) -> Callable:
        def run(x, weight, around):
            if tile is not None:
                return reader(_ours(tile, call.act, x, weight, {}), around)
            y = jnp.einsum("nd,fd->nf", x, weight)
            if call.act is not None:
                gate, up = jnp.split(y, 2, axis=1)
                y = call.act(gate) * up
            return reader(y[None], around)

        return compiled(call, run)

    with ThreadPoolExecutor() as pool:
        xla, *runs = pool.map(run_of, [None, *tiles])
    meant, *found = (np.asarray(jax.tree.leaves(run(call.x, call.weights[0], call.around))[0], np.float64) for run in (xla, *runs))
    if wrong := [tile for tile, out in zip(tiles, found, strict=True) if not apart(out, meant) < RIGHT]:
        raise SystemExit(f"{product}, {rows} rows: these tiles compute something else: {wrong}")
    times, others = timed(runs, call) if runs else [], timed([xla], call)[0]
    order = sorted(range(len(tiles)), key=lambda i: times[i] * (FASTER if tiles[i] == used else 1))
    tried = ", ".join(f"{astuple(tiles[i])} {times[i]:.2f}" for i in order)
    print(f"{rows:4} {name:8} {product}: XLA {others:.2f} us; {tried}", flush=True)
    if not order or times[order[0]] * FASTER > others:
        return None
    best = tiles[order[0]]
    alone = compiled(call, lambda x, weight, around: _ours(best, call.act, x, weight, {}))
    made = np.asarray(alone(call.x, call.weights[0], call.around), np.float64)
    if not (error := apart(made.sum(0) if made.ndim == 3 else made, plain.meant())) < RIGHT:
        raise SystemExit(f"{name} of {model}, {rows} rows: {best} computes something else, {error:.2g} of it")
    return tuned(product, rows, best, timed([alone], call)[0])


def compare(
    kind: str, model: str, name: str, product: Product, rows: int, devices: int = 1
) -> tuple[list[record.Row], dict[str, Any] | None]:
    """What is in use for so many rows on each of the devices, and XLA's product, as rows; the tuning file's row, if that is one of it."""
    call, floor = Call.draw(product, name, rows), record.rounded(1e6 * Call.bytes(product) / MACHINES[kind].read)
    common = {"model": model, "product": name, "batch": rows, "dtype": "bfloat16", "tp": devices, "limit": floor}
    runs = {"xla": compiled(call, lambda x, weight, around: jnp.einsum("nd,fd->nf", x, weight))}
    tile = one_row_tile(kind, product) if (rows, devices) == (1, 1) else many_rows_tile(kind, rows, product, trial=True)
    if tile is not None:
        runs["ours"] = compiled(call, partial(_ours, tile, call.act))
        made = np.asarray(runs["ours"](call.x, call.weights[0], call.around), np.float64)
        if (error := apart(made.sum(0) if made.ndim == 3 else made, call.meant())) > RIGHT:  # of parts, the sum
            raise SystemExit(f"{name} of {model}, {rows} rows: {tile} computes something else, {error:.2g} of it")
    found = [
        {"name": "linear_us", "value": record.rounded(timed([run], call)[0]), "unit": "us", "by": by} | common for by, run in runs.items()
    ]
    for row in found:
        print(f"{name:8} {row['by']:5}", record.describe(row), flush=True)
    return found, tuned(product, rows, tile, found[-1]["value"]) if rows in MANY and tile is not None else None


def _ours(tile: AnyTile, act, x, weight, around):
    if isinstance(tile, Tile):
        return linear(x, weight, tile=tile, act=act, eps=1e-6, **around)
    if isinstance(tile, WideTile):
        return wide_linear(x, weight, jnp.full(3, len(x), jnp.int32), tile=tile, act=act, workers=jax.devices()[0].core_count)
    return many_rows_linear(x, weight, tile=tile, act=act)


def tuned(product: Product, rows: int, tile: AnyTile, us: float) -> dict[str, Any]:
    """A row of the tuning file."""
    row = {"rows": rows, "features": product.features, "inputs": product.inputs, "gated": product.gated}
    return row | {"tile": [int(n) for n in astuple(tile)], "us": round(us, 2), "compared": True}


def write(kind: str, rows: list[dict[str, Any]], folder: Path, tried: Iterable[tuple[int, Product]] = ()) -> Path:
    """Puts rows into the device's tuning file, in place of those of the same rows and product, or of products that were tried so."""
    path = folder / file_name(kind)
    head = {"device": kind, "tile": "one row: features, inputs, num_warps, ahead; more: features, inputs, parts, cluster, blocks"}
    head["compared"] = "with float32 or more on a GPU; no engine takes the others"
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []

    def key(row: dict[str, Any]) -> tuple:
        return row["rows"], row["inputs"], row["features"], row["gated"]

    gone = {(rows, product.inputs, product.features, product.gated) for rows, product in tried}
    merged = {key(row): row for row in (*(row for row in kept if key(row) not in gone), *rows)}
    lines = ",\n".join("    " + json.dumps(merged[k]) for k in sorted(merged))
    path.write_text(json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "rows": [\n{lines}\n  ]\n}}\n')
    return path


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.linears", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--model", nargs="+", choices=list(SHAPES), default=list(MODELS), help=f"default: {' '.join(MODELS)}")
    made.add_argument("--rows", nargs="*", type=int, default=[1, *MANY], help="rows of the steps that are timed")
    made.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="time one device's part among so many (default: 1)")
    made.add_argument("--tune", action="store_true", help="find the tiles for these rows, and write them into the package")
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
    if args.tune and args.tensor_parallel_size > 1:
        raise SystemExit("--tune finds tiles for whole products, and of several devices each has parts; leave out --tensor-parallel-size")
    if args.tune and (unknown := sorted({*args.rows} - {1, *MANY})):
        raise SystemExit(
            f"--tune finds tiles for {', '.join(map(str, (1, *MANY)))} rows, and --rows asks for {', '.join(map(str, unknown))}"
        )
    if args.tune:
        for model, rows in itertools.product(args.model, args.rows):
            each = products(model)
            if rows == 1:
                found = [tune(kind, name, product) for name, product in each.items()]
            else:
                found = [tune_many(kind, model, name, product, rows, device.core_count) for name, product in each.items()]
            path = write(kind, [row for row in found if row is not None], folder, [(rows, product) for product in each.values()])
            print(f"written: {path}; the next process takes them", flush=True)
        return
    command = record.command("python -m bench.linears", argv, args.results)
    for model in args.model:
        for count in args.rows:
            each = products(model, args.tensor_parallel_size)
            made = [compare(kind, model, name, product, count, args.tensor_parallel_size) for name, product in each.items()]
            record.save("linears", kind, command, [row for rows, _ in made for row in rows], args.results)
            write(kind, [row for _, row in made if row is not None], folder)


if __name__ == "__main__":
    main()
