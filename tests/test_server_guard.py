"""What every request passes before a route: keys, sizes, times, ids, origins. Raw sockets where a client library would be too polite."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from server_fixtures import serving, wait_until
from test_cli import running

from jaxllm.request import ConfigError
from serving.connection import MAX_HEAD
from serving.options import ServerOptions

COMPLETION = "/v1/completions"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small():
    """A server that takes bodies of 1000 bytes, within half a second."""
    with serving(FakeEngine(), ServerOptions(max_body_bytes=1000, receive_timeout=0.5)) as served:
        yield served


def exchange(port: int, *pieces: bytes, wait_s: float = 0.0) -> tuple[int, dict]:
    """Sends the pieces, waiting between them; the status and body of what comes back before the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for piece in pieces:
            with contextlib.suppress(ConnectionError):
                connection.sendall(piece)
            time.sleep(wait_s)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def head(length: int, *more: str) -> bytes:
    lines = [f"POST {COMPLETION} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_body_is_too_large_by_its_own_word(monkeypatch):
    monkeypatch.setattr("serving.guard.IDLE_S", 0.2)
    with serving(FakeEngine(), ServerOptions(max_body_bytes=1000)) as served:
        status, body = exchange(served.port, head(1001))
    assert status == 413 and "1,001" in body["error"]["message"] and "1,000" in body["error"]["message"]


def test_a_body_that_does_not_say_its_size_is_counted(small):
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    request = f"POST {COMPLETION} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    status, body = exchange(small.port, request + chunk + b"0\r\n\r\n")
    assert status == 413 and body["error"]["type"] == "RequestTooLargeError"
    assert small.post(COMPLETION, {"prompt": "a"}).status_code == 200


def test_a_hundred_megabytes_are_refused_and_the_client_hears_it():
    with serving(FakeEngine()) as served:
        for _ in range(3):
            response = served.http.post(COMPLETION, content=b" " * 100 * 2**20, headers={"content-type": "application/json"})
            assert response.status_code == 413 and response.headers["connection"] == "close"


@pytest.mark.parametrize("ended", [True, False], ids=["whole", "endless"])
def test_headers_too_large(small, ended):
    request = head(2, "x: " + "a" * MAX_HEAD) + b"{}" if ended else b"GET /health HTTP/1.1\r\nx: " + b"a" * (MAX_HEAD + 1000)
    status, body = exchange(small.port, request)
    assert status == 431 and str(MAX_HEAD) in body["error"]["message"]


@pytest.mark.parametrize(
    "pieces",
    [[], [b"GET /health HTT"], [head(10)], [head(10), b'{"pro']],
    ids=["nothing", "half a line", "no body", "half a body"],
)
def test_who_is_slow_is_told_so(small, pieces):
    start = time.monotonic()
    status, body = exchange(small.port, *pieces, wait_s=0.05)
    assert status == 408 and "0.5 s" in body["error"]["message"] and time.monotonic() - start < 3


@pytest.mark.parametrize("begun", [b"GET /health HTTP/1.1\r\nx: ", head(500), head(2000)], ids=["head", "body", "too large a body"])
def test_who_goes_on_sending_hears_it_too(small, caplog, begun):
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        for piece in [begun, *[b"x"] * 8]:
            connection.sendall(piece)
            time.sleep(0.1)
        answer = connection.recv(65536)
    assert b" 408 " in answer and answer.count(b"HTTP/1.1") == 1
    assert "Traceback" not in caplog.text and "ERROR" not in caplog.text


def test_who_sends_much_after_the_refusal_hears_it_too(small):
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", small.port), timeout=8) as connection:
            connection.sendall(head(2**40))  # more than can be sent in that time
            start = time.monotonic()
            while time.monotonic() - start < 0.7:  # the refusal comes while the server is busy reading
                connection.sendall(b"x" * 2**18)
            connection.sendall(b"x" * 2**25)
            assert b" 408 " in connection.recv(65536)


def test_who_does_not_stop_sending_is_cut_off(small, monkeypatch):
    monkeypatch.setattr("serving.connection.LINGER_S", 1)
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        start = time.monotonic()
        connection.sendall(head(500))
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 10:
                connection.sendall(b"x")
                time.sleep(0.1)
        assert 1 < time.monotonic() - start < 8


def test_a_long_answer_is_not_slow_receiving(small):
    small.engine.step_s = 0.05
    events = small.events(COMPLETION, {"prompt": "Once", "max_tokens": 20, "ignore_eos": True})
    small.engine.step_s = 0.0
    assert events[-1] == "[DONE]" and len(events) == 21


def test_what_is_not_http_is_refused_in_the_one_shape(small):
    status, body = exchange(small.port, b"hello\r\n\r\n")
    assert status == 400 and body["error"]["type"] == "BadRequestError"


def test_a_full_queue_is_a_429_that_says_when_to_come_back(small):
    small.engine.queue_full = True
    for stream in (True, False):
        response = small.post(COMPLETION, {"prompt": "a", "stream": stream})
        assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "queue_full"
    small.engine.queue_full = False


@pytest.mark.parametrize(("sent", "kept"), [("abc-1", True), ("a b", False), ("x" * 129, False), ("é", False)])
def test_request_ids_go_in_and_out(small, sent, kept):
    response = small.http.get("/version", headers={"x-request-id": sent.encode("latin-1")})
    assert (response.headers["x-request-id"] == sent) is kept and response.headers["x-request-id"]


def test_every_answer_has_a_request_id(small):
    answers = [small.http.get("/nowhere"), small.post(COMPLETION, {"prompt": []}), small.post(COMPLETION, {"prompt": "a", "stream": True})]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 3
    with small.client() as client:
        assert client.completions.create(model="fake", prompt="a")._request_id


def test_each_of_several_keys_opens(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# of the office\nthird  # Ann's\n\nfourth\n")
    with serving(FakeEngine(), ServerOptions(api_key=("first", "second"), api_key_file=str(path))) as served:
        for key in ("first", "second", "third", "fourth"):
            assert served.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
            assert served.http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
        for key in ("firstsecond", "# of the office", "", "Ann's"):
            assert served.http.get("/v1/models", headers={"x-api-key": key}).status_code == 401
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/load", "/version"):
            assert served.http.get(path).status_code == 401
        assert (
            served.http.get("/health").status_code == served.http.get("/ping").status_code == served.http.post("/ping").status_code == 200
        )


@pytest.mark.parametrize("text", [None, "", "# none\n"])
def test_a_key_file_without_keys_is_refused(tmp_path, text):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="--api-key-file"):
        ServerOptions(api_key_file=str(path)).keys()


def preflight(served, origin):
    return served.http.options(COMPLETION, headers={"origin": origin, "access-control-request-method": "POST"})


def test_other_origins_are_refused_unless_they_are_allowed():
    with serving(FakeEngine()) as served:
        assert "access-control-allow-origin" not in served.http.get("/version", headers={"origin": "https://a.example"}).headers
        assert "access-control-allow-origin" not in preflight(served, "https://a.example").headers
    with serving(FakeEngine(), ServerOptions(allowed_origins=("https://a.example",), api_key=("k",))) as served:
        assert preflight(served, "https://a.example").headers["access-control-allow-origin"] == "https://a.example"  # without a key
        assert preflight(served, "https://b.example").status_code == 400
        response = served.http.get("/version", headers={"origin": "https://a.example", "x-api-key": "k"})
        assert response.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_done_when_the_server_must_stop_is_told_so(stream):
    """2 s of answer, a tenth of a second to end it in."""
    with serving(FakeEngine(step_s=0.01)) as served:
        connection = served.open(COMPLETION, {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": stream})
        wait_until(lambda: served.engine.running)
        served.app.state.context.deadline.set()
        answer = b""
        while b"is stopping" not in answer:
            data = connection.recv(65536)
            assert data, answer
            answer += data
        connection.close()
        assert (b" 200 OK" in answer) is stream and (b" 503 " in answer) is not stream
        wait_until(lambda: not served.engine.running)


def test_a_stop_signal_leaves_what_runs_its_time_and_no_more():
    with running("--port", "0", "--shutdown-timeout", "0.3") as server:
        server.line()
        url = server.line().split(" at ")[1]
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}  # 4 s
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=10) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            start = time.monotonic()
            os.kill(server.process.pid, signal.SIGTERM)
            *_, error, done = lines
        assert "is stopping" in error and done == "data: [DONE]" and time.monotonic() - start < 2
        assert server.end()[0] == 0


def real_server(*flags: str) -> subprocess.Popen:
    argv = ["--port", "0", "--device", "cpu", "--max-num-seqs", "2", "--enforce-eager", "--max-model-len", "256", *flags]
    return subprocess.Popen([sys.executable, "-m", "serving", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_engine(server: subprocess.Popen) -> None:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    (engine,) = [int(pid) for pid in children if b"serving.engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(engine, signal.SIGKILL)


def ready(server: subprocess.Popen) -> str:
    assert server.stdout is not None
    found = re.search(r" at (http://\S+)/v1", server.stdout.readline())
    assert found
    return found[1]


def test_an_engine_that_dies_is_heard_of_at_once_and_started_again_or_not():
    """As a user starts it: killed in the middle of a stream, then again, with --restart-engine the first time only by its flag."""
    body = {"prompt": "Once", "max_tokens": 240, "ignore_eos": True, "stream": True}
    with real_server("--restart-engine") as server:
        url = ready(server)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            kill_engine(server)
            *_, error, done = lines
        assert "the engine has stopped: its process ended with status -9" in error and done == "data: [DONE]"
        assert httpx.get(f"{url}/health").status_code == 503
        again = ready(server)
        assert httpx.post(f"{again}/v1/completions", json={"prompt": "Once"}, timeout=30).status_code == 200
        server.terminate()
        assert server.wait(30) == 0
    with real_server() as server:
        ready(server)
        kill_engine(server)
        assert server.wait(30) == 1
        assert server.stderr is not None and "the engine has died; with --restart-engine" in server.stderr.read()


def test_https(tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with running("--port", "0", "--ssl-certfile", str(tmp_path / "server.pem")) as server:
        server.line()
        url = server.line().split(" at ")[1]
        assert url.startswith("https://")
        import ssl

        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        assert httpx.get(url.replace("127.0.0.1", "localhost") + "/models", verify=context).status_code == 200
    with running("--port", "0", "--ssl-certfile", str(tmp_path / "none.pem")) as server:
        status, _, err = server.end()
        assert status == 1 and "--ssl-certfile" in err and "Traceback" not in err
