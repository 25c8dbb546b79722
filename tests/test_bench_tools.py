"""The smaller benches: latency and throughput blocks, starts of a small made-up server, profiles of a made-up trace, comparison tables."""

import json
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from engines import make_plan
from fake_runner import FakeRunner
from test_bench_offline import FakeLLM

from bench import checkpoints, compare, latency, offline, profile, record, startup, throughput, workloads
from bench.profile import Span
from converters.checkpoint import open_checkpoint
from jaxllm.engine import profile as trace

# ---------------------------------------------------------------------- latency, throughput


@pytest.fixture
def llm(monkeypatch):
    """An engine of 1 s a call, 2 ms a step and 1 µs a prompt token, in place of ours."""
    made = []

    def load(**options):
        made.append(FakeLLM(**options))
        return made[0]

    monkeypatch.setattr(offline, "LLM", load)
    monkeypatch.setattr(offline.time, "perf_counter", lambda: made[0].now if made else 0.0)
    return made


def test_latency_prints_and_writes_what_vllms_users_know(llm, capsys, tmp_path):
    flags = ["--model", "qwen2.5-0.5b", "--load-format", "dummy", "--num-iters-warmup", "2", "--num-iters", "3"]
    latency.main([*flags, "--output-json", str(tmp_path / "out.json")])
    seconds = 1 + 128 * 2e-3 + 8 * 32e-6
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[-8:-1]] == ["Avg latency"] + [f"{p}% percentile latency" for p in latency.PERCENTILES]
    assert float(said[-8].split()[2]) == pytest.approx(seconds) and "no limit is known" in said[-1]
    assert "jaxllm bench latency --model qwen2.5-0.5b" in said[-9] and str(tmp_path) not in said[-9]
    [engine] = llm
    assert (len(engine.calls), engine.options["max_model_len"], engine.options["max_num_seqs"]) == (5, 160, 8)
    assert all(len(prompts) == 8 and len(prompts[0]) == 32 for prompts, _ in engine.calls)
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["latencies"] == pytest.approx([seconds] * 3) and kept["percentiles"]["99"] == pytest.approx(seconds)


def test_throughput_counts_requests_and_tokens(llm, capsys, tmp_path):
    (trace := tmp_path / "t.jsonl").write_text('{"timestamp": 0, "input_length": 300, "output_length": 50}\n' * 2)
    flags = ["--model", "qwen2.5-0.5b", "--load-format", "dummy", "--trace", str(trace)]
    throughput.main([*flags, "--output-json", str(tmp_path / "out.json")])
    seconds = 1 + 50 * 2e-3 + 600e-6
    said = capsys.readouterr().out
    assert f"Throughput: {2 / seconds:.2f} requests/s, {700 / seconds:.2f} total tokens/s, {100 / seconds:.2f} output tokens/s\n" in said
    assert "Total num prompt tokens:  600\nTotal num output tokens:  100\n" in said
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["total_num_tokens"] == 700 and kept["elapsed_time"] == pytest.approx(seconds)
    with pytest.raises(SystemExit, match="has no request of at most 10 tokens"):
        throughput.main([*flags, "--max-len", "10"])


def test_their_limits_on_known_hardware():
    config, args = workloads.SHAPES["llama-3.1-8b"], {"model": "llama-3.1-8b", "dtype": "bfloat16", "tp": 1, "repeats": 1}
    bench = offline.Bench(None, config=config, device="NVIDIA H200", **args)
    args = latency.parser().parse_args(["--model", "llama-3.1-8b", "--batch-size", "1"])
    assert float(latency.bound(bench, args).split()[1]) == pytest.approx(128 * 3.44e-3, rel=0.01)  # as many reads of the weights
    prompts, outputs = (lengths.tolist() for lengths in workloads.mix_lengths())
    seconds = float(throughput.bound(bench, prompts, outputs, 1).split()[1])
    assert 0.8 * 14.2 < seconds < 14.2, "a bound below the replay's, which also pays for steps that weights dominate"


# ---------------------------------------------------------------------- startup

SERVER = """
import http.server, sys, time
print("12:00:00 INFO weights                    0.25 s", file=sys.stderr)
print("12:00:00 INFO compiling 5 shapes         1.50 s\\n12:00:00 INFO one other line\\n12:00:00 WARNING slow", file=sys.stderr, flush=True)
if "--fail" in sys.argv:
    sys.exit("no such model")
time.sleep(0.3)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Health).serve_forever()
"""


def test_a_start_is_timed_to_the_first_health(tmp_path):
    found = startup.start([sys.executable, "-c", SERVER], tmp_path, 30)
    assert 0.3 < found.seconds < 10 and found.phases == {"weights": 0.25, "compiling 5 shapes": 1.5}
    assert found.warnings == ("12:00:00 WARNING slow",)
    with pytest.raises(RuntimeError, match=r"(?s)not healthy after \d+ s.*no such model"):
        startup.start([sys.executable, "-c", SERVER, "--fail"], tmp_path, 30)


def test_starts_are_told_by_phase_and_kept_by_median(monkeypatch, tmp_path, capsys):
    seconds = iter([30.0, 5.0, 7.0, 6.0])
    folders = []

    def start(command, caches, timeout):
        folders.append(caches)
        assert command[1:5] == ["-m", "serving.cli", "serve", command[4]] and command[-2:] == ["--max-model-len", "64"]
        return startup.Start(next(seconds), {"weights": 2.0}, ("12:00:00 WARNING slow",))

    monkeypatch.setattr(startup, "start", start)
    flags = ["--model", "qwen2.5-0.5b", "--load-format", "dummy", "--args=--max-model-len 64", "--results", str(tmp_path)]
    startup.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("12:00:00 WARNING slow") == 4 and "cached, start 3: 6.00 s" in lines
    assert "weights                               2.00 s          2.00 s" in lines
    assert "everything else                      28.00 s          4.00 s" in lines
    assert len(set(folders)) == 1 and not folders[0].exists(), "cached starts use what the first left, and it is removed"
    [path] = tmp_path.glob("startup-*.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert (rows["start_cold_s"]["value"], rows["start_warm_s"]["value"], rows["start_warm_s"]["dtype"]) == (30.0, 6.0, "bfloat16")


def test_a_shapes_checkpoint_is_written_once_in_either_format(monkeypatch, tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    monkeypatch.setitem(workloads.SHAPES, "small", workloads.SHAPES["llama-3.1-8b"] | small)
    with checkpoints.written("small", "orbax", tmp_path) as converted, checkpoints.written("small", "safetensors", tmp_path) as stored:
        one, two = open_checkpoint(converted), open_checkpoint(stored)
        assert (one.converted, two.converted, one.dtype, two.dtype) == (True, False, "bfloat16", "bfloat16")
        assert {name: tensor.shape for name, tensor in one.tensors.items()} == {name: tensor.shape for name, tensor in two.tensors.items()}
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with checkpoints.written("small", "orbax", tmp_path):
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_cold_start_of_a_known_model_stands_beside_vllms():
    common = {"model": "llama-3.1-8b", "dtype": "bfloat16", "tp": 1}
    [row] = startup.rows([startup.Start(20.0)], [], common, "NVIDIA H200")
    assert row == {"name": "start_cold_s", "value": 20.0, "unit": "s", "anchor": 100} | common


def test_loading_is_timed_where_nothing_is_compiled_meanwhile(tmp_path):
    (tmp_path / "orbax" / "d").mkdir(parents=True)
    for name, size in (("a.safetensors", 3000), ("orbax/d/0", 5000), ("config.json", 70)):
        (tmp_path / name).write_bytes(bytes(size))
    size, common = startup.weight_bytes(tmp_path), {"model": "made up"}
    cold, warm = startup.Start(20.0, {"weights": 9.0}), startup.Start(9.0, {"weights": 4e-6})
    assert startup.rows([cold], [warm], common, "cpu", size)[2:] == [{"name": "load_GBps", "value": 2.0, "unit": "GB/s"} | common]
    assert [len(startup.rows(*starts, common, "cpu", size)) for starts in (([cold], []), ([], [startup.Start(1.0)]))] == [1, 1]


# ---------------------------------------------------------------------- profile


def gpu(name, start, duration, stream="Stream #13(Compute)", device=0):
    return Span(f"/device:GPU:{device}", stream, name, start, duration)


# Two steps of two layers: 0..100 and 110..200 µs; a copy on another stream runs beside a kernel.
TRACE = [
    *(gpu(f"gemm_{i % 2}", 110.0 * (i // 4) + 25 * (i % 4), 25.0 if i != 7 else 15.0) for i in range(8)),
    gpu("MemcpyD2H", 90.0, 10.0, "Stream #14(MemcpyD2H)"),
    gpu("jit_step", 0.0, 300.0, "XLA Modules"),
    Span("/host:CPU", "python", "PjitFunction(step)", 0.0, 8.0),
    Span("/host:CPU", "python", "PjitFunction(step)", 110.0, 12.0),
]


def test_a_trace_notes_none_of_pythons_calls(tmp_path):
    """Hundreds of thousands in a second of steps, each of which the host would wait for. JAX's own are there."""
    trace(str(tmp_path))
    jax.block_until_ready(jnp.ones(3) + 1)
    trace(None)
    names = [span.name for span in profile.spans(tmp_path)]
    assert any("PjitFunction" in name for name in names) and not any(name.startswith("$") for name in names)


def test_a_trace_becomes_kernels_gaps_and_the_busy_share():
    found = profile.summarise(TRACE, steps=2, layers=2, wall_ms=0.12, host_ms=0.02)
    assert found.busy == pytest.approx(190 / 240) and found.traced_ms == pytest.approx(0.1), "busy is of the untraced time"
    assert (found.gaps, found.longest_gap_us, found.kernels_per_layer) == (0, 10.0, 2.0)
    assert [(line.name, line.us, line.count) for line in found.kernels] == [
        ("gemm_0", 50.0, 2.0),
        ("gemm_1", 45.0, 2.0),
        ("MemcpyD2H", 5.0, 0.5),
    ]
    assert [(line.name, line.us, line.each) for line in found.host] == [("PjitFunction(step)", 10.0, 10.0)]
    said = profile.table(found, 2)
    assert "GPU busy 79.2% of the untraced time; 4 kernels and copies a step, 2.0 kernels a layer" in said
    assert "50.0          2.0     25.00   50.0%  gemm_0" in said and "MemcpyD2H" not in said
    assert [row["value"] for row in profile.rows(found, {})] == [0.7917, 2.0]


def test_several_gpus_are_busy_in_the_mean():
    other = [gpu("gemm", 0.0, 50.0, device=1), gpu("gemm", 60.0, 40.0, device=1)]
    assert profile.summarise(TRACE + other, steps=2, layers=2, wall_ms=0.1, host_ms=0.1).busy == pytest.approx((0.95 + 0.45) / 2)


def test_without_a_gpu_only_the_host_has_numbers():
    found = profile.summarise([s for s in TRACE if s.plane == "/host:CPU"], steps=2, layers=2, wall_ms=1, host_ms=1)
    assert found.kernels == [] and found.busy == 0 and "no GPU in this trace" in profile.table(found, 5)


def test_overlapping_events_are_counted_once():
    events = [gpu("a", 0, 10), gpu("b", 2, 3), gpu("c", 8, 6), gpu("d", 20, 5)]
    assert profile.covered(events) == (19.0, [6.0])


def test_steps_are_turned_and_waits_told_apart():
    """The engine's core over a runner without a network: so many turns are so many steps, and a step that waits is no host work."""
    plan, runner = make_plan(decode_steps=1), FakeRunner(4, 97)

    def run(step):
        handle = runner.run(step)
        return SimpleNamespace(draw=handle.draw, read=lambda: (time.sleep(0.005), handle.read())[1])

    parts = SimpleNamespace(runner=SimpleNamespace(run=run), plan=plan, vocab_size=97, eos_ids=frozenset())
    seen = []

    def begin():
        turner = profile.Turner(parts, [8] * 2, [40] * 2)
        turner.decoding(2)
        seen.append((turner, runner.steps))
        return turner

    found = profile.profile(begin, 4, 1)
    (_, first), (turner, second) = seen
    assert runner.steps - second == profile.RAMP + 4 <= second - first and found.steps == 4
    assert found.wall_ms >= 5 and 0 < found.host_ms < found.wall_ms - 4.9
    with pytest.raises(RuntimeError, match="ended before the profile did"):
        turner.turn(1)


# ---------------------------------------------------------------------- compare

ROW = {"model": "llama-3.1-8b", "dtype": "bfloat16", "tp": 1}
ROWS = [
    ROW | {"name": "serve_tok_s", "value": 12000.0, "unit": "tok/s", "clients": 256, "anchor": 11776, "lengths": "fixed", "input": 299},
    ROW | {"name": "decode_step_ms", "value": 6.0, "unit": "ms", "batch": 64, "context": "512-768", "anchor": 6.79, "limit": 4.68},
    ROW | {"name": "decode_step_ms", "value": 4.0, "unit": "ms", "batch": 8, "context": "512-768", "limit": 3.6},
    ROW | {"name": "decode_step_ms", "value": 3.0, "unit": "ms", "batch": 8, "context": "512-768", "tp": 2},
]


@pytest.fixture
def results(tmp_path):
    record.save("offline", "NVIDIA H200", "x", ROWS[1:], tmp_path / "results")
    record.save("serve", "NVIDIA H200", "x", ROWS[:1], tmp_path / "results")
    return tmp_path / "results"


def test_tables_say_how_far_we_are_from_vllm_and_from_the_limit(results):
    lines = compare.table(compare.read(results)["NVIDIA H200"]).splitlines()
    assert lines[2:] == [
        "| llama-3.1-8b | decode step | batch 8, context 512-768 | 4 ms |  |  | 3.6 | 90% |",
        "| llama-3.1-8b | decode step | batch 64, context 512-768 | 6 ms | 6.79 | 113% | 4.68 | 78% |",
        "| llama-3.1-8b | decode step | batch 8, context 512-768, 2 GPUs | 3 ms |  |  |  |  |",
        "| llama-3.1-8b | HTTP: output | 256 clients, 299 in | 12,000 tok/s | 11,776 | 102% |  |  |",
    ]


def test_the_readmes_section_is_replaced_and_nothing_else(results, tmp_path):
    (readme := tmp_path / "R.md").write_text(f"before\n{compare.BEGIN}\nold\n{compare.END}\nafter\n")
    for _ in range(2):
        compare.main(["--results", str(results), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith(f"before\n{compare.BEGIN}\nNVIDIA H200, measured 2") and text.endswith(f" |\n{compare.END}\nafter\n")
    assert "old" not in text and text.count("decode step") == 3
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="needs one line <!-- results: begin -->"):
        compare.main(["--results", str(results), "--readme", str(readme)])


def test_pictures_are_drawn(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    compare.main(["--results", str(results), "--plots", str(tmp_path / "plots")])
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert drawn == ["decode_step_ms-nvidia-h200.png", "serve_tok_s-nvidia-h200.png"]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_a_foreign_file_among_the_results_is_named(tmp_path):
    assert compare.section(compare.read(tmp_path)) == "There are no results yet."
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a result file"):
        compare.read(tmp_path)


def test_the_readme_claims_only_what_a_result_file_measures():
    """Every line of its tables is one that bench/results gives. Results that the README does not show yet are no mistake."""
    readme = (record.RESULTS.parent.parent / "README.md").read_text()
    claimed = readme[readme.index(compare.BEGIN) : readme.index(compare.END)].splitlines()
    measured = compare.section(compare.read(record.RESULTS)).splitlines()
    behind = [line for line in claimed if line.startswith("| ") and line not in measured]
    assert not behind, f"behind bench/results: jaxllm bench compare --readme README.md: {behind}"
