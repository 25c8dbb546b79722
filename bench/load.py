"""A load spread over client processes: shares out the calls, starts everybody at one moment, gathers answers and effort.

One process runs inside the caller's; several are started afresh (never forked), prepare their prompts, and wait for the start.
"""

import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench import answers, client, traffic
from bench.answers import Answer
from bench.client import Effort, Load, Target
from bench.traffic import Call

BUSY = 0.75  # of a core: from here on what a client measures is its own doing too
LATE = 0.010  # seconds
PREPARE_S = 600  # at most, for a client process to start and make its prompts


@dataclass(frozen=True)
class Job:
    """What all processes share. `fields` go into every request's body; prompts are random ids below `vocab`, or words if it is None."""

    target: Target
    calls: Sequence[Call]
    chat: bool
    fields: dict[str, Any]
    vocab: int | None
    seed: int
    concurrency: int | None
    timeout: float
    max_seconds: float


def body(call: Call, job: Job) -> bytes:
    """The request's JSON."""
    prompt = traffic.words(call, job.seed) if job.vocab is None else traffic.token_ids(call, job.vocab, job.seed)
    asked = {"messages": [{"role": "user", "content": prompt}]} if job.chat else {"prompt": prompt}
    return json.dumps(asked | {"max_tokens": call.output} | job.fields, separators=(",", ":")).encode()


def run(job: Job, processes: int = 1) -> tuple[list[Answer], list[Effort]]:
    """Every call's answer and each process's effort. Raises RuntimeError if a client process dies."""
    if processes == 1:
        return _one(job, lambda: time.perf_counter())
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    try:
        for share in shares(job, processes):
            ours, theirs = context.Pipe()
            started.append(context.Process(target=_child, args=(share, theirs), daemon=True))
            started[-1].start()
            theirs.close()  # so that a child's death is an end of file here
            pipes.append(ours)
        for pipe in pipes:
            _receive(pipe, PREPARE_S)
        start = time.perf_counter() + 0.1  # one clock for all processes of a machine
        for pipe in pipes:
            pipe.send(start)
        parts = [_receive(pipe, job.max_seconds + PREPARE_S) for pipe in pipes]
    finally:
        for process in started:
            process.join(5)
            if process.is_alive():
                process.kill()
    return [answer for found, _ in parts for answer in found], [effort for _, efforts in parts for effort in efforts]


def shares(job: Job, processes: int) -> list[Job]:
    """The job in `processes` parts: every so-manieth call, and an even share of the concurrency."""
    slots: list[int | None] = [None] * processes
    if job.concurrency is not None:
        slots = [job.concurrency // processes + (i < job.concurrency % processes) for i in range(processes)]
    return [
        Job(**{**vars(job), "calls": job.calls[i::processes], "concurrency": slot})
        for i, slot in enumerate(slots)
        if job.calls[i::processes]
    ]


def _receive(pipe: Connection, seconds: float) -> Any:
    try:
        if pipe.poll(seconds):
            return pipe.recv()
    except EOFError:
        pass
    raise RuntimeError("a client process ended, or hung, before its work was done; what it printed says why")


def _child(job: Job, pipe: Connection) -> None:
    def ready() -> float:
        pipe.send("ready")
        return pipe.recv()

    pipe.send(_one(job, ready))


def _one(job: Job, ready) -> tuple[list[Answer], list[Effort]]:
    load = Load(job.target, job.calls, [body(call, job) for call in job.calls], job.concurrency, job.timeout, job.max_seconds)
    start = ready()
    with asyncio.Runner(loop_factory=client.loop_factory()[0]) as runner:
        made, effort = runner.run(client.drive(load, start))
    return [answers.read(call, reply) for call, reply in made], [effort]


def verdict(efforts: Sequence[Effort], events: int) -> str:
    """What the client itself cost, and whether it was the limit."""
    share = max(e.cpu / e.wall for e in efforts)
    cpu = sum(e.cpu for e in efforts)
    late, lag = max(e.late for e in efforts), max(e.lag for e in efforts)
    who = f"{len(efforts)} process{'es' if len(efforts) > 1 else ''} ({client.loop_factory()[1]})"
    cost = f"the busiest used {share:.0%} of a core ({1e6 * cpu / max(events, 1):.1f} µs an event)"
    line = f"client: {who}, {events:,} events; {cost}; at worst {1e3 * late:.1f} ms late to send, {1e3 * lag:.1f} ms to read"
    if share > BUSY:
        return f"{line}\nTHE CLIENT WAS AT ITS LIMIT: these figures are its own as much as the server's; add --processes"
    if max(lag, late) > LATE:
        line += f"\nThe client was held up for over {1e3 * LATE:.0f} ms at least once, by a burst or a busy machine: see its worst times so"
    return line
