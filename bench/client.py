"""An HTTP client that costs little: one process sends calls to an OpenAI server and notes when each event of the answers came.

While the clock runs it only takes HTTP's framing apart and keeps (time, bytes); events are read after the last answer, so that
reading one answer delays no other's time. It speaks HTTP/1.1 with kept connections over asyncio, with uvloop where installed.
"""

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from bench.traffic import Call

Piece = tuple[float, bytes]


@dataclass(frozen=True)
class Target:
    """Where requests go. `headers` are sent with each."""

    host: str
    port: int
    path: str
    tls: bool = False
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, base_url: str, path: str, api_key: str | None = None) -> "Target":
        """`base_url` with or without /v1 at its end. Raises ValueError if it is not an http address."""
        url = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{base_url!r} is not an address like http://127.0.0.1:8000")
        prefix = url.path.rstrip("/").removesuffix("/v1")
        tls = url.scheme == "https"
        headers = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        return cls(url.hostname, url.port or (443 if tls else 80), prefix + path, tls, headers)

    def request(self, body: bytes, method: str = "POST") -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.path} HTTP/1.1", f"host: {host}:{self.port}", f"content-length: {len(body)}"]
        lines += ["content-type: application/json", *(f"{name}: {value}" for name, value in self.headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@dataclass
class Reply:
    """An HTTP response as it came. Times are time.perf_counter()'s, in seconds."""

    sent: float
    status: int = 0
    pieces: list[Piece] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self):
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._reply = Reply(0.0)
        self._rest = b""
        self._left: int | None = None  # bytes of a body with a length; None: chunked, or until the connection closes
        self._read: Callable[[float, bytes], None] = self._read_head

    async def ask(self, request: bytes, reply: Reply) -> None:
        """Sends and waits for the end of the answer, which `reply` takes. Raises ConnectionError or ValueError for a broken one."""
        assert self._transport is not None
        self._reply, self._rest, self._read = reply, b"", self._read_head
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        reply.ended = time.perf_counter()

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.open = cast(asyncio.Transport, transport), True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._read == self._read_to_end and exc is None:
            self._finish()
        self._fail(ConnectionError(f"the server closed the connection before its answer was complete ({exc or 'no error'})"))

    def data_received(self, data: bytes) -> None:
        try:
            self._read(time.perf_counter(), self._rest + data if self._rest else data)
        except ValueError as error:
            self._fail(ValueError(f"the server's answer is not HTTP/1.1 ({error})"))
            self.close()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _read_head(self, now: float, data: bytes) -> None:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._rest = data
            return
        first, *lines = data[:end].split(b"\r\n")
        _, status = first.split(b" ")[:2]
        self._reply.status = int(status)
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in (line.partition(b":") for line in lines)}
        if b"chunked" in headers.get(b"transfer-encoding", b""):
            self._read = self._read_chunks
        elif b"content-length" in headers:
            self._left, self._read = int(headers[b"content-length"]), self._read_counted
        else:
            self._read = self._read_to_end
        self._rest = b""
        self._read(now, data[end + 4 :])

    def _read_chunks(self, now: float, data: bytes) -> None:
        at, pieces = 0, self._reply.pieces
        while (line := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line].partition(b";")[0], 16)
            stop = line + 2 + size
            if size == 0:
                if data.find(b"\r\n\r\n", line) < 0:
                    break  # trailers are still to come
                self._finish()
                return
            if len(data) < stop + 2:
                break
            pieces.append((now, data[line + 2 : stop]))
            at = stop + 2
        self._rest = data[at:]

    def _read_counted(self, now: float, data: bytes) -> None:
        assert self._left is not None
        self._rest = b""
        self._left -= len(data)
        if data:
            self._reply.pieces.append((now, data))
        if self._left <= 0:
            self._finish()

    def _read_to_end(self, now: float, data: bytes) -> None:
        self._rest = b""
        if data:
            self._reply.pieces.append((now, data))


@dataclass
class Pool:
    """Connections to one target: an idle one, else a new one."""

    target: Target
    _idle: list[Connection] = field(default_factory=list)

    async def ask(self, request: bytes, timeout: float) -> Reply:
        """The reply, or one that says in `error` why there is none."""
        reply = Reply(time.perf_counter())
        connection: Connection | None = None
        whole = False
        try:
            async with asyncio.timeout(timeout):
                connection = await self._take()
                await connection.ask(request, reply)
            whole = True
            if reply.status != 200:
                reply.error = f"HTTP {reply.status}: {_message(reply.body)}"
        except TimeoutError:
            reply.error = f"no complete answer within {timeout:g} s"
        except (OSError, ValueError) as error:
            reply.error = str(error)
        except asyncio.CancelledError:
            reply.error = "cut off: the run's time was over"
        if connection is not None and whole:
            self._idle.append(connection)
        elif connection is not None:
            connection.close()
        reply.ended = reply.ended or time.perf_counter()
        return reply

    async def _take(self) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).open:
                return connection
        context = ssl.create_default_context() if self.target.tls else None
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self.target.host, self.target.port, ssl=context)
        return connection

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # a transport closes in the loop's next turn


def _message(body: bytes) -> str:
    """What an error body says, in OpenAI's shape or any other."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(body)
        return str((said.get("error") or said)["message"])[:300]
    return body[:300].decode(errors="replace")


@dataclass(frozen=True)
class Load:
    """What one process does: its calls and their bodies, how many may run at once, and how long everything may take in seconds."""

    target: Target
    calls: Sequence[Call]
    bodies: Sequence[bytes]
    concurrency: int | None
    timeout: float
    max_seconds: float


@dataclass(frozen=True)
class Effort:
    """What the sending cost: seconds of CPU and of the clock; how late calls left and the loop ran, at worst, in seconds."""

    cpu: float
    wall: float
    late: float
    lag: float


async def drive(load: Load, start: float) -> tuple[list[tuple[Call, Reply]], Effort]:
    """Makes every call at its time after `start` (perf_counter's), or as soon as `concurrency` lets it."""
    pool, slots = Pool(load.target), asyncio.Semaphore(load.concurrency or len(load.calls) or 1)
    tasks: list[asyncio.Task[Reply]] = []
    lags, late = [0.0], 0.0
    requests = [load.target.request(body) for body in load.bodies]

    async def one(request: bytes) -> Reply:
        try:
            return await pool.ask(request, load.timeout)
        finally:
            slots.release()

    async def send() -> None:
        nonlocal late
        for call, request in zip(load.calls, requests, strict=True):
            if (wait := start + call.at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            await slots.acquire()
            if load.concurrency is None:  # whoever waits for a slot is not late, but meant to wait
                late = max(late, time.perf_counter() - start - call.at)
            tasks.append(asyncio.create_task(one(request)))

    await asyncio.sleep(max(0.0, start - time.perf_counter()))
    watch = asyncio.create_task(_watch(lags))
    cpu, begun = time.process_time(), time.perf_counter()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(load.max_seconds):
            await send()
            await asyncio.wait(tasks or [asyncio.create_task(asyncio.sleep(0))])
    for task in tasks:
        task.cancel()
    replies = await asyncio.gather(*tasks)
    effort = Effort(time.process_time() - cpu, time.perf_counter() - begun, late, max(lags))
    watch.cancel()
    await pool.close()
    made = list(zip(load.calls, replies, strict=False))
    never = [Reply(time.perf_counter(), error="never sent: the run's time was over") for _ in load.calls[len(made) :]]
    return made + list(zip(load.calls[len(made) :], never, strict=True)), effort


async def _watch(lags: list[float], period: float = 0.05) -> None:
    """Notes how much later than asked this loop gets to run: what any event's time may be off by."""
    while True:
        asked = time.perf_counter() + period
        await asyncio.sleep(period)
        lags.append(time.perf_counter() - asked)


def loop_factory() -> tuple[Callable[[], asyncio.AbstractEventLoop] | None, str]:
    """uvloop's event loop where it is installed, else asyncio's own; and its name."""
    try:
        import uvloop
    except ImportError:
        return None, "asyncio"
    return uvloop.new_event_loop, "uvloop"
