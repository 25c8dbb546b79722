"""How long one batch takes from prompts to last token, through the Python API, in the layout of vLLM's latency bench.

jaxllm bench latency --model qwen2.5-0.5b --load-format dummy --batch-size 8
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import offline, record, workloads

PERCENTILES = (10, 25, 50, 75, 90, 99)


def report(latencies: Sequence[float]) -> dict[str, object]:
    """vLLM's keys of a list of seconds."""
    found = {str(p): float(np.percentile(latencies, p)) for p in PERCENTILES}
    return {"avg_latency": float(np.mean(latencies)), "latencies": list(latencies), "percentiles": found}


def block(latencies: Sequence[float]) -> str:
    lines = [f"Avg latency: {np.mean(latencies)} seconds"]
    return "\n".join(lines + [f"{p}% percentile latency: {np.percentile(latencies, p)} seconds" for p in PERCENTILES])


def bound(bench: offline.Bench, args: argparse.Namespace) -> str:
    """The least that the device allows, where it is known: the prompts' operations, then a read of weights and KV a step."""
    machine = workloads.MACHINES.get(bench.device)
    if machine is None or bench.shape is None:
        return f"no limit is known of {bench.device} for this model"
    rows, prompt, output, tp = args.batch_size, args.input_len, args.output_len, args.tensor_parallel_size
    seconds = rows * output / workloads.serve_limit(bench.shape, machine, rows, prompt, output, tp)
    return f"limit: {seconds:.4f} seconds"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench latency", description="Times one batch from prompts to last token.")
    offline.add_engine_arguments(made)
    made.add_argument("--input-len", type=int, default=32, help="tokens of a prompt (default: 32)")
    made.add_argument("--output-len", type=int, default=128, help="tokens of an answer (default: 128)")
    made.add_argument("--batch-size", type=int, default=8, help="prompts in the batch (default: 8)")
    made.add_argument("--num-iters-warmup", type=int, default=10, help="batches before, not timed (default: 10)")
    made.add_argument("--num-iters", type=int, default=30, help="batches timed (default: 30)")
    made.add_argument("--output-json", type=Path, metavar="FILE", help="write the figures under vLLM's names")
    return made


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    prompts, outputs = [args.input_len] * args.batch_size, [args.output_len] * args.batch_size
    with offline.loaded(args, offline.options(args, args.input_len + args.output_len, args.batch_size)) as bench:
        print(record.command("jaxllm bench latency", argv, args.model, args.output_json), flush=True)
        for _ in range(args.num_iters_warmup):
            bench.seconds(prompts, outputs, offline.GREEDY)
        latencies = [bench.seconds(prompts, outputs, offline.GREEDY) for _ in range(args.num_iters)]
        print(f"{block(latencies)}\n{bound(bench, args)}")
    if args.output_json:
        args.output_json.write_text(json.dumps(report(latencies), indent=1) + "\n")


if __name__ == "__main__":
    main()
