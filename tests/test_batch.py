"""`jaxllm run-batch`: what is answered and in which form, what is refused, and runs that are killed, each time as a program."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from server_fixtures import STORIES, make_engine, serving, wait_until

from jaxllm.request import EngineDeadError, OverloadedError
from serving.batch_files import Answers
from serving.cli import main

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parent.parent


def line(custom_id, body, url="/v1/completions", **more):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | more)


def completions(count: int) -> list[str]:
    return [line(f"r{i}", {"prompt": f"text {i}", "max_tokens": 5, "temperature": 0}) for i in range(count)]


def write(path: Path, lines) -> str:
    path.write_bytes(b"".join((each if isinstance(each, bytes) else each.encode()) + b"\n" for each in lines))
    return str(path)


def run(tmp_path, lines, *flags, engine: Callable = FakeEngine):
    """Exit status, and the answers so far."""
    out = tmp_path / "out.jsonl"
    status = main(["run-batch", "-i", write(tmp_path / "in.jsonl", lines), "-o", str(out), *flags], make_engine=engine)
    return status, answers(out)


def answers(path: Path) -> list[dict]:
    return [json.loads(each) for each in path.read_text().splitlines()] if path.exists() else []


def test_every_route_answers_as_it_does_over_http(tmp_path, capsys):
    message = [{"role": "user", "content": "Hi"}]
    asked = {
        "/v1/completions": {"prompt": "a", "temperature": 0},
        "/v1/chat/completions": {"messages": message, "temperature": 0},
        "/v1/responses": {"input": "Hi", "temperature": 0},
        "/v1/messages": {"messages": message, "max_tokens": 9, "temperature": 0},
        "/v1/embeddings": {"input": ["a", "b"]},
        "/v1/score": {"text_1": "a", "text_2": ["b", "c"]},
        "/v1/rerank": {"query": "a", "documents": ["b", "c"]},
        "/tokenize": {"prompt": "a"},
        "/v1/nowhere": {},
        "/v1/models": {},
    }
    status, found = run(tmp_path, [line(url, body, url) for url, body in asked.items()])
    assert status == 0 and {each["custom_id"] for each in found} == set(asked)
    with serving(FakeEngine()) as served:
        for each in found:
            assert set(each) == {"id", "custom_id", "response", "error"} and each["id"].startswith("batch_req_") and each["error"] is None
            assert set(each["response"]) == {"status_code", "request_id", "body"} and each["response"]["request_id"]
            wanted = served.post(each["custom_id"], asked[each["custom_id"]])
            assert each["response"]["status_code"] == wanted.status_code
            assert told(each["response"]["body"]) == told(wanted.json())
    assert len({each["id"] for each in found}) == len({each["response"]["request_id"] for each in found}) == len(asked)
    assert f"{len(asked)} requests: 8 answered, 2 with an error, 0 answered before" in capsys.readouterr().out


def told(body):
    """A body without what differs each time."""
    if isinstance(body, list):
        return [told(each) for each in body]
    changing = ("id", "created", "created_at", "completed_at", "system_fingerprint", "usage")
    return {key: told(value) for key, value in body.items() if key not in changing} if isinstance(body, dict) else body


BAD = {
    b"nonsense": "no request",
    b"[]": "no request",
    b'{"custom_id": 5, "method": "POST", "url": "/v1/completions", "body": {}}': "`$.custom_id`",
    b'{"method": "POST", "url": "/v1/completions", "body": {}}': "`custom_id`",
    b'{"custom_id": "\xff", "method": "POST", "url": "/v1/completions", "body": {}}': "no request",
    line("get", {}, method="GET").encode(): "'GET'",
    line("url", {}, "http://other/v1/completions").encode(): "must be a route",
    line("stream", {"prompt": "a", "stream": True}).encode(): "come whole",
    b'{"custom_id": "empty"}': "no request",
    b"[" * 5000: "no request",
}


def test_a_malformed_line_becomes_an_error_and_the_others_are_answered(tmp_path):
    lines = [b"", *BAD, line("list", []), line("good", {"prompt": "a"}), b"  "]
    status, found = run(tmp_path, lines)
    by_line = {each["error"]["line"]: each for each in found if each["error"]}
    assert status == 0 and len(found) == len(BAD) + 2
    for number, (text, says) in enumerate(BAD.items(), 2):
        error = by_line[number]["error"]
        assert error["code"] == "invalid_line" and f"Line {number}" in error["message"] and says in error["message"], text
        assert by_line[number]["response"] is None
    named = {each["custom_id"]: each for each in found if each["custom_id"]}
    assert set(named) == {"get", "url", "stream", "empty", "list", "good"}
    assert (named["list"]["response"]["status_code"], named["good"]["response"]["status_code"]) == (400, 200)
    assert run(tmp_path, lines) == (0, found)  # all of which is done, and so not done again


def test_duplicates_are_refused_before_anything_is_loaded(tmp_path, capsys):
    lines = [*completions(3), line("r1", {}), "", line("r1", {}), line("r2", {})]
    assert run(tmp_path, lines, engine=unloaded) == (1, [])
    assert "'r1' on lines 2, 4, 6; 'r2' on lines 3, 7" in capsys.readouterr().err


def unloaded(_):
    raise AssertionError("an engine was made")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (line("mine", {}), "is no answer of a batch"),
        ('{"custom_id": "other", "response": {}, "error": null}', "holds 1 answers to requests that the input has not, such as 'other'"),
        ('{"custom_id": null, "response": null, "error": {"line": 77}}', "such as 77"),
        ("words", "Line 1 of"),
    ],
)
def test_an_output_file_that_holds_something_else_is_left_alone(tmp_path, capsys, content, says):
    (tmp_path / "out.jsonl").write_text(content + "\n")
    assert main(["run-batch", "-i", write(tmp_path / "in.jsonl", completions(2)), "-o", str(tmp_path / "out.jsonl")], make_engine=unloaded)
    assert says in capsys.readouterr().err and (tmp_path / "out.jsonl").read_text() == content + "\n"


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["-i", "missing", "-o", "out"], 1, "missing cannot be read: No such file"),
        (["-i", "in", "-o", "no/where"], 1, "no/where cannot be written"),
        (["-i", "in"], 2, "must be given"),
        (["-i", "in", "-o", "-"], 2, "must be given"),
        (["-i", "in", "-o", "./in"], 2, "cannot be input and output"),
        (["-i", "in", "-o", "out", "--port", "1"], 2, "no option --port"),
        (["-i", "in", "-o", "out", "--trust-remote-code"], 2, "never runs code"),
    ],
)
def test_flags_that_cannot_be(tmp_path, monkeypatch, capsys, flags, status, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", completions(1))
    try:
        assert main(["run-batch", *flags], make_engine=unloaded) == status
    except SystemExit as caught:
        assert caught.code == status
    assert says in capsys.readouterr().err


def test_two_runs_do_not_share_an_output(tmp_path, capsys):
    with open(tmp_path / "out.jsonl", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(tmp_path, completions(2), engine=unloaded) == (1, [])
    assert "Another run is writing" in capsys.readouterr().err


def test_the_engine_is_kept_full_and_no_fuller(tmp_path):
    most = []

    class Watched(FakeEngine):
        async def generate(self, request):
            async for output in super().generate(request):
                most.append(len(self.running))
                yield output

    assert run(tmp_path, completions(40), "--max-concurrency", "7", engine=lambda config: Watched(config, step_s=0.001))[0] == 0
    assert max(most) == 7


@pytest.mark.parametrize(("flags", "status"), [([], 200), (["--strict"], 400)])
def test_the_servers_own_strictness(tmp_path, flags, status):
    assert run(tmp_path, [line("a", {"prompt": "a", "promt": "b"})], *flags)[1][0]["response"]["status_code"] == status


def test_a_disk_that_is_full_ends_the_run_in_a_sentence(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Answers, "answer", full)
    assert run(tmp_path, completions(20))[0] == 1
    assert "An answer could not be written: [Errno 28] No space left on device" in capsys.readouterr().err


def test_a_full_queue_is_waited_for(tmp_path):
    class Full(FakeEngine):
        times = 0

        async def generate(self, request):
            self.times += 1
            if self.times == 2:  # the first is the server's own
                raise OverloadedError("the queue is full")
            async for output in super().generate(request):
                yield output

    status, found = run(tmp_path, completions(1), engine=Full)
    assert status == 0 and found[0]["response"]["status_code"] == 200


class Dying(FakeEngine):
    async def generate(self, request):
        if len(self.served) > 10:
            self.healthy = False
            raise EngineDeadError("The engine has stopped")
        async for output in super().generate(request):
            yield output


def test_an_engine_that_dies_ends_the_run_which_then_goes_on(tmp_path, capsys):
    status, found = run(tmp_path, completions(30), "--max-concurrency", "4", engine=Dying)
    assert status == 1 and 0 < len(found) <= 10 and all(each["response"]["status_code"] == 200 for each in found)
    assert "the engine has stopped; what was answered is kept" in capsys.readouterr().err
    status, found = run(tmp_path, completions(30))
    assert status == 0 and sorted(each["custom_id"] for each in found) == sorted(f"r{i}" for i in range(30))


def test_a_line_half_written_is_answered_again(tmp_path):
    _, found = run(tmp_path, completions(5))
    path = tmp_path / "out.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        engines = []
        status, again = run(tmp_path, completions(5), engine=lambda config, engines=engines: engines.append(FakeEngine()) or engines[0])
        assert status == 0 and again[:4] == found[:4] and again[4]["custom_id"] == found[4]["custom_id"] and len(again) == 5
        assert len(engines[0].served) == 2  # the server's own first, and the one


# A program with the fake engine, that notes in a file whom it answered. sys.argv: that file, then the flags.
PROGRAM = """
import sys
sys.path[:0] = ["tests"]
from fake_engine import FakeEngine
from serving.batch_files import Answers
from serving.cli import main

class Engine(FakeEngine):
    async def generate(self, request):
        with open(sys.argv[1], "a") as notes:
            notes.write(bytes(t for t in request.prompt_token_ids if t < 256).decode() + "\\n")
        async for output in super().generate(request):
            yield output

sys.exit(main(["run-batch", *sys.argv[2:]], make_engine=lambda config: Engine(config, step_s=0.002)))
"""


def program(tmp_path, source="in.jsonl", **kwargs) -> subprocess.Popen:
    argv = [
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path / "notes"),
        "-i",
        source,
        "-o",
        str(tmp_path / "out.jsonl"),
        "--max-concurrency",
        "8",
    ]
    return subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def test_runs_that_are_killed_lose_nothing_and_double_nothing(tmp_path):
    count, out = 400, tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", [*completions(count), b"nonsense"])
    for kill in range(3):
        process = program(tmp_path, source)
        wanted = (kill + 1) * 60
        wait_until(lambda wanted=wanted: out.exists() and out.read_bytes().count(b"\n") >= wanted, 60)
        process.kill()
        process.communicate()
        done = {each["custom_id"] for each in answers_whole(out)}
        (tmp_path / "notes").rename(tmp_path / f"notes{kill}")
    process = program(tmp_path, source)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    found = answers(out)
    assert sorted(str(each["custom_id"]) for each in found) == sorted([*(f"r{i}" for i in range(count)), "None"])
    assert "answered before" in said and f"{len(done)} answered before" in said
    again = set((tmp_path / "notes").read_text().splitlines()) & {f"text {name[1:]}" for name in done if name}
    assert not again, "what was answered was asked again"


def answers_whole(path: Path) -> list[dict]:
    """All but a line that is half written."""
    return [json.loads(each) for each in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_sentence(tmp_path, number):
    process = program(tmp_path, write(tmp_path / "in.jsonl", completions(4000)))
    wait_until(lambda: (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl").stat().st_size > 0, 60)
    os.kill(process.pid, number)
    start = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "goes on from here" in error and "Traceback" not in error and time.monotonic() - start < 10
    assert answers(tmp_path / "out.jsonl")


def test_what_is_piped_in_is_read(tmp_path):
    process = program(tmp_path, "-", stdin=subprocess.PIPE)
    process.communicate("\n".join(completions(3)), timeout=60)
    assert process.returncode == 0 and len(answers(tmp_path / "out.jsonl")) == 3


def test_a_real_engine_answers_a_batch_as_it_answers_one_by_one(tmp_path):
    lines = [line(f"r{i}", {"prompt": "Once upon a time" + " and" * i, "max_tokens": 6, "temperature": 0}) for i in range(12)]
    lines += [line("e", {"input": "a"}, "/v1/embeddings"), line("long", {"prompt": "a " * 400})]
    engine = make_engine("real")
    close, engine.close = engine.close, lambda: None  # it serves once more below
    status, found = run(tmp_path, lines, "--model", STORIES, engine=lambda _: engine)
    assert status == 0 and len(found) == 14
    try:
        with serving(engine) as served:
            for each in found:
                (asked,) = [json.loads(text) for text in lines if json.loads(text)["custom_id"] == each["custom_id"]]
                wanted = served.post(asked["url"], asked["body"])
                assert each["response"]["status_code"] == wanted.status_code == (400 if each["custom_id"] == "long" else 200)
                if each["custom_id"].startswith("r"):
                    assert told(each["response"]["body"]) == told(wanted.json())
    finally:
        close()
