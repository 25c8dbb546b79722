"""The load generator: traffic and traces, answers to figures by hand, and whole runs against a small server on loopback."""

import asyncio
import contextlib
import json
import lzma
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bench import answers, client, load, record, serve, traffic, workloads
from bench.answers import Answer
from bench.client import Reply, Target
from bench.null_server import NullServer
from bench.traffic import Call

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,3960,109
2023-11-16 18:15:51.6805900,879,55
"""
MOONCAKE = """{"timestamp": 2000, "input_length": 1300, "output_length": 5, "hash_ids": [7, 8, 9]}
{"timestamp": 2500, "input_length": 1100, "output_length": 6, "hash_ids": [7, 8, 10]}

{"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [11, 12]}
"""


# ---------------------------------------------------------------------- traffic


@pytest.mark.parametrize("packed", [False, True])
def test_an_azure_trace(tmp_path, packed):
    path = tmp_path / ("trace.csv.xz" if packed else "trace.csv")
    path.write_bytes(lzma.compress(AZURE.encode()) if packed else AZURE.encode())
    calls = traffic.read_trace(path)
    assert [(c.index, c.prompt, c.output) for c in calls] == [(0, 374, 44), (1, 3960, 109), (2, 879, 55)]
    assert [c.at for c in calls] == pytest.approx([0, 4.314579, 5.0])
    assert [(c.index, c.prompt) for c in traffic.read_trace(path, max_len=1000)] == [(0, 374), (1, 879)]
    assert [c.prompt for c in traffic.read_trace(path, count=2)] == [374, 3960]


def test_a_mooncake_traces_hashes_are_shared_prefixes(tmp_path):
    (path := tmp_path / "trace.jsonl").write_text(MOONCAKE)
    calls = traffic.read_trace(path)
    assert [c.at for c in calls] == [0, 0.5, 1.0] and [c.output for c in calls] == [5, 6, 7]
    first, second, third = (traffic.token_ids(call, 1000, seed=0) for call in calls)
    assert [len(ids) for ids in (first, second, third)] == [1300, 1100, 600]
    assert first[:1024] == second[:1024] and first[1024:1100] != second[1024:]
    assert first[:512] != third[:512] and first[:512] != first[512:1024]
    assert traffic.token_ids(calls[0], 1000, seed=0) == first != traffic.token_ids(calls[0], 1000, seed=1)
    assert traffic.words(calls[0], 0).split(" ")[:1024] == traffic.words(calls[1], 0).split(" ")[:1024]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "is no trace we read: it begins with 'a,b'"),
        (AZURE + "2023-11-16,many,1\n", "line 5 of the trace is not a time and two lengths"),
        ('{"timestamp": 1, "input_length": 2}\n', "line 1 of the trace lacks"),
        (MOONCAKE + "{\n", "line 5 of the trace lacks"),
        (AZURE.splitlines()[0] + "\n", "has no request"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path, text, says):
    (path := tmp_path / "trace").write_text(text)
    with pytest.raises(ValueError, match=says):
        traffic.read_trace(path)


def test_lengths_are_what_was_asked():
    assert traffic.lengths("fixed", 3, 299, 209, 1.0, 0) == [(299, 209)] * 3
    pairs = np.array(traffic.lengths("uniform", 4000, 100, 40, 0.5, 0))
    assert pairs.min(0).tolist() == [50, 20] and pairs.max(0).tolist() == [150, 60]
    assert pairs.mean(0) == pytest.approx([100, 40], rel=0.02)
    prompts, outputs = workloads.mix_lengths()
    assert traffic.lengths("mix", 1001, 0, 0, 1.0, 0) == [*zip(prompts.tolist(), outputs.tolist(), strict=True), (prompts[0], outputs[0])]


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_have_the_rate_and_the_burstiness(burstiness, spread):
    """A gamma of shape b has a standard deviation of 1/sqrt(b) of its mean."""
    gaps = np.diff(traffic.arrivals(20000, 8.0, burstiness, 0))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05) and gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.05)
    assert traffic.arrivals(3, float("inf"), 1.0, 0) == [0.0] * 3


# ---------------------------------------------------------------------- figures


def answer(index=0, sent=0.0, times=(1.0,), error=None, output=None):
    return Answer(index, sent, 10, len(times) if output is None else output, tuple(times), "", error, len(times))


KNOWN = [
    answer(0, 0.0, (0.1, 0.2, 0.4)),  # TTFT 100, ITL 100 200, TPOT 150, E2EL 400
    answer(1, 0.1, (0.4, 0.5, 0.5, 1.1)),  # TTFT 300, ITL 100 0 600, TPOT 233.3, E2EL 1000
    answer(2, 1.2, (1.4,)),  # TTFT 200, E2EL 200
    answer(3, 1.2, (1.9,), error="no"),
]


def test_figures_of_known_answers():
    keys = answers.figures(KNOWN, percentiles=(50, 99)).keys
    assert keys["duration"] == pytest.approx(1.9)
    assert (keys["completed"], keys["failed"], keys["total_input_tokens"], keys["total_output_tokens"]) == (3, 1, 30, 8)
    assert keys["output_throughput"] == pytest.approx(8 / 1.9) and keys["total_token_throughput"] == pytest.approx(38 / 1.9)
    assert keys["mean_ttft_ms"] == pytest.approx(200) and keys["p99_ttft_ms"] == pytest.approx(298)  # 200 + 0.98 * 100
    assert keys["mean_tpot_ms"] == pytest.approx((150 + 700 / 3) / 2)
    assert keys["mean_itl_ms"] == pytest.approx(200) and keys["median_itl_ms"] == pytest.approx(100)
    assert keys["std_itl_ms"] == pytest.approx(np.std([100, 200, 100, 0, 600]))
    assert keys["mean_e2el_ms"] == pytest.approx(1600 / 3) and keys["p50_e2el_ms"] == pytest.approx(400)
    assert keys["max_output_tokens_per_s"] == 6 and keys["max_concurrent_requests"] == 2
    assert keys["request_goodput"] is None


@pytest.mark.parametrize(
    ("asked", "good"),
    [(["ttft:250"], 2), (["tpot:200"], 2), (["ttft:150", "tpot:200"], 1), (["itl:300"], 2), (["e2el:1000.1"], 3), (["e2el:1"], 0)],
)
def test_goodput_counts_requests_that_keep_every_objective(asked, good):
    assert answers.figures(KNOWN, slo=serve.objectives(asked)).keys["request_goodput"] == pytest.approx(good / 1.9)


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "ttft:0", "ttft:inf", "speed:5"])
def test_a_wrong_objective_is_refused(text):
    with pytest.raises(ValueError, match="is not METRIC:MILLISECONDS"):
        serve.objectives([text])


def test_the_block_is_the_one_people_know():
    run = answers.figures(KNOWN, slo={"ttft": 250.0})
    text = answers.block(run, concurrency=2, rate=4, metrics=("ttft", "tpot"), percentiles=(99,))
    assert [line.rstrip() for line in text.splitlines()] == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     3",
        "Failed requests:                         1",
        "Maximum request concurrency:             2",
        "Request rate configured (RPS):           4.00",
        "Benchmark duration (s):                  1.90",
        "Total input tokens:                      30",
        "Total generated tokens:                  8",
        "Request throughput (req/s):              1.58",
        "Request goodput (req/s):                 1.05",
        "Output token throughput (tok/s):         4.21",
        "Peak output token throughput (tok/s):    6.00",
        "Peak concurrent requests:                2.00",
        "Total token throughput (tok/s):          20.00",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          200.00",
        "Median TTFT (ms):                        200.00",
        "P99 TTFT (ms):                           298.00",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          191.67",
        "Median TPOT (ms):                        191.67",
        "P99 TPOT (ms):                           232.50",
        "==================================================",
    ]


def test_nothing_succeeded_is_a_result_too():
    run = answers.figures([answer(error="no")])
    assert run.keys["completed"] == 0 and run.keys["mean_ttft_ms"] == 0
    assert "Failed requests:                         1" in answers.block(run, concurrency=None, rate=None, metrics=(), percentiles=())


# ---------------------------------------------------------------------- events


def events(*bodies, done=True):
    return b"".join(b"data: " + (b if isinstance(b, bytes) else json.dumps(b).encode()) + b"\n\n" for b in (*bodies, *[b"[DONE]"] * done))


def read(data: bytes, error=None, cut=1) -> Answer:
    """The answer in `data`, which came in pieces of `cut` bytes, one each second from 1 on."""
    pieces = [(1.0 + i, data[i * cut : (i + 1) * cut]) for i in range(-(-len(data) // cut))]
    return answers.read(Call(0, 0.0, 5, 2), Reply(0.5, 200, pieces, error=error))


def delta(**what):
    return {"choices": [{"index": 0, "delta": what}]}


def test_tokens_are_counted_and_roles_and_usage_are_not():
    """A token whose text is held back has its event; the role, an empty end and the usage do not stand for one."""
    data = events(
        delta(role="assistant", content=""),
        delta(content="a"),
        delta(content=""),
        delta(),
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}},
    )
    found = read(data, cut=10**6)
    assert (len(found.times), found.text, found.prompt_tokens, found.output_tokens, found.error) == (2, "a", 7, 2, None)
    found = read(events({"choices": [{"text": "x"}]}, {"choices": [{"text": ""}]}))
    assert (len(found.times), found.text, found.prompt_tokens, found.output_tokens) == (2, "x", 5, 2)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_an_event_has_the_time_of_its_last_byte(newline):
    one = b'data: {"choices": [{"text": "a"}]}' + 2 * newline
    found = read(one + b": a comment" + 2 * newline + one + b"data: [DONE]" + 2 * newline, cut=len(one))
    assert found.times[0] == 1.0 and found.times[1] > 2.0 and found.error is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (events({"choices": [{"text": "a"}]}, done=False), "ended before its"),
        (events(), "has no tokens"),
        (events({"choices": [{"text": "a"}]}, {"error": {"message": "out of luck"}}), "out of luck"),
        (events(b"{"), "not JSON"),
    ],
)
def test_a_stream_that_is_no_whole_answer_is_a_failure(data, says):
    assert says in str(read(data, cut=10**6).error)


# ---------------------------------------------------------------------- over HTTP


@contextlib.contextmanager
def null_server(step=0.0):
    """A server without a model, in a thread; its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = NullServer(step)
    listening = asyncio.run_coroutine_threadsafe(server.listen(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def job(url, calls, **changes):
    target = Target.of(url, "/v1/completions")
    made = {"chat": False, "fields": {"stream": True}, "vocab": 100, "seed": 0, "concurrency": None, "timeout": 20.0, "max_seconds": 30.0}
    return load.Job(target=target, calls=calls, **made | changes)


def test_a_known_pace_is_measured():
    with null_server(step=0.02) as url:
        [found], efforts = load.run(job(url, [Call(0, 0.0, 9, 6)]))
    assert (found.error, len(found.times), found.output_tokens, found.prompt_tokens) == (None, 6, 6, 9)
    assert 0.02 <= found.ttft < 0.2 and found.text == " a" * 6
    # Sleeps never end early, and a busy machine makes them longer.
    assert all(gap > 0.015 for gap in found.itls) and found.tpot == pytest.approx(np.mean(found.itls))
    assert "client: 1 process" in load.verdict(efforts, 6)


def test_calls_leave_at_their_times_and_slots_bound_them():
    calls = [Call(i, 0.1 * i, 4, 2) for i in range(4)]
    with null_server(step=0.01) as url:
        found, _ = load.run(job(url, calls))
        sent = np.array([a.sent for a in found])
        assert (sent - sent[0] >= np.array([0, 0.1, 0.2, 0.3]) - 0.02).all() and (sent - sent[0] < 1).all()
        found, _ = load.run(job(url, [Call(i, 0.0, 4, 5) for i in range(9)], concurrency=3))
    assert answers.peak_concurrency(found) == 3 and len(found) == 9


def test_two_processes_share_the_work():
    with null_server() as url:
        found, efforts = load.run(job(url, [Call(i, 0.0, 4, 5) for i in range(9)], concurrency=3), processes=2)
    assert sorted(a.index for a in found) == list(range(9)) and not any(a.error for a in found)
    assert len(efforts) == 2 and "client: 2 processes" in load.verdict(efforts, 45)


def test_shares_add_up():
    parts = load.shares(job("x:1", [Call(i, 0.0, 1, 1) for i in range(7)], concurrency=5), 3)
    assert [p.concurrency for p in parts] == [2, 2, 1] and [[c.index for c in p.calls] for p in parts] == [[0, 3, 6], [1, 4], [2, 5]]


def test_what_outlasts_its_time_is_cut_off_and_counted():
    with null_server(step=0.05) as url:
        found, _ = load.run(job(url, [Call(0, 0.0, 4, 200), Call(1, 0.0, 4, 2), Call(2, 60.0, 4, 2)], max_seconds=0.5))
        late, _ = load.run(job(url, [Call(0, 0.0, 4, 200)], timeout=0.2))
    assert [bool(a.error) for a in found] == [True, False, True]
    assert "cut off" in str(found[0].error) and "never sent" in str(found[2].error) and "within 0.2 s" in str(late[0].error)


def test_a_busy_client_says_so():
    busy, calm = client.Effort(cpu=0.9, wall=1.0, late=0.0, lag=0.0), client.Effort(0.1, 1.0, 0.0, 0.001)
    assert "THE CLIENT WAS AT ITS LIMIT" in load.verdict([calm, busy], 100)
    assert "90% of a core (10000.0 µs an event)" in load.verdict([busy, calm], 100)
    assert "held up" in load.verdict([client.Effort(0.1, 1.0, 0.0, 0.02)], 100) and "\n" not in load.verdict([calm], 100)


def respond(raw: bytes) -> Reply:
    """What the client makes of a server that answers anything with `raw` and closes."""

    async def run():
        async def handle(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(raw)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        target = Target.of(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "/x")
        pool = client.Pool(target)
        try:
            return await pool.ask(target.request(b""), 5)
        finally:
            await pool.close()
            server.close()

    return asyncio.run(run())


def test_the_three_ways_to_end_a_body():
    head = b"HTTP/1.1 200 OK\r\n"
    assert respond(head + b"Content-Length: 5\r\n\r\nhello").body == b"hello"
    assert respond(head + b"\r\nhello").body == b"hello"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    assert respond(chunked + b"3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: 1\r\n\r\n").body == b"hello"
    assert "closed the connection" in str(respond(chunked + b"3\r\nhe").error)
    assert "not HTTP/1.1" in str(respond(chunked + b"zz\r\n").error)
    assert "not HTTP/1.1" in str(respond(b"SSH-2.0\r\n\r\n").error)
    error = b'{"error": {"message": "too long"}}'
    assert respond(b"HTTP/1.1 400 Bad\r\ncontent-length: %d\r\n\r\n%s" % (len(error), error)).error == "HTTP 400: too long"


def test_targets():
    target = Target.of("https://host/api/v1/", "/v1/completions", "key")
    assert (target.host, target.port, target.path, target.tls) == ("host", 443, "/api/v1/completions", True)
    assert b"authorization: Bearer key\r\n" in target.request(b"") and b"host: [::1]:9\r\n" in Target.of("http://[::1]:9", "/").request(b"")
    with pytest.raises(ValueError, match="is not an address"):
        Target.of("ftp://host", "/x")


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_the_command(tmp_path, capsys, backend):
    flags = ["--backend", backend, "--num-prompts", "6", "--max-concurrency", "2", "--output-len", "5", "--label", "qwen2.5-0.5b"]
    kept = ["--json", str(tmp_path / "run.json"), "--save-detailed", "--save", "--results", str(tmp_path), "--device", "NVIDIA H200"]
    with null_server() as url:
        serve.main(["--base-url", url, *flags, *kept, "--goodput", "ttft:60000", "--api-key", "secret"])
    said = capsys.readouterr().out
    assert "null at http://127.0.0.1:" in said and "Successful requests:                     6 " in said and "client: 1 process" in said
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["completed"] == 6 and run["output_lens"] == [5] * 6 and [len(gaps) for gaps in run["itls"]] == [4] * 6
    assert run["model_id"] == "null" and run["request_goodput"] == pytest.approx(run["request_throughput"])
    [path] = tmp_path.glob("serve-*.json")
    text = path.read_text()
    rows = {row["name"]: row for row in json.loads(text)["rows"]}
    assert set(rows) == {"serve_tok_s", "serve_ttft_mean_ms", "serve_itl_p99_ms"} and rows["serve_tok_s"]["clients"] == 2
    assert rows["serve_tok_s"]["limit"] > 1000 and str(tmp_path) not in text and "secret" not in text


def test_a_run_with_failures_says_why_and_fails(capsys):
    with null_server() as url, pytest.raises(SystemExit, match="test request failed: HTTP 400: the null server wants"):
        serve.main(["--base-url", f"{url}/elsewhere", "--model", "m", "--extra-body", '{"max_tokens": null}'])
    with pytest.raises(SystemExit, match=r"does not name its models: .*start the server, or give --base-url"):
        serve.main(["--base-url", "http://127.0.0.1:9"])
    assert list(serve.remarks([answer(error="no"), answer(error="no"), answer(output=9)])) == [
        "2 failed: no",
        "1 of 1 answers have another length than asked: the server stopped them by itself",
        "1 of 1 answers have fewer or more events than tokens: ITL is a gap between events there",
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--percentile-metrics", "ttft,speed"], "not 'speed'"),
        (["--metric-percentiles", "101"], "numbers from 0 to 100"),
        (["--processes", "4", "--max-concurrency", "2"], "4 client processes cannot share 2"),
        (["--range-ratio", "2"], "from 0 to 1"),
        (["--time-scale", "-1"], "0 or more"),
        (["--trace", "nothing.csv"], "No such file"),
        (["--goodput", "ttft"], "METRIC:MILLISECONDS"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(flags, says):
    with pytest.raises(SystemExit, match=says):
        serve.main(["--model", "m", *flags])


def test_a_traces_times_are_scaled_or_replaced(tmp_path):
    (path := tmp_path / "t.csv").write_text(AZURE)

    def times(*flags):
        return [call.at for call in serve.plan(serve.parser().parse_args(["--trace", str(path), *flags]))]

    assert times("--time-scale", "0.5") == pytest.approx([0, 2.1572895, 2.5])
    assert times("--time-scale", "0") == [0, 0, 0]
    assert times("--request-rate", "inf") == [0, 0, 0]


def test_the_ceiling_is_measured(capsys):
    serve.main(["--ceiling", "--num-prompts", "20", "--max-concurrency", "10", "--output-len", "50"])
    said = capsys.readouterr().out
    assert "1,000 events in" in said and "events a second for each process and core" in said


def test_the_client_imports_nothing_heavy():
    code = "import sys, bench.serve; sys.exit(repr({'jax', 'transformers', 'matplotlib', 'jaxllm'} & sys.modules.keys() or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "''", done.stderr


def test_vllms_served_figures_are_for_the_published_load_only():
    row = {"name": "serve_tok_s", "model": "llama-3.1-8b", "clients": 256, "lengths": "fixed", "input": 299, "output": 209}
    row |= {"tp": 1, "dtype": "bfloat16"}
    shape = workloads.Shape.of(workloads.SHAPES["llama-3.1-8b"])
    assert workloads.vllm_figure("NVIDIA H200", row) == 11776
    assert workloads.vllm_figure("NVIDIA H200", row | {"name": "serve_itl_p99_ms", "clients": 1}) == 5.29
    for change in ({"input": 300}, {"rate": 5.0}, {"clients": 8}, {"lengths": "uniform"}):
        assert workloads.vllm_figure("NVIDIA H200", row | change) is None
    # One client: each token is a read of the weights. Many: the operations and everybody's KV.
    assert workloads.limit("NVIDIA H200", shape, row | {"clients": 1}) == pytest.approx(1e3 / 3.46, rel=0.02)
    assert workloads.limit("NVIDIA H200", shape, row) == pytest.approx(17_900, rel=0.02)
    assert workloads.limit("NVIDIA H200", shape, row | {"name": "serve_itl_p99_ms"}) is None
    assert record.describe(row | {"value": 12000.0, "unit": "tok/s", "anchor": 11776}).endswith("vLLM 1.178e+04 (1.02 times its speed)")
