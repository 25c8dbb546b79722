"""How many requests and tokens a second the engine does when all are submitted at once, in the layout of vLLM's throughput bench.

jaxllm bench throughput --model qwen2.5-0.5b --load-format dummy --lengths mix
"""

import argparse
import json
import sys
from pathlib import Path

from bench import offline, record, traffic, workloads


def report(seconds: float, prompts: list[int], outputs: list[int]) -> dict[str, float]:
    """vLLM's keys."""
    tokens = sum(prompts) + sum(outputs)
    return {
        "elapsed_time": seconds,
        "num_requests": len(prompts),
        "total_num_tokens": tokens,
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": tokens / seconds,
    }


def block(seconds: float, prompts: list[int], outputs: list[int]) -> str:
    tokens = sum(prompts) + sum(outputs)
    return (
        f"Throughput: {len(prompts) / seconds:.2f} requests/s, {tokens / seconds:.2f} total tokens/s, "
        f"{sum(outputs) / seconds:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {sum(prompts)}\nTotal num output tokens:  {sum(outputs)}"
    )


def bound(bench: offline.Bench, prompts: list[int], outputs: list[int], tp: int) -> str:
    """The least that the device allows: every token's operations, and a read of each token's KV context as it is generated."""
    machine, shape = workloads.MACHINES.get(bench.device), bench.shape
    if machine is None or shape is None:
        return f"no limit is known of {bench.device} for this model"
    ops = 2 * (shape.linear * (sum(prompts) + sum(outputs)) + shape.head * sum(outputs))
    ops += sum(shape.attention_ops(p * p / 2) for p in prompts)
    context = sum(output * (prompt + output / 2) for prompt, output in zip(prompts, outputs, strict=True))
    seconds = ops / tp / machine.ops + context * shape.kv_bytes / min(tp, shape.kv_heads) / machine.read
    return f"limit: {seconds:.3f} s, {(sum(prompts) + sum(outputs)) / seconds:,.0f} total tokens/s (operations, and KV read once a token)"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench throughput", description="Times many requests submitted at once.")
    offline.add_engine_arguments(made)
    made.add_argument("--num-prompts", type=int, help="requests (default: 1000; of a trace: all)")
    made.add_argument("--lengths", choices=["fixed", "uniform", "mix"], default="fixed", help="default: fixed")
    made.add_argument("--input-len", type=int, default=299, help="tokens of a prompt, or their mean (default: 299)")
    made.add_argument("--output-len", type=int, default=209, help="tokens of an answer, or their mean (default: 209)")
    made.add_argument("--range-ratio", type=float, default=1.0, help="uniform: lengths are within this share of the mean (default: 1)")
    made.add_argument("--trace", type=Path, help="lengths from an Azure CSV or a Mooncake JSONL, plain or .xz")
    made.add_argument("--max-len", type=int, help="a trace's requests of more tokens, in and out together, are left out")
    made.add_argument("--sampled", action="store_true", help="temperature 0.7, top_p 0.9 rather than greedy")
    made.add_argument("--output-json", type=Path, metavar="FILE", help="write the figures under vLLM's names")
    return made


def pairs(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(prompt, output) tokens of each request. Raises SystemExit for a trace that cannot be read."""
    if args.trace is None:
        return traffic.lengths(args.lengths, args.num_prompts or 1000, args.input_len, args.output_len, args.range_ratio, 0)
    try:
        return [(call.prompt, call.output) for call in traffic.read_trace(args.trace, args.num_prompts, args.max_len)]
    except (ValueError, OSError) as error:
        raise SystemExit(f"jaxllm bench throughput: {error}") from error


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    prompts, outputs = (list(lengths) for lengths in zip(*pairs(args), strict=True))
    longest, rows = max(map(sum, zip(prompts, outputs, strict=True))), min(len(prompts), workloads.MIX_ROWS)
    with offline.loaded(args, offline.options(args, longest, rows)) as bench:
        print(record.command("jaxllm bench throughput", argv, args.model, args.trace, args.output_json), flush=True)
        bench.seconds(prompts[:4], [1] * len(prompts[:4]), offline.GREEDY)
        seconds = bench.seconds(prompts, outputs, offline.SAMPLED if args.sampled else offline.GREEDY)
        print(f"{block(seconds, prompts, outputs)}\n{bound(bench, prompts, outputs, args.tensor_parallel_size)}")
    if args.output_json:
        args.output_json.write_text(json.dumps(report(seconds, prompts, outputs), indent=1) + "\n")


if __name__ == "__main__":
    main()
