"""What streams cost the engine: a decode step while so many clients read tokens over HTTP, beside the same step offline.

    jaxllm bench streams --model qwen2.5-0.5b --load-format dummy --clients 256 --api-servers 4

`jaxllm serve` and, after it, LLM run with the same options on the same lengths. Timed is the way from one token to another of every
answer, both so far from its ends that all clients read meanwhile; offline, the difference of two runs that end at these tokens. A shape
has no tokenizer; one with as many made-up words as its vocabulary has is made for it, so that text costs what it does.
"""

import argparse
import multiprocessing
import statistics
import sys

from bench import api, load, offline, record, serve, structured, workloads
from bench.answers import Answer
from bench.client import Target
from bench.traffic import Call

PROMPT = workloads.DECODE_PROMPT
FIRST, LAST = 512, 1024  # the two tokens of an answer between which time is taken
LENGTH = 1408  # tokens of an answer: the last client must read on until the first one's LAST, and more


def step_ms(answers: list[Answer], first: int, last: int) -> float:
    """The mean of all answers' milliseconds a token from the `first` to the `last`. Raises RuntimeError if not all were read meanwhile."""
    if failed := [answer for answer in answers if answer.error or len(answer.times) <= last]:
        raise RuntimeError(f"{len(failed)} of {len(answers)} answers are not complete: {failed[0].error or 'too short'}")
    begin, end = min(a.times[first] for a in answers), max(a.times[last] for a in answers)
    together = max(a.times[0] for a in answers) <= begin and end <= min(a.times[-1] for a in answers)
    if not together:
        raise RuntimeError("the clients did not all read at once: the requests took too long to arrive; add --api-servers")
    return 1e3 * statistics.mean((a.times[last] - a.times[first]) / (last - first) for a in answers)


def served(folder: str, flags: list[str], args: argparse.Namespace) -> float:
    """Milliseconds a step through HTTP; says how busy everybody was."""
    server = api.Server("serving", "--model", folder, "--api-server-count", str(args.api_servers), *flags)
    try:
        calls = [Call(i, 0.0, PROMPT, LENGTH) for i in range(args.clients)]
        fields = {"temperature": 0, "stream": True, "ignore_eos": True}
        target = Target.of(server.url, serve.PATHS["openai"])
        asked = load.Job(target, calls, False, fields, 256, 0, args.clients, 600, 600)
        serve.warm_up(asked, 1)
        found = []
        for _ in range(args.repeats):
            before = server.cpu()
            answers, efforts = load.run(asked, args.processes)
            used = {kind: max(b - a for a, b in zip(before[kind], now, strict=True)) for kind, now in server.cpu().items()}
            seconds = max(a.times[-1] for a in answers if a.times) - min(a.sent for a in answers)
            found.append(step_ms(answers, FIRST, LAST))
            shares = ", ".join(f"{kind} {cpu / seconds:.0%}" for kind, cpu in used.items())
            print(f"streamed: {found[-1]:.3f} ms a step; of a core: {shares}\n{load.verdict(efforts, args.clients * LENGTH)}", flush=True)
        return statistics.median(found)
    finally:
        server.close()


def alone(folder: str, flags: list[str], args: argparse.Namespace, pipe) -> None:
    """Sends (milliseconds a step without HTTP, the device's name)."""
    from jaxllm import LLM
    from serving import options

    config, _ = options.read(["--model", folder, *flags])
    with LLM(**vars(config)) as llm:
        import jax  # only now: the engine chooses devices before the backend starts

        device = jax.devices()[0].device_kind
        bench = offline.Bench(llm, config=args.config, device=device, model="", dtype=args.dtype, tp=args.tensor_parallel_size, repeats=1)
        pipe.send((unstreamed(bench, args), device))


def unstreamed(bench: offline.Bench, args: argparse.Namespace) -> float:
    """Milliseconds a step of as many rows as clients, without HTTP."""
    bench.warm_up()
    prompts, found = [PROMPT] * args.clients, []
    for _ in range(args.repeats):
        ends = [bench.seconds(prompts, [1 + token] * args.clients, offline.GREEDY) for token in (FIRST, LAST)]
        found.append(1e3 * (ends[1] - ends[0]) / (LAST - FIRST))
        print(f"offline: {found[-1]:.3f} ms a step", flush=True)
    return statistics.median(found)


def in_a_process_of_its_own(folder: str, flags: list[str], args: argparse.Namespace) -> tuple[float, str]:
    """What `alone` sends: a process that has used a device keeps its memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=alone, args=(folder, flags, args, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError("the engine ended before its work was done; what it printed says why") from None
    finally:
        process.join()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench streams", description="Measures what streams cost the engine's steps.")
    made.add_argument("--model", required=True, help=f"a folder, or a shape: {', '.join(workloads.SHAPES)}")
    made.add_argument("--load-format", default="auto", help="dummy: random weights (default: auto)")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    made.add_argument("--tokenizer", help="a folder with the model's tokenizer")
    made.add_argument("--clients", type=int, default=256, help="streams at a time (default: 256)")
    made.add_argument("--api-servers", type=int, default=4, help="API processes (default: 4)")
    made.add_argument("--processes", type=int, default=4, help="client processes (default: 4)")
    made.add_argument("--repeats", type=int, default=3, help="the median of so many (default: 3)")
    made.add_argument("--args", default="", help='more flags of jaxllm serve, as one word: --args="--num-scheduler-steps 1"')
    record.add_arguments(made)
    return made


def flags_of(args: argparse.Namespace, tokenizer: str | None) -> list[str]:
    """Of jaxllm serve, for the engine of either run."""
    flags = ["--max-num-seqs", str(args.clients), "--max-model-len", str(PROMPT + LENGTH), "--no-enable-prefix-caching"]
    flags += ["--load-format", args.load_format, "--dtype", args.dtype, "-tp", str(args.tensor_parallel_size), *args.args.split()]
    return flags if tokenizer is None else [*flags, "--tokenizer", tokenizer]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command = record.command("jaxllm bench streams", argv, args.model, args.tokenizer, args.results)
    print(f"{workloads.model_name(args.model)}, {api.processor()}, {record.versions()}\n{command}", flush=True)
    try:
        with workloads.model_folder(args.model) as (folder, args.config), structured.tokenizer_folder(args) as tokenizer:
            flags = flags_of(args, tokenizer)
            streamed = served(folder, flags, args)
            offline_ms, device = in_a_process_of_its_own(folder, flags, args)
    except RuntimeError as error:
        raise SystemExit(f"jaxllm bench streams: {error}") from error
    on = {"model": workloads.model_name(args.model), "dtype": args.dtype, "tp": args.tensor_parallel_size, "clients": args.clients}
    on |= {"context": f"{PROMPT + FIRST}-{PROMPT + LAST}", "api_servers": args.api_servers, "cpu": api.processor()}
    values = (
        ("streamed_step_ms", streamed, "ms"),
        ("unstreamed_step_ms", offline_ms, "ms"),
        ("streams_cost", streamed / offline_ms - 1, "share"),
    )
    rows = [{"name": name, "value": record.rounded(value), "unit": unit} | on for name, value, unit in values]
    print("\n".join(record.describe(row) for row in rows))
    if not args.no_save:
        record.save("streams", device, command, rows, args.results)


if __name__ == "__main__":
    main()
