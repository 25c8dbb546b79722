"""The offline bench over a pretended engine whose clock is known, so that what it reports can be worked out by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import offline, record, structured, workloads
from jaxllm import SamplingParams
from jaxllm.grammar import Grammars
from jaxllm.text import Tokenizer


class FakeLLM:
    """Answers at once and advances a clock by 1 s a call, 2 ms a step (the longest output's), 1 µs a prompt token."""

    def __init__(self, **options):
        self.options = options
        self.calls: list[tuple[list[list[int]], list[SamplingParams]]] = []
        self.now = 0.0
        self.short = 0  # tokens that the last answer lacks

    def generate(self, prompts, params, *, use_tqdm):
        assert not use_tqdm
        self.calls.append((prompts, params))
        outputs = [p.max_tokens for p in params]
        self.now += 1 + 2e-3 * max(outputs) + 1e-6 * sum(map(len, prompts))
        outputs[-1] -= self.short
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(0,) * n)]) for n in outputs]


@pytest.fixture
def llm(monkeypatch):
    fake = FakeLLM()
    monkeypatch.setattr(offline.time, "perf_counter", lambda: fake.now)
    return fake


def bench(llm, device="NVIDIA H200"):
    config = workloads.SHAPES["llama-3.1-8b"]
    return offline.Bench(llm, config=config, device=device, model="llama-3.1-8b", dtype="bfloat16", tp=1, repeats=3)


class TurnedByHand(list):
    """A queue that turns the engine until something is in it, and the engine: a turn takes 10 ms and gives each request a token."""

    def __init__(self, llm):
        self.llm, self.most = llm, 0
        self.left: dict[str, tuple[int, Any]] = {}

    def submit(self, request, listener):
        self.left[request.id] = request.params.max_tokens, listener
        self.most = max(self.most, len(self.left))

    def put(self, item):
        self.append(item)

    def get(self):
        while not self:
            self.llm.now += 0.01
            for name, (left, listener) in list(self.left.items()):
                self.left[name] = left - 1, listener
                if left == 1:
                    del self.left[name]
                listener(SimpleNamespace(outputs=[SimpleNamespace(token_ids=(7,))], finished=left == 1))
        return self.pop(0)


def test_clients_send_their_next_request_when_the_last_is_answered(llm, monkeypatch):
    """Two of them, and three answers of four tokens: eight turns, in four of which one client has nothing to ask."""
    llm.engine = TurnedByHand(llm)
    monkeypatch.setattr(offline.queue, "SimpleQueue", lambda: llm.engine)
    speed, first, gap = bench(llm).clients(2, 3, 299, 4)
    assert llm.engine.most == 2 and not llm.engine.left
    assert (speed["name"], speed["value"], speed["unit"]) == ("clients_tok_s", pytest.approx(12 / 0.08), "tok/s")
    assert [row["value"] for row in (first, gap)] == pytest.approx([10, 10])
    assert {key: speed[key] for key in ("clients", "requests", "lengths", "input", "output")} == {
        "clients": 2, "requests": 3, "lengths": "fixed", "input": 299, "output": 4,
    }  # fmt: skip
    same = speed | {"name": "serve_tok_s"}
    assert speed["limit"] == record.rounded(workloads.limit("NVIDIA H200", workloads.Shape.of(workloads.SHAPES["llama-3.1-8b"]), same))


def test_an_engine_that_fails_its_clients_is_no_measurement(llm, monkeypatch):
    engine = llm.engine = TurnedByHand(llm)
    monkeypatch.setattr(offline.queue, "SimpleQueue", lambda: engine)
    monkeypatch.setattr(engine, "submit", lambda request, listener: listener(RuntimeError("the engine is dead")))
    with pytest.raises(RuntimeError, match="the engine is dead"):
        list(bench(llm).clients(2, 3, 299, 4))


def test_clients_that_are_none_are_refused(capsys):
    """They would never hear of the first request."""
    with pytest.raises(SystemExit):
        offline.parser().parse_args(["--model", "m", "--workload", "clients", "--clients", "0"])
    assert "a count is at least 1" in capsys.readouterr().err


def test_a_long_prompt_fills_the_context_but_for_its_answer(llm):
    first, step = bench(llm).long(131_072)
    assert (first["name"], first["unit"], first["context"]) == ("long_ttft_s", "s", 130_815)
    assert first["value"] == pytest.approx(1 + 2e-3 + 0.130815, rel=1e-3) and step["value"] == pytest.approx(2.0)
    # By hand: 2 * 6.98e9 operations a token, and 4 * 32 * 128 * 32 for each of 130,815^2 / 2 pairs; 15.0 + 17.2 GB.
    assert first["limit"] == pytest.approx((1.396e10 * 130_815 + 5.243e5 * 130_815**2 / 2) / 790e12, rel=1e-3)
    assert step["limit"] == pytest.approx((15.01e9 + 131_072 * 130_943) / 4.36e9, rel=2e-3)
    assert {params[0].max_tokens for _, params in llm.calls} == {1, 257} and {len(p[0]) for p, _ in llm.calls} == {130_815}


def test_a_decode_step_is_the_difference_of_two_runs(llm):
    row = bench(llm).decode(64)
    assert row["value"] == pytest.approx(2.0)
    assert row["limit"] == pytest.approx(4.68, abs=0.01) and row["anchor"] == 6.79
    assert {key: row[key] for key in ("name", "unit", "model", "batch", "context", "dtype", "tp")} == {
        "name": "decode_step_ms",
        "unit": "ms",
        "model": "llama-3.1-8b",
        "batch": 64,
        "context": "512-768",
        "dtype": "bfloat16",
        "tp": 1,
    }
    assert [len(prompts) for prompts, _ in llm.calls] == [64] * 6
    assert {params[0].max_tokens for _, params in llm.calls} == {1, 257}


def test_free_rows_lose_what_they_wait_longer_beside_forms(llm):
    """By themselves they have a token every 2 ms here, beside rows with a form every 2.5, and those one every 6."""
    asked: list[tuple] = []

    def submit(request, sink):
        asked.append((request, sink))
        if len(asked) == 4:
            forms, start = any(request.params.structured_outputs for request, _ in asked), llm.now + 1
            pace = {True: 6e-3, False: 2.5e-3 if forms else 2e-3}
            ends = [(start + r.params.max_tokens * pace[r.params.structured_outputs is not None], i) for i, (r, _) in enumerate(asked)]
            for llm.now, i in sorted(ends):
                request, sink = asked[i]
                sink(SimpleNamespace(outputs=[SimpleNamespace(token_ids=(0,) * (request.params.max_tokens - llm.short))]))
            batches.append([(r.params.structured_outputs is not None, r.params.max_tokens, len(r.prompt_token_ids)) for r, _ in asked])
            asked.clear()

    batches: list[list[tuple[bool, int, int]]] = []
    llm.engine = SimpleNamespace(submit=submit)
    free, beside, formed, loss = structured.measure(bench(llm), rows=2, prompt=16, steps=32, repeats=3)
    assert [row["value"] for row in (free, beside, formed, loss)] == pytest.approx([2.0, 2.5, 6.0, 0.2])
    assert (free["forms"], beside["forms"], loss["forms"], loss["batch"], loss["context"]) == (0, 2, 2, 4, "16-48")
    begun, ended, few = ([(i < 2, count, 16) for i, count in enumerate(counts)] for counts in ([1] * 4, [33] * 4, [5, 5, 33, 33]))
    unformed = [[(False, count, 16)] * 4 for count in (1, 33)]
    assert batches == [*unformed, begun, ended, begun, few] * 3
    llm.short = 1
    with pytest.raises(RuntimeError, match="4 tokens were asked of 4 requests, but 0 came from 4"):
        structured.measure(bench(llm), rows=2, prompt=16, steps=32, repeats=3)


def test_a_made_up_tokenizer_has_the_size_of_the_vocabulary_and_every_byte(tmp_path):
    structured.made_up(1000).save(str(tmp_path / "tokenizer.json"))
    made = Tokenizer.load(tmp_path)
    assert made.vocab_size == 1000 and made.decode(made.encode('{"größe": 1}')) == '{"größe": 1}'
    assert {made.token_bytes(i) for i in range(1000)} >= {bytes([byte]) for byte in range(256)}
    form = structured.FORMED.structured_outputs
    assert form is not None
    Grammars(made, 1000, frozenset()).check(form)


def test_no_prompt_is_ever_sent_twice(llm):
    bench(llm).decode(8)
    prompts = [tuple(prompt) for prompts, _ in llm.calls for prompt in prompts]
    assert len(set(prompts)) == len(prompts) and {len(p) for p in prompts} == {512}


def test_prefill_counts_prompt_tokens(llm):
    row = bench(llm).prefill(2048)
    assert row["value"] == pytest.approx(16 * 2048 / (1 + 2e-3 + 16 * 2048e-6), rel=1e-3)
    assert (row["batch"], row["context"], row["anchor"]) == (16, 2048, 42278)


@pytest.mark.parametrize(("sampled", "name", "anchor", "temperature"), [(False, "mix_s", 20.1, 0.0), (True, "mix_sampled_s", 24.0, 0.7)])
def test_mix_asks_for_the_published_lengths(llm, sampled, name, anchor, temperature):
    row = bench(llm).mix(sampled=sampled)
    assert (row["name"], row["anchor"], row["tokens"]) == (name, anchor, 298_901 + 209_177)
    [(prompts, params)] = llm.calls
    expected = workloads.mix_lengths()
    assert [len(p) for p in prompts] == expected[0].tolist() and [p.max_tokens for p in params] == expected[1].tolist()
    assert all(p.ignore_eos and p.temperature == temperature for p in params)


def test_an_answer_that_stops_early_is_no_measurement(llm):
    llm.short = 1
    with pytest.raises(RuntimeError, match="1028 tokens were asked of 4 requests, but 1027 came from 4"):
        bench(llm).seconds([4] * 4, [257] * 4, offline.GREEDY)


def test_a_line_shows_limit_and_vllm(llm):
    line = record.describe(bench(llm).decode(64))
    assert "batch   64 context 512-768" in line and "2 ms" in line and "32,000 tok/s" in line
    assert "limit 4.674 (234% of it)" in line and "vLLM 6.79 (3.40 times its speed)" in line
    assert "limit" not in record.describe(bench(llm, device="cpu").decode(64))
    assert "(86% of it)" in record.describe(
        {"name": "prefill_tok_s", "unit": "tok/s", "value": 43000, "limit": 50000, "batch": 16, "context": 2048}
    )


def test_the_command_loads_a_shape_measures_and_keeps_rows(monkeypatch, tmp_path, capsys):
    loaded = []

    def load(**options):
        config = json.loads((Path(options["model"]) / "config.json").read_text())
        loaded.append((options, config))
        return FakeLLM(**options)

    monkeypatch.setattr(offline, "LLM", load)
    command = ["--model", "qwen2.5-0.5b", "--load-format", "dummy", "--batch", "1", "2", "--repeats", "1"]
    offline.main([*command, "--set", "max_num_batched_tokens=2048", "block_size=32", "--results", str(tmp_path)])
    [(options, config)] = loaded
    assert config == workloads.SHAPES["qwen2.5-0.5b"]
    assert not Path(options.pop("model")).exists(), "the temporary folder is gone"
    assert options == {
        "max_model_len": 769,
        "max_num_seqs": 2,
        "enable_prefix_caching": False,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "tensor_parallel_size": 1,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
    }
    [path] = tmp_path.glob("offline-*.json")
    kept = json.loads(path.read_text())
    assert [row["batch"] for row in kept["rows"]] == [1, 2]
    assert "--model qwen2.5-0.5b --load-format dummy" in kept["command"] and str(tmp_path) not in kept["command"]
    assert capsys.readouterr().out.count("decode_step_ms") == 2


def test_room_is_made_for_the_longest_workload():
    def asked(*args):
        return offline.engine_options(offline.parser().parse_args(["--model", "m", *args]))

    assert asked("--workload", "prefill")["max_model_len"] == 8193
    assert asked("--workload", "prefill", "--prompt", "2048", "--set", "max_num_seqs=4")["max_num_seqs"] == 4
    assert (asked("--workload", "mix")["max_model_len"], asked("--workload", "mix")["max_num_seqs"]) == (3072, 1024)
    assert asked("--workload", "decode", "mix", "--batch", "2048")["max_num_seqs"] == 2048


def test_an_unknown_model_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"neither a folder with a config.json nor a shape; shapes: llama-3.1-8b"):
        offline.main(["--model", str(tmp_path)])
