"""A server under faults, then under load and abuse for as long as one likes: `make soak`, `make soak ARGS="--only load --minutes 30"`.

Sends many kinds of client at once, then looks at what is left: nothing may be held, nobody may wait for ever, and after a warm-up the
memory of both processes must not grow. Prints figures as JSON, and what broke; the exit status is 1 if anything did.
docs/reliability.md says what it has found.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import faults
import httpx
from soak_server import SLOW_S, Server

WARM_UP_S, WINDOW_S, EVERY_S = 120, 60, 2
GROWTH = 2  # percent that memory may grow after the warm-up
ABUSERS = 16  # one client in so many
GOOD = ("answered", "streamed", "left", "refused", "429")  # how an outcome may begin
SCHEMA = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


def messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": "Once upon a time there was a dog. " * random.randint(1, 4)}]


def some_body() -> tuple[str, dict[str, Any]]:
    """A route and a body for it."""
    path = random.choice(["completions", "chat/completions", "responses", "messages", "embeddings", "score", "rerank", "tokenize"])
    words = "Once upon a time " * random.randint(1, 8)
    draw = {"max_tokens": random.randint(1, 80), "stream": random.random() < 0.7}
    if path == "completions":
        extra = [{}, {"n": 2}, {"logprobs": 3}, {"bad_words": ["time"]}, {"logit_bias": {"300": -5}}, {"echo": True}]
        extra += [{"structured_outputs": {"regex": f"[a-z]{{{random.randint(1, 9)}}}"}}, {"structured_outputs": {"choice": ["yes", "no"]}}]
        return "/v1/completions", {"prompt": words} | draw | random.choice(extra) | random.choice([{}, {"temperature": 0}, {"seed": 5}])
    if path in ("chat/completions", "messages"):
        form = {"response_format": FORM} if path == "chat/completions" and random.random() < 0.2 else {}
        return f"/v1/{path}", {"messages": messages()} | draw | form
    if path == "responses":
        return "/v1/responses", {"input": words, "max_output_tokens": draw["max_tokens"], "stream": draw["stream"]}
    if path == "tokenize":
        return "/tokenize", {"prompt": words}
    return f"/v1/{path}", {
        "embeddings": {"input": [words, "a dog"]},
        "score": {"text_1": words, "text_2": ["a dog", "a cat"]},
        "rerank": {"query": words, "documents": ["a dog", "a cat"]},
    }[path]


async def talk(client: httpx.AsyncClient) -> str:
    """One request, read to its end, or left in the middle."""
    path, body = some_body()
    try:
        return await ask(client, path, body)
    except httpx.HTTPError as error:
        return f"{path}: {error!r}"


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    leaves = random.random() < 0.2
    async with client.stream("POST", path, json=body) as response:
        if response.status_code == 429:
            await asyncio.sleep(float(response.headers["retry-after"]) * random.random())
            return "429"
        if response.status_code != 200:
            return f"{path}: {response.status_code} {(await response.aread()).decode()[:80]}"
        if not body.get("stream"):
            return await whole(client, path, await response.aread())
        last, stored = "", ""
        async for line in response.aiter_lines():
            last = line or last
            if path == "/v1/responses" and '"response.created"' in line and line.startswith("data:"):
                stored = json.loads(line[5:])["response"]["id"]
            if leaves and random.random() < 0.2:
                return "left"
    if stored:
        await client.delete(f"/v1/responses/{stored}")
    ended = "[DONE]" in last or "message_stop" in last or "response.completed" in last or "response.incomplete" in last
    return "streamed" if ended else f"{path}: cut off after {last[:80]}"


async def whole(client: httpx.AsyncClient, path: str, raw: bytes) -> str:
    """Stored responses go again, so that what they hold, by design, is not taken for a leak."""
    found = json.loads(raw)
    if path == "/v1/responses":
        again = await client.get(f"/v1/responses/{found['id']}")
        gone = await client.delete(f"/v1/responses/{found['id']}")
        if again.json()["output"] != found["output"] or gone.status_code != 200:
            return f"{path}: stored as {again.text[:80]}"
    return "answered"


async def abuse(client: httpx.AsyncClient, server: Server) -> str:
    if random.random() < 0.2:
        found = await faults.loris(server.port, random.choice(["head", "body"]))
        return "refused a slow client" if found == "408" else found
    if random.random() < 0.3:
        return f"left {await faults.leave(server.port)}"
    if random.random() < 0.3:
        route = random.choice(["/metrics", "/health", "/v1/models", "/load", "/version"])
        response = await client.get(route)
        return "answered" if response.status_code == 200 else f"{route}: {response.status_code}"
    name = random.choice(list(faults.BODIES))
    path, body, status, word = faults.BODIES[name]
    found = await faults.send(server, path, body(), status, word)
    return f"refused {name}" if found == str(status) else f"{name}: {found}"


async def one_client(server: Server, client: httpx.AsyncClient, until: float, abuser: bool, outcomes: Counter[str]) -> None:
    while time.monotonic() < until:
        try:
            async with asyncio.timeout(SLOW_S):
                outcome = await (abuse(client, server) if abuser else talk(client))
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:100]
        outcomes[outcome] += 1
        if not outcome.startswith(GOOD):
            server.broken.append(outcome)
        if abuser:
            await asyncio.sleep(0.2)


async def watch(server: Server, until: float) -> list[tuple[float, dict[str, float]]]:
    """(seconds from now, MiB of each process), every few seconds."""
    begin, samples = time.monotonic(), []
    while time.monotonic() < until:
        samples.append((time.monotonic() - begin, server.memory()))
        await asyncio.sleep(EVERY_S)
    return samples


def growth(samples: list[tuple[float, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """MiB of each kind of memory, minute by minute, and how much the last minute has above the first after the warm-up, in percent.

    Of each minute the least, which no body that was just being received is part of.
    """
    end = samples[-1][0]
    window = min(WINDOW_S, end / 6)
    found = {}
    for name in samples[0][1]:
        minutes = [[memory[name] for at, memory in samples if i * window <= at < (i + 1) * window] for i in range(int(end // window))]
        least = [round(min(each), 1) for each in minutes if each]
        first = least[min(int(WARM_UP_S // window), len(least) // 3)]
        most = max(memory[name] for _, memory in samples)
        found[name] = {"least in each minute": least, "most": round(most, 1), "growth %": round(100 * (least[-1] / first - 1), 2)}
    return found


async def warm_up(server: Server) -> None:
    """Long prompts, many at once: they are encoded in threads, each of which keeps the memory that its longest took. A structured answer:
    with the first one, the engine opens two files for good."""
    path, body, status, word = faults.BODIES["too long"]
    for _ in range(4):
        await asyncio.gather(*(faults.send(server, path, body(), status, word) for _ in range(32)))
    async with server.client() as client:
        await client.post("/v1/chat/completions", json={"messages": messages(), "max_tokens": 9, "response_format": FORM})


async def load(server: Server, minutes: float, clients: int) -> dict[str, Any]:
    """Many clients at once. The story that the server tells, its open files and its memory are looked at before and after."""
    await warm_up(server)
    before, files = await server.story(), server.files()
    outcomes: Counter[str] = Counter()
    begin = time.monotonic()
    until = begin + minutes * 60
    async with server.client() as client:
        jobs = [one_client(server, client, until, i % ABUSERS == 0, outcomes) for i in range(clients)]
        watching = asyncio.create_task(watch(server, until))
        await asyncio.gather(*jobs)
        samples = await watching
    seconds = time.monotonic() - begin
    await server.settle(files)
    if await server.story() != before:
        server.broken.append("the same prompt has another answer after the load")
    memory = growth(samples)
    server.broken += [f"{name} grew: {found}" for name, found in memory.items() if found["growth %"] > GROWTH]
    figures = {
        "minutes": round(seconds / 60, 1),
        "clients": clients,
        "requests": outcomes.total(),
        "outcomes": dict(outcomes.most_common()),
    }
    return figures | {"memory": memory, "open files": server.files(), "open files before": files}


def loaded(minutes: float, clients: int) -> tuple[dict[str, Any], list[str]]:
    server = Server()
    try:
        figures = asyncio.run(load(server, minutes, clients))
        if "Traceback" in (log := server.logged()):
            server.broken.append(f"a traceback in the log: {log[log.index('Traceback') :][:1500]}")
        return figures, server.broken
    finally:
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--only", choices=("faults", "load"))
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of what clients choose")
    args = parser.parse_args()
    random.seed(args.seed)
    parts: dict[str, Callable[[], tuple[dict, list[str]]]] = {"faults": faults.run, "load": lambda: loaded(args.minutes, args.clients)}
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "seed": args.seed}
    broken: list[str] = []
    for name, part in parts.items():
        if args.only in (None, name):
            figures[name], found = part()
            broken += found
    print(json.dumps(figures | {"load average": os.getloadavg(), "broken": Counter(broken)}, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
