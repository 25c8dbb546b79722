"""How many tokens a second the API processes stream, over an engine that makes tokens up: `jaxllm serve`, the device apart.

    jaxllm bench api --api-servers 1 4 --clients 256 --processes 4
    jaxllm bench api --step-ms 12.8

Every token is an event of its own. Tokens are there at once, which shows the most that can be streamed, and lets events that wait
for each other leave together; or at a device's pace (--step-ms), which shows what an event costs that comes alone. Says how busy the
busiest process of each kind was, and so who was the limit.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import answers, load, record, serve
from bench.client import Target
from bench.traffic import Call

BUSY = 0.85  # of a core: from here on a process is the limit
KINDS = ("API process", "engine process", "client process")


@dataclass(frozen=True)
class Run:
    """One load and what it took. busy: the share of a core that the busiest process of each kind used."""

    tok_s: float
    itl_p99_ms: float
    busy: dict[str, float]
    us: float  # of the API processes' CPU, a token
    failures: tuple[str, ...] = ()

    @property
    def limit(self) -> str:
        """Who could do no more."""
        busy = [kind for kind in KINDS if self.busy[kind] >= BUSY]
        return " and ".join(f"the {kind}" for kind in busy) or "none of the processes: the pace, or the machine"

    def __str__(self) -> str:
        shares = ", ".join(f"{kind} {self.busy[kind]:.0%}" for kind in KINDS)
        return f"busiest of each kind, of a core: {shares}; the limit was {self.limit}; {self.us:.1f} µs of API CPU a token"


class Server:
    """A server on a free port until `close`: a module that takes `serve` and its flags. Raises RuntimeError if it does not start."""

    def __init__(self, *command: str):
        command = (sys.executable, "-m", *command, "--port", "0", "--disable-log-stats")
        self._process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        found = re.search(r" at (http\S+)", self._process.stdout.readline())
        if found is None:
            self.close()
            raise RuntimeError("the server did not start; what it printed says why")
        self.url = found[1]

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.terminate()
        self._process.wait(60)
        self._process.stdout.close()

    def cpu(self) -> dict[str, list[float]]:
        """Seconds of CPU that each process has used, by kind."""
        first = self._process.pid
        children = [int(pid) for pid in Path(f"/proc/{first}/task/{first}/children").read_text().split()]
        api = [pid for pid in children if b"serving.api_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        engine = [pid for pid in children if pid not in api]
        return {"API process": [_cpu(pid) for pid in api or [first]], "engine process": [_cpu(pid) for pid in engine]}


def _cpu(pid: int) -> float:
    """All threads, in the kernel too."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(api_servers: int, args: argparse.Namespace) -> Iterator[Server]:
    flags = ["--api-server-count", str(api_servers), "--num-scheduler-steps", str(args.num_scheduler_steps)]
    flags += ["--max-num-seqs", str(args.clients)]
    server = Server("bench.null_engine", "--step-ms", str(args.step_ms), "serve", *flags, *(["--model", args.model] if args.model else []))
    try:
        yield server
    finally:
        server.close()


def job(url: str, args: argparse.Namespace) -> load.Job:
    calls = [Call(i, 0.0, args.input_len, args.output_len) for i in range(args.num_prompts)]
    fields = {"temperature": 0, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    target = Target.of(url, serve.PATHS[args.backend])
    return load.Job(target, calls, args.backend == "openai-chat", fields, args.vocab, 0, args.clients, 600, 600)


def measure(server: Server, args: argparse.Namespace) -> Run:
    asked = job(server.url, args)
    serve.warm_up(asked, args.clients // 8)
    before = server.cpu()
    found, efforts = load.run(asked, args.processes)
    after = server.cpu()
    figures = answers.figures(found).keys
    used = {kind: [b - a for a, b in zip(before[kind], after[kind], strict=True)] for kind in before}
    busy = {kind: max(seconds) / figures["duration"] for kind, seconds in used.items()}
    busy["client process"] = max(effort.cpu / effort.wall for effort in efforts)
    us = 1e6 * sum(used["API process"]) / max(figures["total_output_tokens"], 1)
    return Run(figures["output_throughput"], figures["p99_itl_ms"], busy, us, tuple(serve.remarks(found)))


def processor() -> str:
    """This machine's CPU and how many cores of it may be used."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'an unknown CPU'}"


def row(run: Run, api_servers: int, args: argparse.Namespace) -> record.Row:
    made = {"name": "api_tok_s", "value": record.rounded(run.tok_s), "unit": "tok/s", "model": "null", "api_servers": api_servers}
    made |= {"clients": args.clients, "client_processes": args.processes, "requests": args.num_prompts}
    made |= {"input": args.input_len, "output": args.output_len, "step_ms": args.step_ms, "steps": args.num_scheduler_steps}
    return made | {"backend": args.backend, "cpu": processor()}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench api", description="Measures what API processes can stream.")
    made.add_argument("--api-servers", type=int, nargs="+", default=[1, 4], metavar="N", help="API processes, a run each (default: 1 4)")
    made.add_argument("--clients", type=int, default=256, help="streams at a time (default: 256)")
    made.add_argument("--processes", type=int, default=4, help="client processes (default: 4)")
    made.add_argument("--num-prompts", type=int, default=4096, help="requests of a run (default: 4096)")
    made.add_argument("--input-len", type=int, default=299, help="tokens of a prompt (default: 299)")
    made.add_argument("--output-len", type=int, default=209, help="tokens of an answer (default: 209)")
    made.add_argument("--backend", choices=serve.PATHS, default="openai", help="completions (default), or openai-chat")
    made.add_argument("--step-ms", type=float, default=0.0, help="from one token of an answer to its next (default: no time)")
    made.add_argument("--num-scheduler-steps", type=int, default=1, help="tokens that a row decodes in one dispatch (default: 1)")
    made.add_argument("--model", help="a folder, for its tokenizer and chat template (default: the model that ships with jaxllm)")
    made.add_argument("--vocab", type=int, default=256, help="prompts are random token ids below this (default: 256)")
    record.add_arguments(made)
    return made


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.vocab = None if args.backend == "openai-chat" else args.vocab
    command, device = record.command("jaxllm bench api", argv, args.model, args.results), record.device()
    print(f"no device, {processor()}, {record.versions()}\n{command}", flush=True)
    rows = []
    for api_servers in args.api_servers:
        try:
            with started(api_servers, args) as server:
                run = measure(server, args)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"jaxllm bench api: {error}") from error
        rows.append(row(run, api_servers, args))
        print(f"{record.describe(rows[-1])}  API processes {api_servers}, ITL p99 {run.itl_p99_ms:.1f} ms\n  {run}", flush=True)
        if run.failures:
            raise SystemExit("\n".join(run.failures))
    if not args.no_save:
        record.save("api", device, command, rows, args.results)


if __name__ == "__main__":
    main()
