"""The bench of the linear layers, without its clock: what it tries, what it refuses, what it writes."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import calls, linears, tiles
from jaxllm.programs import UNTRIED
from pallas_kernels import matmul
from pallas_kernels.matmul import Product, one_row_tile
from pallas_kernels.matmul_join import join
from pallas_kernels.matmul_one_row import Tile, linear
from pallas_kernels.matmul_sm90 import Tile as ManyTile
from pallas_kernels.matmul_sm90 import linear as many_rows
from pallas_kernels.matmul_sm90 import stages
from pallas_kernels.matmul_sm90_wide import Tile as WideTile

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SMALL = Product(24, 96, True)


def test_products_are_those_of_the_shapes():
    assert calls.products("qwen2.5-0.5b") == {
        "qkv": Product(1152, 896), "o": Product(896, 896), "gate_up": Product(4864, 896, True), "down": Product(896, 4864)
    }  # fmt: skip
    assert calls.products("llama-3.1-8b")["qkv"] == Product(6144, 4096)
    assert calls.products("llama-3-70b", 4) == {
        "qkv": Product(2560, 8192), "o": Product(8192, 2048), "gate_up": Product(7168, 8192, True), "down": Product(8192, 7168)
    }  # fmt: skip
    with pytest.raises(SystemExit, match=r"4 devices do not divide qwen2\.5-3b: 2 KV heads"):
        calls.products("qwen2.5-3b", 4)


def test_one_row_s_head_is_a_product_of_ours():
    assert calls.with_head("qwen2.5-0.5b", 1) == calls.products("qwen2.5-0.5b") | {"head": Product(151936, 896)}
    assert calls.with_head("qwen2.5-0.5b", 8) == calls.products("qwen2.5-0.5b")
    assert calls.with_head("llama-3-70b", 1, 4) == calls.products("llama-3-70b", 4)
    call = calls.Call.draw(Product(24, 96), "head", 1)
    assert not call.around and call.meant().shape == (1, 24), "its input is normed before, and nothing is added to it"


@pytest.mark.parametrize("product", [p for model in linears.MODELS for p in calls.with_head(model, 1).values()], ids=str)
def test_every_tile_that_is_tried_fits_into_registers(product):
    found = tiles.candidates(product)
    assert len(found) >= 8 and len(set(found)) == len(found)
    for tile in found:
        halves, runs = 1 + product.gated, tile.features // tile.together
        turns = -(-product.inputs // tile.inputs) if runs > 1 else 1
        row, sums, asked = 8 * turns, 8 * halves * tile.together, 4 * turns * halves * tile.together
        assert row + sums + asked * (1 + tile.ahead) <= tiles.HELD and tile.inputs < 2 * product.inputs, tile


@pytest.fixture
def untimed(monkeypatch):
    """Interpreted kernels, of which the third, behind the one in use, is the fastest."""
    monkeypatch.setattr(calls, "linear", partial(linear, interpret=True))
    monkeypatch.setattr(tiles, "candidates", lambda product: [Tile(2, 2, 1), Tile(8, 4, 1, True)])
    monkeypatch.setattr(calls, "timed", lambda runs, call: [3.0, 4.0, 2.0][: len(runs)])
    monkeypatch.setattr(calls, "COLD", 1e4)


def test_the_fastest_tile_is_written_and_taken(untimed, monkeypatch, tmp_path):
    row = tiles.tune("NVIDIA H200", "gate_up", SMALL)
    assert row == {"rows": 1, "features": 24, "inputs": 96, "gated": True, "tile": [8, 4, 1, 1, 0], "us": 2.0, "compared": True}
    folder = tmp_path / "tuning" / "linear"
    folder.mkdir(parents=True)
    path = tiles.write("NVIDIA H200", [row | {"us": 9.0}], folder)
    tiles.write("NVIDIA H200", [row], folder)
    assert json.loads(path.read_text())["rows"] == [row], "a new row replaces the old one of its product"
    monkeypatch.setattr(matmul, "files", lambda package: tmp_path)
    matmul._measured.cache_clear()
    try:
        assert one_row_tile("NVIDIA H200", SMALL) == Tile(8, 4, 1, True)
        assert one_row_tile("NVIDIA H100", SMALL) != Tile(8, 4, 1, True)
    finally:
        matmul._measured.cache_clear()


def test_a_tile_that_computes_something_else_is_refused(untimed, monkeypatch):
    monkeypatch.setattr(
        calls, "linear", lambda *args, tile, **options: linear(*args, tile=tile, interpret=True, **options) * (1 + tile.ahead)
    )
    with pytest.raises(SystemExit, match=r"these tiles compute something else: \[Tile\(features=4"):
        tiles.tune("NVIDIA H200", "gate_up", SMALL)


@pytest.mark.parametrize("rows", [1, 8])
def test_what_is_in_use_is_compared_and_then_timed_beside_xlas(rows, untimed, monkeypatch):
    monkeypatch.setattr(calls, "many_rows_linear", partial(many_rows, interpret=True))
    monkeypatch.setattr(linears, "many_rows_tile", lambda *args, cores, trial: ManyTile(8, 64))
    product = Product(16, 128)
    found, row = linears.compare("NVIDIA H200", "llama-3.1-8b", "qkv", product, rows, 132)
    assert [(each["by"], each["batch"], each["value"]) for each in found] == [("xla", rows, 3.0), ("ours", rows, 3.0)]
    assert row == (None if rows == 1 else tiles.tuned(product, 8, ManyTile(8, 64), 3.0))
    monkeypatch.setattr(calls, "ours", lambda tile, act, x, weight, around: jnp.zeros((rows, 16)))
    with pytest.raises(SystemExit, match=f"{rows} rows: .* computes something else"):
        linears.compare("NVIDIA H200", "llama-3.1-8b", "qkv", product, rows, 132)


@pytest.mark.parametrize("product", [p for model in linears.MODELS for p in calls.products(model).values()], ids=str)
@pytest.mark.parametrize("rows", [rows for rows in tiles.MANY if rows <= 256])
def test_every_tile_of_few_rows_is_one_wave_of_whole_turns(product, rows):
    found = tiles.few_rows_candidates(product, rows, 132)
    assert found == tiles.many_rows_candidates(product, rows, 132)[: len(found)]
    for tile in found:
        blocks = -(-product.features // (tile.features * tile.cluster)) * tile.cluster * tile.parts
        assert 66 <= blocks <= 132 and product.inputs % (tile.inputs * tile.parts) == 0 and not (product.gated and tile.parts > 1)
        turns = product.inputs // (tile.inputs * tile.parts)
        assert stages(rows, product.inputs, tile, halves=1 + product.gated, itemsize=2) >= min(2, turns)


def test_xlas_product_is_compiled_as_in_a_step(monkeypatch):
    """Which on Hopper, from 256 rows on, takes the first kernel and tries none."""
    asked, drawn = [], [calls.Call.draw(SMALL, "qkv", rows) for rows in (128, 256)]

    def compile(run, compiler_options):
        asked.append(compiler_options)
        return jax.jit(run)

    hopper = SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(calls, "jax", SimpleNamespace(jit=compile, devices=lambda: [hopper]))
    for call in drawn:
        calls.compiled(call, lambda x, weight, around: x)
    assert asked == [{}, UNTRIED]


def test_hundreds_of_rows_have_wide_tiles_to_try():
    """The narrow ones as well where both kernels can, and none where the product is not of whole copies."""
    product = calls.products("llama-3.1-8b")["o"]
    found = {rows: [type(tile) for tile in tiles.many_rows_candidates(product, rows, 132)] for rows in tiles.MANY}
    assert {rows: WideTile in kinds for rows, kinds in found.items()} == {rows: rows >= 256 for rows in tiles.MANY}
    assert {rows: ManyTile in kinds for rows, kinds in found.items()} == {rows: rows <= 256 for rows in tiles.MANY}
    gated = calls.products("llama-3.1-8b")["gate_up"]
    assert WideTile(2, 224) in tiles.many_rows_candidates(gated, 256, 132), "two whole waves of 66 pairs, but for four"
    assert tiles.many_rows_candidates(Product(4090, 4096), 512, 132) == []


@pytest.fixture
def many(monkeypatch):
    """Two tiles, interpreted, with what reads them: of XLA's 5.0 microseconds, the second takes 2.0."""
    monkeypatch.setattr(calls, "many_rows_linear", partial(many_rows, interpret=True))
    monkeypatch.setattr(tiles, "join", partial(join, interpret=True))
    monkeypatch.setattr(tiles, "many_rows_tile", lambda *args, cores, trial: ManyTile(8, 64))
    monkeypatch.setattr(tiles, "many_rows_candidates", lambda *args: [ManyTile(8, 64, 2)])
    shape: Any = SimpleNamespace(hidden=16)
    monkeypatch.setattr(tiles.Reader, "of", lambda name, model, devices: tiles.Reader(name, shape))
    monkeypatch.setattr(calls, "timed", lambda runs, call: [3.0, 2.0] if len(runs) == 2 else [5.0])
    monkeypatch.setattr(calls, "COLD", 1e4)


ADDED = Product(16, 128)


def test_a_tile_of_many_rows_is_chosen_with_its_reader(many, monkeypatch, tmp_path):
    row = tiles.tune_many("NVIDIA H200", "llama-3.1-8b", "o", ADDED, 8, 132)
    assert row is not None and row == tiles.tuned(ADDED, 8, ManyTile(8, 64, 2), 5.0)
    monkeypatch.setattr(calls, "timed", lambda runs, call: [3.0, 2.0] if len(runs) == 2 else [1.0])
    assert tiles.tune_many("NVIDIA H200", "llama-3.1-8b", "o", ADDED, 8, 132) is None, "XLA's product is faster"
    path = tiles.write("NVIDIA H200", [row], tmp_path)
    tiles.write("NVIDIA H200", [], tmp_path, [(8, ADDED)])
    assert json.loads(path.read_text())["rows"] == [], "what lost to XLA's is taken out"


def test_a_part_that_its_reader_misses_is_refused(many, monkeypatch):
    monkeypatch.setattr(tiles, "join", lambda h, parts, norm, **options: join(h, parts[:1], norm, interpret=True, **options))
    with pytest.raises(SystemExit, match=r"8 rows: these tiles compute something else: \[Tile\(features=8, inputs=64, parts=2"):
        tiles.tune_many("NVIDIA H200", "llama-3.1-8b", "o", ADDED, 8, 132)


def test_every_width_is_compared_and_then_timed_beside_xlas(monkeypatch, capsys):
    """Of 768 rows of 128 features, six tiles of 64: one turn of 64 inputs, whose copies take longer than its products."""
    monkeypatch.setattr(calls, "COLD", 1e4)
    monkeypatch.setattr(calls, "timed", lambda runs, call: [5.0, 3.0, 4.0, 2.0, 6.0, 7.0, 8.0][: len(runs)])
    monkeypatch.setattr(calls, "ours", lambda tile, act, x, weight, around: jnp.einsum("nd,fd->nf", x, weight))
    tiles.time_widths("NVIDIA H200", "o", Product(128, 64), 768, 132)
    said = capsys.readouterr().out
    assert said.startswith(" 768 o        Product(features=128, inputs=64, gated=False): XLA 5.00 us; in use ")
    assert "256 5.00 (667), 224 3.00 (1120), " in said and said.endswith(", 64 8.00 (448)\n")
    monkeypatch.setattr(calls, "ours", lambda tile, act, x, weight, around: jnp.einsum("nd,fd->nf", x, weight) * (tile.features != 96))
    with pytest.raises(SystemExit, match=r"768 rows: these tiles compute something else: \[Tile\(cluster=2, features=96\)\]"):
        tiles.time_widths("NVIDIA H200", "o", Product(128, 64), 768, 132)
    with pytest.raises(SystemExit, match="768 rows: no tile"):
        tiles.time_widths("NVIDIA H200", "o", Product(100, 64), 768, 132)


def test_rows_that_have_no_tiles_are_refused(monkeypatch):
    monkeypatch.setattr(linears.jax, "devices", lambda: [SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", core_count=132)])
    with pytest.raises(SystemExit, match="--tune finds tiles for 1, 8, 64, 128, 256, 384, 512 rows, and --rows asks for 16, 32"):
        linears.main(["--tune", "--rows", "8", "32", "16"])
    with pytest.raises(SystemExit, match="--widths is for 768 rows and more, and --rows asks for 512"):
        linears.main(["--widths", "--rows", "1024", "512"])


def test_it_wants_a_gpu_whose_limits_are_known():
    with pytest.raises(SystemExit, match="kernels of an NVIDIA GPU whose limits are known"):
        linears.main([])
