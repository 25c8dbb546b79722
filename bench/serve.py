"""Loads any OpenAI server over HTTP and reports what its users would feel: throughput, TTFT, TPOT, ITL, end-to-end latency, goodput.

    jaxllm bench serve --base-url http://127.0.0.1:8000 --max-concurrency 64 --num-prompts 1000
    jaxllm bench serve --trace azure_conv.csv.xz --time-scale 0.5 --goodput ttft:500 tpot:50 --plot run.png

Prompts are random and answers run to exactly the length asked where the server knows `ignore_eos`. Prints vLLM's block; --json writes
vLLM's keys; --save keeps rows in bench/results. docs/benchmarking.md says what each figure means.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import answers, load, record, traffic, workloads
from bench.answers import METRICS, Answer, Figures
from bench.client import Pool, Target
from bench.traffic import Call

PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
INFINITE = float("inf")
_KEY = "KEY"  # what a command that is kept shows of --api-key


def objectives(texts: Sequence[str]) -> dict[str, float]:
    """["ttft:500", "tpot:50"] as milliseconds by metric. Raises ValueError for anything else."""
    found = {}
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = -1.0
        if name not in METRICS or not 0 < found[name] < INFINITE:
            raise ValueError(f"--goodput {text!r} is not METRIC:MILLISECONDS with a metric of {', '.join(METRICS)}")
    return found


def plan(args: argparse.Namespace) -> list[Call]:
    """The calls that the arguments ask for. Raises ValueError or OSError if a trace cannot be read."""
    rate = INFINITE if args.request_rate is None else args.request_rate
    if args.trace is None:
        count = args.num_prompts or 1000
        sizes = traffic.lengths(args.lengths, count, args.input_len, args.output_len, args.range_ratio, args.seed)
        times = traffic.arrivals(count, rate, args.burstiness, args.seed)
        return [Call(i, at, *size) for i, (at, size) in enumerate(zip(times, sizes, strict=True))]
    calls = traffic.read_trace(args.trace, args.num_prompts, args.max_len)
    times = [args.time_scale * call.at for call in calls]
    if args.request_rate is not None:
        times = traffic.arrivals(len(calls), rate, args.burstiness, args.seed)
    return [Call(call.index, at, call.prompt, call.output, call.hashes) for call, at in zip(calls, times, strict=True)]


def fields(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """What every request's body says beside prompt and length."""
    found: dict[str, Any] = {"model": model, "temperature": args.temperature, "stream": True}
    found |= {"stream_options": {"include_usage": True}}
    if args.top_p is not None:
        found["top_p"] = args.top_p
    if args.ignore_eos:
        found["ignore_eos"] = True
    return found | args.extra_body


async def _ask(target: Target, request: bytes, timeout: float) -> Any:
    pool = Pool(target)
    try:
        return await pool.ask(request, timeout)
    finally:
        await pool.close()


def first_model(args: argparse.Namespace) -> str:
    """The model that the server names first. Raises ValueError if it does not say."""
    target = Target.of(args.base_url, "/v1/models", args.api_key)
    reply = asyncio.run(_ask(target, target.request(b"", "GET"), 30))
    if reply.error:
        raise ValueError(f"{args.base_url} does not name its models: {reply.error}; start the server, or give --base-url and --model")
    return json.loads(reply.body)["data"][0]["id"]


def warm_up(job: load.Job, count: int) -> None:
    """Requests that nobody times; the first shows whether the server understands what is asked. Raises ValueError if it does not."""
    for number in range(count):
        call = job.calls[number % len(job.calls)]
        call = Call(len(job.calls) + number, 0.0, call.prompt, call.output)  # its own prompt: nothing of the run is cached by it
        reply = asyncio.run(_ask(job.target, job.target.request(load.body(call, job)), job.timeout))
        if error := answers.read(call, reply).error:
            hint = "; if this server takes text only, ask with --prompts words" if job.vocab is not None and "HTTP 4" in error else ""
            raise ValueError(f"the first test request failed: {error}{hint}")


def measure(args: argparse.Namespace, model: str) -> tuple[list[Answer], str]:
    """The answers to everything that was asked, and what is to be said about the client."""
    chat = args.backend == "openai-chat"
    vocab = None if chat or args.prompts == "words" else args.vocab_size
    job = load.Job(
        target=Target.of(args.base_url, PATHS[args.backend], args.api_key),
        calls=plan(args),
        chat=chat,
        fields=fields(args, model),
        vocab=vocab,
        seed=args.seed,
        concurrency=args.max_concurrency,
        timeout=args.timeout,
        max_seconds=args.max_seconds,
    )
    warm_up(job, args.num_warmups)
    found, efforts = load.run(job, args.processes)
    return found, load.verdict(efforts, sum(len(answer.times) for answer in found))


def remarks(found: Sequence[Answer]) -> Iterator[str]:
    """What a reader must know to trust the figures: failures by reason, and answers of another length than asked."""
    reasons: dict[str, int] = {}
    for answer in found:
        if answer.error:
            reasons[answer.error] = reasons.get(answer.error, 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:5]:
        yield f"{count} failed: {reason}"
    good = [answer for answer in found if answer.error is None]
    if other := sum(answer.output_tokens != answer.wanted for answer in good):
        yield f"{other} of {len(good)} answers have another length than asked: the server stopped them by itself"
    if merged := sum(len(answer.times) != answer.output_tokens for answer in good):
        yield f"{merged} of {len(good)} answers have fewer or more events than tokens: ITL is a gap between events there"


def rows(run: Figures, args: argparse.Namespace, label: str, device: str) -> list[record.Row]:
    """The rows that bench/results keeps of a run, with the device's limit and vLLM's figure where they are known."""
    common: dict[str, Any] = {"model": label, "clients": args.max_concurrency, "requests": run.keys["completed"]}
    common |= {"dtype": args.dtype, "tp": args.tensor_parallel_size, "lengths": args.trace.name if args.trace else args.lengths}
    if args.trace is None and args.lengths != "mix":
        common |= {"input": args.input_len, "output": args.output_len}
    if args.request_rate is not None:
        common["rate"] = args.request_rate
    values = {
        "serve_tok_s": (run.keys["output_throughput"], "tok/s"),
        "serve_ttft_mean_ms": (run.keys["mean_ttft_ms"], "ms"),
        "serve_itl_p99_ms": (run.keys["p99_itl_ms"], "ms"),
    }
    config = workloads.SHAPES.get(label)
    shape = workloads.Shape.of(config) if config else None
    made = []
    for name, (value, unit) in values.items():
        row = {"name": name, "value": record.rounded(value), "unit": unit} | common
        extra = {"limit": record.rounded(workloads.limit(device, shape, row)), "anchor": workloads.vllm_figure(device, row)}
        made.append(row | {key: found for key, found in extra.items() if found is not None})
    return made


def ceiling(args: argparse.Namespace) -> None:
    """Runs the same load against a server without a model, and prints how many events a client process can take."""
    command = [sys.executable, "-m", "bench.null_server"]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            args.base_url, args.api_key = server.stdout.readline().split()[-1], None
            chat = args.backend == "openai-chat"
            target = Target.of(args.base_url, PATHS[args.backend])
            vocab = None if chat else args.vocab_size
            job = load.Job(
                target, plan(args), chat, fields(args, "null"), vocab, args.seed, args.max_concurrency, args.timeout, args.max_seconds
            )
            found, efforts = load.run(job, args.processes)
        finally:
            server.terminate()
    events = sum(len(answer.times) for answer in found)
    wall, cpu = max(e.wall for e in efforts), sum(e.cpu for e in efforts)
    print("\n".join(remarks(found)), end="")
    print(f"{events:,} events in {wall:.2f} s from a server without a model: {events / wall:,.0f} a second")
    print(f"client CPU: {1e6 * cpu / events:.1f} µs an event, so at most {events / cpu:,.0f} events a second for each process and core")


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("a rate is above 0, or inf")
    return value


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is wanted")
    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench serve", description="Loads an OpenAI server over HTTP and measures its answers.")
    server = made.add_argument_group("the server")
    server.add_argument("--base-url", default="http://127.0.0.1:8000", help="default: http://127.0.0.1:8000")
    server.add_argument("--backend", choices=PATHS, default="openai", help="openai: completions (default); openai-chat: chat completions")
    server.add_argument("--model", help="the name to ask for (default: the first of /v1/models)")
    server.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: OPENAI_API_KEY of the environment")
    when = made.add_argument_group("when requests are sent")
    when.add_argument("--num-prompts", type=record.count, help="requests (default: 1000; of a trace: all)")
    when.add_argument("--request-rate", type=_rate, help="requests a second in the mean (default: all at once, or the trace's own times)")
    when.add_argument("--burstiness", type=_rate, default=1.0, help="shape of the gaps: 1 is Poisson, less comes in bursts (default: 1)")
    when.add_argument("--max-concurrency", type=record.count, help="requests under way at most")
    when.add_argument("--processes", type=record.count, default=1, help="client processes (default: 1)")
    when.add_argument("--num-warmups", type=record.count, default=1, help="requests before, not timed (default: 1)")
    when.add_argument("--timeout", type=_rate, default=600.0, help="seconds for one answer (default: 600)")
    when.add_argument("--max-seconds", type=_rate, default=3600.0, help="seconds for everything; what runs then is cut off (default: 3600)")
    what = made.add_argument_group("what they ask")
    what.add_argument(
        "--lengths", choices=["fixed", "uniform", "mix"], default="fixed", help="mix: lognormal, as bench offline (default: fixed)"
    )
    what.add_argument("--input-len", type=record.count, default=299, help="tokens of a prompt, or their mean (default: 299)")
    what.add_argument("--output-len", type=record.count, default=209, help="tokens of an answer, or their mean (default: 209)")
    what.add_argument("--range-ratio", type=float, default=1.0, help="uniform: lengths are within this share of the mean (default: 1)")
    what.add_argument("--trace", type=Path, help="lengths and times from an Azure CSV or a Mooncake JSONL, plain or .xz")
    what.add_argument("--time-scale", type=float, default=1.0, help="a trace's times are multiplied by this; 0: all at once (default: 1)")
    what.add_argument("--max-len", type=record.count, help="a trace's requests of more tokens, in and out together, are left out")
    what.add_argument(
        "--prompts", choices=["ids", "words"], default="ids", help="random token ids (default) or words; chat takes words only"
    )
    what.add_argument(
        "--vocab-size", type=record.count, default=256, help="ids are below this; few suffice to share no prefix (default: 256)"
    )
    what.add_argument("--temperature", type=float, default=0.0, help="default: 0")
    what.add_argument("--top-p", type=float)
    what.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="ask for the full length (default: on)")
    what.add_argument("--extra-body", type=_object, default={}, metavar="JSON", help="more fields of every request")
    what.add_argument("--seed", type=int, default=0, help="of lengths, times and prompts (default: 0)")
    said = made.add_argument_group("what is reported")
    said.add_argument("--percentile-metrics", default="ttft,tpot,itl", help="of ttft,tpot,itl,e2el (default: ttft,tpot,itl)")
    said.add_argument("--metric-percentiles", default="99", help="comma-separated (default: 99)")
    said.add_argument(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS", help="count requests that keep these, such as ttft:500 tpot:50"
    )
    said.add_argument("--json", type=Path, metavar="FILE", help="write the figures under vLLM's names")
    said.add_argument("--save-detailed", action="store_true", help="--json with every request's times and texts")
    said.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latencies and tokens over time (needs the bench extra)")
    said.add_argument("--save", action="store_true", help="keep rows of this jaxllm server in the result files")
    said.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the result files")
    said.add_argument("--label", help=f"the model's name in rows (default: --model); limits are known of {', '.join(workloads.SHAPES)}")
    said.add_argument("--device", help="the server's device in rows (default: this machine's GPU)")
    said.add_argument("--dtype", default="bfloat16", help="the server's, for rows (default: bfloat16)")
    said.add_argument("--tensor-parallel-size", "-tp", type=record.count, default=1, help="the server's, for rows (default: 1)")
    said.add_argument("--ceiling", action="store_true", help="measure this client instead, against a server without a model")
    return made


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments together, in a sentence."""
    if unknown := [m for m in args.percentile_metrics.split(",") if m not in METRICS]:
        return f"--percentile-metrics knows {', '.join(METRICS)}, not {unknown[0]!r}"
    if not all(p.replace(".", "", 1).isdigit() and float(p) <= 100 for p in args.metric_percentiles.split(",")):
        return f"--metric-percentiles {args.metric_percentiles!r} is not a list of numbers from 0 to 100"
    if args.max_concurrency is not None and args.processes > args.max_concurrency:
        return f"{args.processes} client processes cannot share {args.max_concurrency} requests at a time; lower --processes"
    if not 0 <= args.range_ratio <= 1:
        return f"--range-ratio is from 0 to 1, not {args.range_ratio:g}"
    if not args.time_scale >= 0:
        return f"--time-scale is 0 or more, not {args.time_scale:g}"
    return None


def _write_json(path: Path, run: Figures, args: argparse.Namespace, model: str, count: int) -> None:
    head = {"date": f"{datetime.now():%Y%m%d-%H%M%S}", "backend": args.backend, "model_id": model, "num_prompts": count}
    head |= {"request_rate": args.request_rate or "inf", "burstiness": args.burstiness, "max_concurrency": args.max_concurrency}
    path.write_text(json.dumps(head | run.keys | (run.lists if args.save_detailed else {}), indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    made = parser()
    args = made.parse_args(argv)
    try:
        slo = objectives(args.goodput)
        if wrong := check(args):
            raise ValueError(wrong)
        if args.ceiling:
            return ceiling(args)
        model = args.model or first_model(args)
        shown = [f"--api-key={_KEY}" if a.startswith("--api-key=") else _KEY if a == args.api_key else a for a in argv]
        command = record.command("jaxllm bench serve", shown, args.trace, args.json, args.plot, args.results)
        label, device = args.label or Path(model).name, args.device or record.device()
        print(f"{model} at {args.base_url} on {device}, {record.versions()}\n{command}", flush=True)
        found, client = measure(args, model)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"jaxllm bench serve: {error}") from error
    percentiles = [float(p) for p in args.metric_percentiles.split(",")]
    run = answers.figures(found, percentiles=sorted({*percentiles, 99.0}), slo=slo)
    metrics = args.percentile_metrics.split(",")
    print(answers.block(run, concurrency=args.max_concurrency, rate=args.request_rate, metrics=metrics, percentiles=percentiles))
    print("\n".join([*remarks(found), client]))
    kept = rows(run, args, label, device)
    for row in kept:
        print(record.describe(row))
    if not any("limit" in row for row in kept):
        print(f"no limit is known of {label} on {device} under this load")
    if args.json:
        _write_json(args.json, run, args, model, len(found))
    if args.plot:
        from bench import plots

        plots.run(found, args.plot, f"{label}, {len(found)} requests")
    if args.save:
        record.save("serve", device, command, kept, args.results)
    if run.keys["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
