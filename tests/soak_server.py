"""The server that soak.py and faults.py abuse: stories260K on the CPU behind `jaxllm serve`, and what can be seen of it from outside."""

import asyncio
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
SLOW_S = 120  # an answer that takes longer is stuck
ROWS, QUEUE, RECEIVE_S = 16, 100, 5
# "raise" makes the template refuse, "break" fail; it writes what the model has seen in training.
TEMPLATE = """{%- for message in messages -%}
{%- if message.content == "raise" -%}{{ raise_exception("this template refuses") }}{%- endif -%}
{%- if message.content == "break" -%}{{ 1 // 0 }}{%- endif -%}
{{ message.content }} {% endfor %}"""
ENGINE = ("--model", "tests/stories260k", "--device", "cpu", "--max-model-len", "256", "--max-num-seqs", str(ROWS), "--enforce-eager")
NAMES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class Server:
    """A started server. `broken` gets a line for whatever is not as it should be."""

    def __init__(self, *flags: str, queue: int = QUEUE):
        self.broken: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="jaxllm-soak-")
        template = Path(self._folder.name) / "template.jinja"
        template.write_text(TEMPLATE)
        with socket.create_server(("127.0.0.1", 0)) as free:  # a port of its own, which a restarted engine keeps
            self.port = free.getsockname()[1]
        argv = [*ENGINE, "--port", str(self.port), "--receive-timeout", str(RECEIVE_S), "--max-num-queued-reqs", str(queue)]
        # A small body limit: what a client may make the server hold for a moment is no leak, but would hide one.
        argv += ["--chat-template", str(template), "--disable-log-stats", "--max-body-bytes", "1M", *flags]
        self.log = open(Path(self._folder.name) / "log", "w+b")  # noqa: SIM115 - closed by close()
        start = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        if " at http://" not in self.process.stdout.readline():
            self.log.seek(0)
            raise SystemExit(f"the server did not start: {self.log.read()[-2000:].decode()}")
        self.started_s = round(time.monotonic() - start, 1)
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()
        self._folder.cleanup()

    def client(self, **options) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(base_url=self.url, timeout=SLOW_S, limits=limits, **options)

    def pids(self) -> dict[str, int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (engine,) = [int(pid) for pid in children if "engine_process" in _command(pid)]
        return {"server": self.process.pid, "engine": engine}

    def memory(self) -> dict[str, float]:
        """MiB of each process: all that is resident, and of that what is its own ("anonymous").

        The rest are pages of files, such as libraries, which the system takes away and reads again as it likes.
        """
        found = {}
        for name, pid in self.pids().items():
            status = Path(f"/proc/{pid}/status").read_text()
            for kind, field in {"resident": "VmRSS", "own": "RssAnon"}.items():
                size = re.search(rf"{field}:\s+(\d+)", status)
                assert size is not None
                found[f"{name}, {kind}"] = int(size[1]) / 1024
        return found

    def files(self) -> dict[str, int]:
        """Open file descriptors of each process: sockets, above all."""
        return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in self.pids().items()}

    def logged(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    async def settle(self, files: dict[str, int] | None = None, seconds: float = 20) -> None:
        """Waits until nothing runs, waits or is held, and no more files are open than `files`; it is broken if that does not come."""
        deadline = time.monotonic() + seconds
        while True:
            async with self.client() as client:
                text = (await client.get("/metrics")).text
            left = {name: value for name in NAMES if (value := _gauge(text, name))}
            await asyncio.sleep(0.2)  # that connection is gone now
            now = self.files()
            more = (
                {} if files is None else {name: f"{now[name]} files, {count} before" for name, count in files.items() if now[name] > count}
            )
            if not left and not more:
                return
            if time.monotonic() > deadline:
                self.broken.append(f"after {seconds} s still held: {left | more}")
                return

    async def holds(self, count: int, seconds: float = 10) -> None:
        """Waits until so many requests run or wait; it is broken if that does not come, as when they end sooner."""
        deadline = time.monotonic() + seconds
        async with self.client() as client:
            while True:
                text = (await client.get("/metrics")).text
                if (found := sum(_gauge(text, name) for name in NAMES[:2])) >= count:
                    return
                if time.monotonic() > deadline:
                    self.broken.append(f"it held {found:.0f} of {count} requests after {seconds} s")
                    return
                await asyncio.sleep(0.01)

    async def story(self) -> str:
        """What it always says to the same prompt."""
        async with self.client() as client:
            body = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 30}
            return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _gauge(text: str, name: str) -> float:
    found = re.search(rf"^jaxllm:{name}\{{\S* (\S+)", text, re.M)
    assert found is not None
    return float(found[1])


def counted(outcomes: list) -> dict[str, int]:
    return dict(Counter(str(outcome) for outcome in outcomes).most_common())
