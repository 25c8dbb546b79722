"""Finds the tiles of linear layers on the GPU at hand, and keeps them in the package's `tuning/linear/` folder.

A product of more rows than one may leave parts, which are dear to whoever sums them, so it is tuned together with its reader: the norm
behind o and down, the turn and write behind QKV. What computes something else is refused.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import calls
from bench.calls import RIGHT, AnyTile, Call, apart, compiled
from bench.workloads import MACHINES, SHAPES, Shape
from pallas_kernels import matmul_sm90_wide
from pallas_kernels.blocks import file_name
from pallas_kernels.kv_write import turn_and_write
from pallas_kernels.matmul import MEASURED, Product, many_rows_tile, one_row_tile
from pallas_kernels.matmul_join import join
from pallas_kernels.matmul_one_row import PACK, Tile
from pallas_kernels.matmul_sm90 import LINES, ROWS, stages
from pallas_kernels.matmul_sm90 import Tile as ManyTile
from pallas_kernels.matmul_sm90_wide import Tile as WideTile

FEWEST = 100  # programs
HELD = 160  # numbers of a thread, of the 255 that it has registers for: the rest are addresses
SUMS = 384  # features of a warpgroup's runs of rows together: half as many registers of each thread
MANY = tuple(sorted({*MEASURED.values()}))  # rows that the tuning file has tiles for, beside one
FASTER = 0.98  # of another's time: a smaller gain is noise, and no reason to change a tile or to leave a product to XLA


def candidates(product: Product) -> list[Tile]:
    """Tiles whose row, weights and sums fit into registers, with a program for each of many multiprocessors."""
    halves, found = 1 + product.gated, []
    for num_warps, features, together, ahead in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4), (False, True)):
        tile = Tile(features, together, num_warps, ahead)
        turns, runs = -(-product.inputs // tile.inputs), features // together
        kept = turns if runs > 1 else 1  # turns of the row, and of a run's weights
        held = PACK * kept + together * halves * (PACK + PACK // 2 * kept * (1 + ahead))
        fits = runs >= 1 and tile.inputs < 2 * product.inputs and held <= HELD and product.features >= FEWEST * features
        if fits and not (ahead and (turns if runs == 1 else runs) == 1):
            found.append(tile)
    return found


def many_rows_candidates(product: Product, rows: int, cores: int) -> list[ManyTile | WideTile]:
    """Tiles of up to 256 rows, and from there on of the kernel for hundreds of them, if it can take the product."""
    wide = matmul_sm90_wide.fits(rows, product.features, product.inputs)
    few = few_rows_candidates(product, rows, cores) if rows <= max(ROWS) else []
    return [*few, *(wide_candidates(product, rows, cores) if wide and rows >= max(ROWS) else [])]


def wide_candidates(product: Product, rows: int, cores: int) -> list[WideTile]:
    """Of blocks for themselves and of pairs, the three widths that should take the fewest clocks."""

    def clocks(tile: WideTile) -> float:
        return matmul_sm90_wide.clocks(rows, product.features, product.gated, cores, tile)

    each = [[WideTile(cluster, width) for width in matmul_sm90_wide.WIDTHS] for cluster in (1, 2)]
    return [tile for tiles in each for tile in sorted(tiles, key=clocks)[:3]]


def few_rows_candidates(product: Product, rows: int, cores: int) -> list[ManyTile]:
    """For each way to split the inputs and to share the copies of x, the tile whose blocks fill the multiprocessors best, in one wave."""
    lines, halves, found = max(1, rows // (2 * LINES)), 1 + product.gated, {}
    for features, inputs, parts, cluster in itertools.product(range(24, 136, 8), (64, 128), (1, 2, 4, 7), (1, 2, 4)):
        tile, wide, turns = ManyTile(features, inputs, parts, cluster), features * halves, product.inputs // (inputs * parts)
        blocks = -(-product.features // (features * cluster)) * cluster * parts
        # Other clusters gained nothing; wider turns leave too few of them in shared memory.
        usual = cluster == 1 if rows < LINES else cluster > 1 if rows <= 2 * LINES else cluster < 4 and (inputs == 64 or wide <= LINES)
        fits = product.inputs % (inputs * parts) == 0 and wide * lines <= SUMS and not (product.gated and parts > 1)
        held = usual and fits and stages(rows, product.inputs, tile, halves=halves, itemsize=2) >= min(3, turns)
        if held and cores / 2 <= blocks <= cores:
            found.setdefault((inputs, parts, cluster), tile)
    return list(found.values())


def right(call: Call, tiles: Sequence[AnyTile], what: str) -> list[Callable]:
    """The call's product by each of these tiles, compiled. Raises SystemExit if some compute something else."""
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda tile: compiled(call, partial(calls.ours, tile, call.act)), tiles))
    meant = call.meant()
    if wrong := [t for t, run in zip(tiles, runs, strict=True) if not apart(run(call.x, call.weights[0], call.around), meant) < RIGHT]:
        raise SystemExit(f"{what}: these tiles compute something else: {wrong}")
    return runs


def tune(kind: str, name: str, product: Product) -> dict[str, Any]:
    """The fastest tile of one row, as the tuning file has it."""
    used = one_row_tile(kind, product)
    call, tiles = Call.draw(product, name, 1), list(dict.fromkeys([replace(used, early=False), *candidates(product)]))
    times = calls.timed(right(call, tiles, str(product)), call)
    order = sorted(range(len(tiles)), key=lambda i: times[i])
    reading = 1e6 * Call.bytes(product) / MACHINES[kind].read
    print(f"{name:8} {product}: in use {astuple(used)} {times[0]:.2f} us; reading {reading:.2f}; tried:")
    print("         " + ", ".join(f"{astuple(tiles[i])} {times[i]:.2f}" for i in order[:8]), flush=True)
    return tuned(product, 1, replace(tiles[order[0]], early=used.early), times[order[0]])


@dataclass(frozen=True)
class Reader:
    """What stands behind a product of many rows in a layer of the model, and sums its parts.

    shape: of the model, or of a device's part of it. A sum over devices is left out: it sums parts as the one here does.
    """

    name: str
    shape: Shape

    @classmethod
    def of(cls, name: str, model: str, devices: int) -> "Reader":
        shape = Shape.of(SHAPES[model])
        assert shape is not None
        return cls(name, replace(shape, heads=shape.heads // devices, kv_heads=shape.kv_heads // devices))

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


def tune_many(kind: str, model: str, name: str, product: Product, rows: int, cores: int, devices: int = 1) -> dict[str, Any] | None:
    """The fastest tile of so many rows as the tuning file has it, its reader considered; None if XLA is faster by more than noise."""
    used = many_rows_tile(kind, rows, product, cores=cores, trial=True)
    plain, reader = Call.draw(product, name, rows), Reader.of(name, model, devices)
    call = replace(plain, around=plain.around | reader.draw(rows))
    in_use: list[AnyTile] = [] if used is None else [used]
    tiles = list(dict.fromkeys([*in_use, *many_rows_candidates(product, rows, cores)]))

    def run_of(tile: AnyTile | None) -> Callable:
        def run(x, weight, around):
            if tile is not None:
                made = calls.ours(tile, call.act, x, weight, around)
                return reader(made if made.ndim == 3 else made[None], around)  # hundreds of rows leave one part
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
    times, others = calls.timed(runs, call) if runs else [], calls.timed([xla], call)[0]
    order = sorted(range(len(tiles)), key=lambda i: times[i] * (FASTER if tiles[i] == used else 1))
    tried = ", ".join(f"{astuple(tiles[i])} {times[i]:.2f}" for i in order)
    print(f"{rows:4} {name:8} {product}: XLA {others:.2f} us; {tried}", flush=True)
    if not order or times[order[0]] * FASTER > others:
        return None
    best = tiles[order[0]]
    alone = compiled(plain, partial(calls.ours, best, plain.act))
    calls.check(plain, alone, f"{name} of {model}, {rows} rows: {best}")
    return tuned(product, rows, best, calls.timed([alone], plain)[0])


def time_widths(kind: str, name: str, product: Product, rows: int, cores: int) -> None:
    """Print what each width of a tile of so many rows takes, beside the clocks by which `tile_for` chooses one."""
    used, call = many_rows_tile(kind, rows, product, cores=cores), Call.draw(product, name, rows)
    if not isinstance(used, matmul_sm90_wide.Tile):
        raise SystemExit(f"{product}, {rows} rows: no tile of {matmul_sm90_wide.__name__} fits")
    tiles = [replace(used, features=width) for width in matmul_sm90_wide.WIDTHS]
    turns, xla = product.inputs // matmul_sm90_wide.INPUTS, compiled(call, lambda x, weight, around: jnp.einsum("nd,fd->nf", x, weight))
    clocks = [turns * matmul_sm90_wide.clocks(rows, product.features, product.gated, cores, tile) for tile in tiles]
    times, others = calls.timed(right(call, tiles, f"{product}, {rows} rows"), call), calls.timed([xla], call)[0]
    tried = ", ".join(f"{tile.features} {us:.2f} ({count:.0f})" for tile, us, count in zip(tiles, times, clocks, strict=True))
    print(f"{rows:4} {name:8} {product}: XLA {others:.2f} us; in use {used.features}; tried (clocks): {tried}", flush=True)


def tuned(product: Product, rows: int, tile: AnyTile, us: float) -> dict[str, Any]:
    """A row of the tuning file."""
    row = {"rows": rows, "features": product.features, "inputs": product.inputs, "gated": product.gated}
    return row | {"tile": [int(n) for n in astuple(tile)], "us": round(us, 2), "compared": True}


def write(kind: str, rows: list[dict[str, Any]], folder: Path, tried: Iterable[tuple[int, Product]] = ()) -> Path:
    """Puts rows into the device's tuning file, in place of those of the same rows and product, or of products that were tried so."""
    path = folder / file_name(kind)
    head = {"device": kind, "tile": "one row: features, together, num_warps, ahead, early; more: features, inputs, parts, cluster, blocks"}
    head["wide"] = "a tile of two numbers: cluster, features"
    head["compared"] = "with float32 or more on a GPU; no engine takes the others"
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []

    def key(row: dict[str, Any]) -> tuple:
        return row["rows"], row["inputs"], row["features"], row["gated"]

    gone = {(rows, product.inputs, product.features, product.gated) for rows, product in tried}
    merged = {key(row): row for row in (*(row for row in kept if key(row) not in gone), *rows)}
    lines = ",\n".join("    " + json.dumps(merged[k]) for k in sorted(merged))
    path.write_text(json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "rows": [\n{lines}\n  ]\n}}\n')
    return path
