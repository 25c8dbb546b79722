"""The kernel bench's arithmetic, its tuning table and its picture; the kernels themselves are timed on a GPU only."""

import itertools
import json
from dataclasses import asdict
from types import SimpleNamespace

import jax
import pytest

from bench import kernels, plots
from pallas_kernels import blocks
from pallas_kernels.shapes import DECODE, FP8, PREFILL, QWEN_05B, Case, Heads


def test_decode_reads_its_keys_and_values_once():
    assert kernels.read_bytes(DECODE["8b_64x4096"]) == 64 * 4096 * 2 * 8 * 128 * 2
    assert kernels.read_bytes(DECODE["8b_64x4096_fp8"]) == 64 * 4096 * 2 * 8 * 128
    assert kernels.read_bytes(Case(QWEN_05B, (10, 300), window=100, pages=FP8)) == 110 * 2 * 2 * 64


def test_mixed_lengths_have_a_uniform_batch_of_as_many_bytes():
    mixed, equal = DECODE["8b_mixed_lengths"], DECODE["8b_equal_lengths"]
    assert (min(mixed.lengths), max(mixed.lengths)) == (1, 32768)
    assert kernels.read_bytes(equal) == pytest.approx(kernels.read_bytes(mixed), rel=1e-3)


def test_prefill_counts_the_pairs_that_see_each_other():
    case = Case(QWEN_05B, (9, 30), (9, 4))
    pairs = sum(1 for i, j in itertools.product(range(9), repeat=2) if j <= i) + sum(26 + i + 1 for i in range(4))
    assert kernels.operations(case) == 2 * 2 * pairs * 14 * 64
    assert len(PREFILL["8b_ragged_16x512"].lengths) == 16 and PREFILL["8b_ragged_16x512"].chunk == 8192


def test_the_sweep_covers_what_it_promises():
    cases = [case for _, case in kernels.sweep()]
    assert {case.page_size for case in cases} == {16, 64}
    assert {case.heads.head_dim for case in cases} == {64, 128, 256}
    assert {case.page_dtype for case in cases} == {"bfloat16", FP8}
    assert {max(case.lengths) for case in cases} == {512, 4096, 32768, 131072}
    assert all(kernels.read_bytes(case) < kernels.MEMORY for case in cases)


def test_a_machine_without_a_gpu_is_refused():
    with pytest.raises(SystemExit, match="JAX sees no GPU here but 'cpu'"):
        kernels.main([])


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty package folder of tuning files."""
    blocks.measured.cache_clear()
    monkeypatch.setattr(blocks, "files", lambda package: tmp_path)
    yield tmp_path / "tuning"
    blocks.measured.cache_clear()


def test_tuning_writes_what_plans_then_read(table, monkeypatch):
    """Two shapes with different winners; a plan takes the nearest of its own head_dim and dtype, and leaves others alone."""
    wins = {64: kernels.DECODES[1], 1024: kernels.DECODES[-1]}

    def tried(op, candidates, case, repeats):
        return {sizes: {640: 1.0 if sizes == wins[len(case.lengths)] else 2.0} for sizes in candidates}

    monkeypatch.setattr(kernels, "_tried", tried)
    cases = {str(batch): Case(QWEN_05B, (640,) * batch) for batch in wins}
    for _ in range(2):  # the second time replaces the first one's rows
        path = kernels.tune("Some GPU", 1, cases, table)
    assert path.name == "some-gpu.json" and len(json.loads(path.read_text())["rows"]) == 2

    path.write_text(path.read_text().replace('"early": false', '"early": true', 1))
    kernels.tune("Some GPU", 1, cases, table)
    assert [row["early"] for row in json.loads(path.read_text())["rows"]] == [True, False], "no kernel alone could tell"
    path.write_text(path.read_text().replace("true", "false"))

    def chosen(rows, head_dim=64, dtype="bfloat16", kind="Some GPU", group=7, length=131_072):
        return blocks.blocks("decode", kind, blocks.Shape(head_dim, group, 64, dtype, rows, length))

    assert chosen(32) == chosen(200) == wins[64]
    assert chosen(600) == wins[1024]
    assert chosen(1, group=1) == blocks.default_decode(64, "bfloat16", 1), "too far from what was measured"
    assert chosen(64, head_dim=128) == blocks.default_decode(128, "bfloat16", 64)
    assert chosen(64, dtype=FP8) == blocks.default_decode(64, FP8, 64)
    assert chosen(64, kind="Another GPU") == blocks.default_decode(64, "bfloat16", 64) != wins[64]


def test_arithmetic_is_timed_rested_and_in_a_load(monkeypatch):
    """A device that slows down by half when it has not paused, with times of a machine's own."""
    now, rested_until = [0.0], [0.0]

    def sleep(seconds):
        now[0] += seconds
        rested_until[0] = now[0] + 0.05 if seconds else rested_until[0]

    def program(links):
        def run():
            now[0] += links * (1e-3 if now[0] < rested_until[0] else 2e-3)

        return run

    monkeypatch.setattr(kernels, "time", SimpleNamespace(sleep=sleep, perf_counter=lambda: now[0]))
    timed = kernels.Timed(program, (), 4)
    seconds = {load: timed.seconds(program(4), program(16), 3, load) for load in kernels.LOADS}
    assert seconds == pytest.approx({"rested": 1e-3, "sustained": 2e-3})


def test_a_small_gain_is_noise():
    usual, other = kernels.DECODES[:2]
    assert kernels.chosen(usual, {usual: {1: 1.01, 2: 1.0}, other: {1: 1.0, 2: 1.0}})[0] == usual
    assert kernels.chosen(usual, {usual: {1: 1.0, 2: 1.1}, other: {1: 1.02, 2: 1.0}}) == (other, {1: 1.02, 2: 1.0})
    assert kernels.chosen(usual, {other: {1: 9.0}})[0] == other, "usual may not compile"
    assert kernels.chosen(usual, {}) == (None, {})


def test_candidates_are_timed_on_every_length_and_those_that_cannot_be_compiled_are_left_out(monkeypatch):
    class Program:
        def __init__(self, timed):
            self.timed = timed

        def compile(self):
            if self.timed.args[2].blocks[0] == kernels.DECODES[1]:
                raise jax.errors.JaxRuntimeError("shared memory size limit exceeded")
            return self.timed

    def timed_seconds(timed, few, many, repeats):
        return float(timed.args[1].length_M[0])  # the rows that were asked for, by the plan that was made for them

    monkeypatch.setattr(kernels.Timed, "lowered", lambda self: [Program(self)] * 2)
    monkeypatch.setattr(kernels.Timed, "seconds", timed_seconds)
    monkeypatch.setattr(kernels, "_holding_seconds", lambda table, links, repeats: 0.0)
    monkeypatch.setattr(kernels, "L2_TIMES", 1)
    tried = kernels._tried("decode", kernels.DECODES[:3], Case(Heads(2, 1, 8), (4096, 4096)), 1)
    assert tried == {kernels.DECODES[0]: {1024: 1024.0, 4096: 4096.0}, kernels.DECODES[2]: {1024: 1024.0, 4096: 4096.0}}


def test_the_committed_tables_are_whole():
    """Every row has the fields of its kind, and names a device."""
    for path in (blocks.files("pallas_kernels") / "tuning").iterdir():
        if path.name.endswith(".json"):
            found = json.loads(path.read_text())
            assert blocks.file_name(found["device"]) == path.name
            for row in found["rows"]:
                named = {key: row.get(key, 4096) for key in ("head_dim", "group", "page_size", "dtype", "rows", "length")}
                sizes = blocks.blocks(row["op"], found["device"], blocks.Shape(**named))
                assert asdict(sizes) == {key: row[key] for key in asdict(sizes)}, "another row is as near"


def test_the_picture_is_drawn(tmp_path):
    common = {"heads": 32, "kv_heads": 8, "head_dim": 128, "page": 64, "dtype": "bfloat16", "implementation": "portable"}
    rows = [
        common | {"name": "kernel_decode_TBps", "value": 4.0, "unit": "TB/s", "MB": 1000.0, "limit": 4.36, "anchor": 4.2},
        common | {"name": "kernel_decode_TBps", "value": 2.0, "unit": "TB/s", "MB": 30.0, "limit": 4.36},
        common | {"name": "kernel_prefill_TFs", "value": 500.0, "unit": "TFLOP/s", "tokens": 2048},
    ]
    plots.kernels(rows, tmp_path / "kernels.png", "Attention")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
