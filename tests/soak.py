"""A server under load and abuse, for as long as one likes: `make soak ARGS="--minutes 10"`. Prints figures as JSON, and what broke.

It starts `jaxllm serve` with the default model, sends many kinds of client at once, then looks at what is left: nothing may be held, nobody
may wait for ever, and the memory of both processes must not grow after a warm-up.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
SLOW_S = 60  # an answer that takes longer is stuck
outcomes: Counter[str] = Counter()
broken: list[str] = []


def start(*flags: str) -> tuple[subprocess.Popen, str]:
    argv = ["--port", "0", "--max-num-seqs", "32", "--receive-timeout", "5", "--max-num-queued-reqs", "40", *flags]
    process = subprocess.Popen([sys.executable, "-m", "serving", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r" at (http://\S+)/v1", process.stdout.readline())
    assert found, "the server did not start"
    return process, found[1]


def memory(process: subprocess.Popen) -> dict[str, int]:
    """MiB of each process's own memory."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in (str(process.pid), *children):
        status = Path(f"/proc/{pid}/status").read_text()
        kind = "engine" if "engine_process" in Path(f"/proc/{pid}/cmdline").read_text() else "server"
        found[kind] = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024  # pyright: ignore[reportOptionalSubscript]
    return found


async def talk(client: httpx.AsyncClient, leave: bool) -> str:
    """One stream, read to its end, or left in the middle."""
    path = random.choice(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
    messages = [{"role": "user", "content": "Tell me a story " * random.randint(1, 5)}]
    prompt = {"prompt": "Once"} if path == "/v1/completions" else {"input": "Hi"} if path == "/v1/responses" else {"messages": messages}
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {**prompt, limit: random.randint(1, 80), "stream": True}
    if path == "/v1/responses":
        body["store"] = random.random() < 0.5
    if path == "/v1/completions":
        body |= random.choice([{}, {"n": 2}, {"logprobs": 3}, {"bad_words": ["time"]}, {"logit_bias": {"300": -5}}])
    async with client.stream("POST", path, json=body) as response:
        if response.status_code == 429:
            await asyncio.sleep(float(response.headers["retry-after"]) * random.random())
            return "429"
        if response.status_code != 200:
            return f"{response.status_code} {(await response.aread()).decode()[:80]}"
        last = ""
        async for line in response.aiter_lines():
            last = line or last
            if leave and random.random() < 0.2:
                return "left"
        ended = "[DONE]" in last or "message_stop" in last or "response." in last
        return "streamed" if ended else f"cut off after {last[:80]}"


async def abuse(client: httpx.AsyncClient, host: str, port: int) -> str:
    kind = random.choice(["deep", "utf8", "huge", "loris", "template", "long"])
    sent = {"content-type": "application/json"}
    if kind == "loris":
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
        answer = await reader.read()
        writer.close()
        return "loris told" if b" 408 " in answer else f"loris: {answer[:80]!r}"
    content = {
        "deep": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "utf8": b'{"prompt": "\xff\xfe"}',
        "huge": b" " * 100_000_000,
        "template": b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": 5}}',
        "long": json.dumps({"prompt": "a " * 100_000}).encode(),
    }[kind]
    path = "/v1/chat/completions" if kind == "template" else "/v1/completions"
    response = await client.post(path, content=content, headers=sent)
    fits = response.status_code == (413 if kind == "huge" else 400) and set(response.json()) == {"error"}
    return f"{kind} told" if fits else f"{kind}: {response.status_code} {response.text[:80]}"


async def one_client(client: httpx.AsyncClient, until: float, abuser: bool, host: str, port: int) -> None:
    while time.monotonic() < until:
        try:
            async with asyncio.timeout(SLOW_S):
                outcome = await (abuse(client, host, port) if abuser else talk(client, leave=random.random() < 0.3))
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:100]
        outcomes[outcome] += 1
        if outcome.split()[-1] not in ("429", "left", "streamed", "told"):
            broken.append(outcome)
        await asyncio.sleep(0.2 if abuser else 0)


async def settle(client: httpx.AsyncClient) -> None:
    for _ in range(100):
        text = (await client.get("/metrics")).text
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        left = {name: float(re.search(rf"^jaxllm:{name}\{{\S* (\S+)", text, re.M)[1]) for name in names}  # pyright: ignore[reportOptionalSubscript]
        if not any(left.values()):
            return
        await asyncio.sleep(0.1)
    broken.append(f"still held: {left}")


async def soak(process: subprocess.Popen, url: str, minutes: float, clients: int) -> dict:
    parsed = httpx.URL(url)
    begin, samples = time.monotonic(), []
    until = begin + minutes * 60
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=SLOW_S, limits=limits) as client:
        jobs = [one_client(client, until, i % 16 == 0, parsed.host, parsed.port or 80) for i in range(clients)]

        async def watch() -> None:
            while time.monotonic() < until:
                samples.append((time.monotonic() - begin, memory(process)))
                await asyncio.sleep(5)

        await asyncio.gather(watch(), *jobs)
        await settle(client)
    warm = [sample for at, sample in samples if at >= min(120, minutes * 30)]
    growth = {kind: round(100 * (warm[-1][kind] / warm[0][kind] - 1), 1) for kind in warm[0]}
    return {"seconds": round(time.monotonic() - begin), "memory MiB": warm[-1], "growth after warm-up %": growth}


async def stop_under_load(process: subprocess.Popen, url: str) -> dict:
    """SIGTERM with 32 streams open: each is told, or ends by itself."""
    async with httpx.AsyncClient(base_url=url, timeout=SLOW_S) as client:
        streams = [asyncio.create_task(talk(client, leave=False)) for _ in range(32)]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        ends = Counter(str(end)[:60] for end in await asyncio.gather(*streams, return_exceptions=True))
    status = await asyncio.to_thread(process.wait, 30)
    if status:
        broken.append(f"status {status} after SIGTERM")
    return {"streams": dict(ends), "seconds": round(time.monotonic() - began, 1), "status": status}


async def kill_engine(process: subprocess.Popen, url: str) -> dict:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    async with httpx.AsyncClient(base_url=url, timeout=SLOW_S) as client:
        streams = [asyncio.create_task(talk(client, leave=False)) for _ in range(32)]
        await asyncio.sleep(0.3)
        os.kill(int(children[0]), signal.SIGKILL)
        ends = Counter("told" if "stopped" in str(end) else str(end)[:60] for end in await asyncio.gather(*streams, return_exceptions=True))
    status = await asyncio.to_thread(process.wait, 30)
    if status != 1:
        broken.append(f"status {status} after the engine's death")
    return {"streams": dict(ends), "status": status}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    started = [start()]
    try:
        figures = {"soak": asyncio.run(soak(*started[0], args.minutes, args.clients)), "outcomes": dict(outcomes)}
        figures["SIGTERM under load"] = asyncio.run(stop_under_load(*started[0]))
        started.append(start())
        figures["engine killed under load"] = asyncio.run(kill_engine(*started[1]))
    finally:
        for process, _ in started:
            process.kill()
    print(json.dumps(figures | {"broken": Counter(broken)}, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
