"""What goes wrong around a server, one fault after another: `make soak ARGS="--only faults"`. Each fault is a function from servers to
figures; what is not as docs/reliability.md says goes to the server's `broken`."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
from soak_server import RECEIVE_S, SLOW_S, Server, counted

DISCONNECTS, AT_ONCE = 1000, 32
STREAMS = 32
LONG = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True}
JSON = b"content-type: application/json\r\n"


def request(path: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n".encode() + JSON + f"content-length: {len(data)}\r\n\r\n".encode() + data


def some_request() -> bytes:
    message = {"messages": [{"role": "user", "content": "Once upon a time"}], "ignore_eos": True, "max_tokens": 200}
    stream = {"stream": random.random() < 0.7}
    path, body = random.choice(
        [
            ("/v1/completions", LONG),
            ("/v1/completions", LONG | {"n": 3}),
            ("/v1/completions", LONG | {"prompt": ["Once", "One day"]}),
            ("/v1/chat/completions", message),
            ("/v1/messages", message),
            ("/v1/responses", {"input": "Once upon a time", "store": False}),
            ("/v1/embeddings", {"input": ["Once"] * 8}),
        ]
    )
    return request(path, body | (stream if path != "/v1/embeddings" else {}))


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Half of them end with FIN, half with RST."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        if random.random() < 0.5:
            with contextlib.suppress(OSError):  # the server was first
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


async def leave(port: int) -> str:
    """One client that goes away at a random point."""
    raw = some_request()
    where = random.choice(["nothing sent", "in the head", "in the body", "all sent", "all sent, later", "first bytes", "mid-stream"])
    head = raw.index(b"\r\n\r\n")
    cut = {"nothing sent": 0, "in the head": random.randrange(1, head), "in the body": random.randrange(head + 4, len(raw))}
    async with connection(port) as (reader, writer):
        writer.write(raw[: cut.get(where, len(raw))])
        await writer.drain()
        if where == "all sent, later":
            await asyncio.sleep(random.random() * 0.3)
        elif where in ("first bytes", "mid-stream"):
            await reader.read(1)
            for _ in range(random.randrange(20) if where == "mid-stream" else 0):
                if not await reader.read(300):
                    break
    return where


async def disconnects(server: Server) -> dict[str, Any]:
    """1,000 clients leave at random points; the others are answered, and nothing stays."""
    before, files = await server.story(), server.files()
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> str:
        async with gate, asyncio.timeout(SLOW_S):
            return await leave(server.port)

    begin = time.monotonic()
    outcomes = await asyncio.gather(*(one() for _ in range(DISCONNECTS)), return_exceptions=True)
    await server.settle(files)
    if await server.story() != before:
        server.broken.append("the same prompt has another answer after the disconnects")
    server.broken += [repr(each) for each in outcomes if isinstance(each, BaseException)]
    return {"left": counted(outcomes), "seconds": round(time.monotonic() - begin, 1)}


async def stream(client: httpx.AsyncClient, body: dict | None = None) -> str:
    """How a stream ended: "done", or what it was told."""
    last = b""
    try:
        async with client.stream("POST", "/v1/completions", json=(body or LONG) | {"stream": True}) as response:
            if response.status_code != 200:
                return f"{response.status_code} {json.loads(await response.aread())['error']['message']}"
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    last = line[6:].encode()
                elif line == "data: [DONE]":
                    found = json.loads(last)
                    return f"told: {found['error']['message']}" if "error" in found else "done"
    except httpx.ConnectError:
        return "refused"
    except httpx.HTTPError as error:
        return f"cut off: {type(error).__name__}"
    return "cut off"


async def full_queue(server: Server) -> dict[str, Any]:
    """More requests than rows and queue hold: the rest get a 429 with Retry-After, and a place once they wait."""
    refused = 0

    async def patient(client: httpx.AsyncClient) -> str:
        nonlocal refused
        for _ in range(200):
            response = await client.post("/v1/completions", json=LONG | {"max_tokens": 60})
            if response.status_code != 429:
                return str(response.status_code)
            refused += 1
            if response.json()["error"]["code"] != "queue_full" or not response.headers["retry-after"].isdigit():
                return "a 429 without its code or header"
            await asyncio.sleep(float(response.headers["retry-after"]) * (0.5 + random.random()))
        return "never answered"

    async with server.client() as client:
        outcomes = await asyncio.gather(*(patient(client) for _ in range(100)))
    await server.settle()
    if refused == 0 or set(outcomes) != {"200"}:
        server.broken.append(f"a full queue: {refused} refused, {counted(outcomes)}")
    return {"refused at first": refused, "answered in the end": outcomes.count("200")}


async def loris(port: int, kind: str) -> str:
    """A client that sends a byte now and then."""
    raw = request("/v1/completions", LONG)
    head = raw.index(b"\r\n\r\n") + 4
    at = 20 if kind == "head" else head + 1
    begin = time.monotonic()
    async with connection(port) as (reader, writer):
        writer.write(raw[:at])
        answer = asyncio.create_task(reader.read())
        while not answer.done() and time.monotonic() - begin < 4 * RECEIVE_S:
            writer.write(raw[at : at + 1])
            at += 1
            await asyncio.wait({answer}, timeout=0.5)
        told = b" 408 " in await answer if answer.done() else False
    return "408" if told and time.monotonic() - begin < 2 * RECEIVE_S else f"{kind}: not told within {2 * RECEIVE_S} s"


async def slow_clients(server: Server) -> dict[str, Any]:
    """100 clients drip their heads, 100 their bodies: each is told after --receive-timeout, and others are served meanwhile."""
    files = server.files()
    slow = [asyncio.create_task(loris(server.port, kind)) for kind in ("head", "body") for _ in range(100)]
    times = []
    async with server.client() as client:
        while not all(task.done() for task in slow):
            begin = time.monotonic()
            response = await client.post("/v1/completions", json=LONG | {"max_tokens": 1})
            times.append(time.monotonic() - begin)
            if response.status_code != 200:
                server.broken.append(f"beside slow clients: {response.status_code}")
            await asyncio.sleep(0.2)
    outcomes = [await task for task in slow]
    server.broken += [each for each in outcomes if each != "408"]
    await server.settle(files)
    return {"slow clients": counted(outcomes), "others answered": len(times), "slowest of them, s": round(max(times), 2)}


async def chunks() -> AsyncIterator[bytes]:
    for _ in range(100):
        yield b" " * 2**20


BODIES: dict[str, tuple[str, Callable[[], Any], int, str]] = {  # path, body, status, a word of the answer
    "100 MB body": ("/v1/completions", lambda: b" " * 100 * 2**20, 413, "--max-body-bytes"),
    "100 MB body, chunked": ("/v1/completions", chunks, 413, "--max-body-bytes"),
    "deep JSON": ("/v1/completions", lambda: b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "JSON"),
    "deep unknown field": ("/v1/completions", lambda: b'{"prompt": "a", "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 400, "JSON"),
    "invalid UTF-8": ("/v1/completions", lambda: b'{"prompt": "\xff\xfe"}', 400, "JSON"),
    "not JSON": ("/v1/chat/completions", lambda: b"prompt=a", 400, "JSON"),
    "too long": ("/v1/completions", lambda: json.dumps({"prompt": "a " * 100_000}).encode(), 400, "tokens"),
    "template that raises": ("/v1/chat/completions", lambda: _message("raise"), 400, "this template refuses"),
    "template that fails": ("/v1/chat/completions", lambda: _message("break"), 400, "template"),
}


def _message(content: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


async def bodies(server: Server) -> dict[str, Any]:
    """Bodies that no client should send, each five times: each is told what is wrong with it."""
    files, found = server.files(), {}
    for name, (path, body, status, word) in BODIES.items():
        outcomes = [await send(server, path, body(), status, word) for _ in range(5)]
        server.broken += [f"{name}: {each}" for each in outcomes if not each.isdigit()]
        found[name] = counted(outcomes)
    await server.settle(files)
    return found


async def send(server: Server, path: str, content: Any, status: int, word: str) -> str:
    """The status, if it is the one and the answer has the word. A large body that this machine is too busy to send in time is a 408."""
    async with server.client() as client:
        try:
            response = await client.post(path, content=content, headers={"content-type": "application/json"})
        except httpx.HTTPError as error:
            return repr(error)
    message = response.json()["error"]["message"]
    fits = response.status_code == status and word in message
    late = response.status_code == 408 and "did not arrive" in message
    return str(status) if fits or late else f"{response.status_code} {message[:100]}"


async def under_load(server: Server, fault: Callable[[], None], body: dict) -> list[str]:
    """How streams end that run when the fault comes."""
    async with server.client() as client:
        streams = [asyncio.create_task(stream(client, body)) for _ in range(STREAMS)]
        await server.holds(STREAMS)
        await asyncio.sleep(0.1)  # some have heard a token by then, and none has heard all
        fault()
        return await asyncio.gather(*streams)


def _kill_engine(server: Server) -> Callable[[], None]:
    return lambda: os.kill(server.pids()["engine"], signal.SIGKILL)


async def engine_killed(server: Server) -> dict[str, Any]:
    """kill -9 of the engine: every stream is told, the server ends with status 1, and nothing answers any more."""
    ends = await under_load(server, _kill_engine(server), LONG)
    status = await asyncio.to_thread(server.process.wait, 30)
    async with server.client() as client:
        after = await stream(client)
    if status != 1 or after != "refused" or not all("engine has stopped" in end for end in ends):
        server.broken.append(f"engine killed: status {status}, {counted(ends)}, then {after}")
    return {"streams": counted(ends), "exit status": status}


async def engine_restarted(server: Server) -> dict[str, Any]:
    """The same with --restart-engine, three times: every stream is told, and the server answers as before at the same address."""
    before, files, took = await server.story(), server.files(), []
    ends = []
    for _ in range(3):
        ends += await under_load(server, _kill_engine(server), LONG)
        begin = time.monotonic()
        async with server.client() as client:
            while (end := await stream(client, LONG | {"max_tokens": 2})) != "done" and time.monotonic() - begin < 300:
                await asyncio.sleep(0.1)
        took.append(round(time.monotonic() - begin, 1))
        if end != "done" or await server.story() != before:
            server.broken.append(f"after a restart: {end}")
    await server.settle(files)
    server.broken += [f"engine killed: {end}" for end in ends if "engine has stopped" not in end]
    return {"streams": counted(ends), "answering again after, s": took}


async def stopped(server: Server, body: dict, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """SIGTERM under load: what runs may end in --shutdown-timeout, then is told; nothing new is taken; the status is 0."""
    begin = time.monotonic()
    ends = await under_load(server, lambda: server.process.send_signal(signal.SIGTERM), body)
    status = await asyncio.to_thread(server.process.wait, 30)
    async with server.client() as client:
        after = await stream(client)
    if status != 0 or after != "refused" or not all(wanted(end) for end in ends):
        server.broken.append(f"SIGTERM: status {status}, {counted(ends)}, then {after}")
    return {"streams": counted(ends), "exit status": status, "seconds": round(time.monotonic() - begin, 1)}


async def drained(server: Server) -> dict[str, Any]:
    return await stopped(server, LONG | {"max_tokens": 100}, lambda end: end == "done")


async def cut_short(server: Server) -> dict[str, Any]:
    """As above with --shutdown-timeout 0.2, which is too short for most."""
    return await stopped(server, LONG | {"n": 8, "max_tokens": 240}, lambda end: end == "done" or "server is stopping" in end)


# A server's flags, and the faults that it lives through; the last may end it.
FAULTS: list[tuple[tuple[str, ...], int, list[Callable[[Server], Coroutine[Any, Any, dict]]]]] = [
    ((), 1000, [disconnects, bodies, slow_clients, engine_killed]),
    (("--restart-engine", "--shutdown-timeout", "120"), 1000, [engine_restarted, drained]),
    (("--shutdown-timeout", "0.2"), 1000, [cut_short]),
    ((), 8, [full_queue]),
]


def run() -> tuple[dict[str, Any], list[str]]:
    """Figures by fault, and what was not as it should be."""
    figures: dict[str, Any] = {}
    broken: list[str] = []
    for flags, queue, faults in FAULTS:
        server = Server(*flags, queue=queue)
        try:
            for fault in faults:
                figures[fault.__name__] = asyncio.run(fault(server))
                print(f"{fault.__name__}: {json.dumps(figures[fault.__name__])}", flush=True)
            broken += server.broken
            if "Traceback" in (log := server.logged()):
                broken.append(f"a traceback in the log: {log[log.index('Traceback') :][:1500]}")
        finally:
            server.close()
    return figures, broken
