"""A server for tests: any engine behind a real socket on loopback, uvicorn in a thread, and clients for it."""

import contextlib
import importlib.util
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from fake_engine import FakeEngine

from jaxllm.config import EngineConfig
from serving.app import build_app
from serving.connection import Connection
from serving.options import ServerOptions
from serving.run import bind

STORIES = str(Path(__file__).parent / "stories260k")
ENGINES = ["fake"] + ["real"] * (importlib.util.find_spec("jaxllm.engine") is not None)


def make_engine(kind: str) -> Any:
    """`fake`, or `real`: stories260K on the CPU with a context that is soon full."""
    if kind == "fake":
        return FakeEngine()
    from jaxllm.engine import Engine

    return Engine(EngineConfig(STORIES, device="cpu", dtype="float32", max_model_len=256, max_num_seqs=8, enforce_eager=True))


@dataclass
class Served:
    engine: Any
    port: int
    http: httpx.Client
    key: str | None = None
    app: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key or "any", max_retries=0, timeout=30)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def events(self, path: str, body: dict) -> list[str]:
        """The data of every server-sent event of the answer."""
        response = self.post(path, {**body, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        lines = [line for line in response.text.split("\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        return [line.removeprefix("data: ") for line in lines]

    def open(self, path: str, body: dict) -> socket.socket:
        """A raw connection on which the request has been sent and nothing read."""
        raw = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        return connection


@contextlib.contextmanager
def serving(engine: Any, options: ServerOptions | None = None) -> Iterator[Served]:
    """`engine` behind a socket until the block ends; closing the engine is the caller's."""
    options = options or ServerOptions()
    listener = bind(ServerOptions(port=0))
    app = build_app(engine, options, getattr(engine, "memory", None))
    http = type("Timed", (Connection,), {"receive_timeout": options.receive_timeout})
    config = uvicorn.Config(app, http=http, ws="none", log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), 120)
        assert server.started
        port = listener.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, limits=httpx.Limits(max_connections=None)) as http:
            yield Served(engine, port, http, next(iter(options.api_key), None), app)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def read_event(connection: socket.socket) -> None:
    """Waits until an event has come."""
    read = b""
    while b"data: " not in read:
        part = connection.recv(65536)
        assert part, f"closed after {read!r}"
        read += part


def wait_until(true, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.005)
