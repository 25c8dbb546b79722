"""Measures the engine through its Python API, without HTTP: decode steps, prefill, and MIX, beside their limits and vLLM's figures.

    python -m bench.offline --model llama-3.1-8b --load-format dummy --workload decode prefill mix --batch 1 64 256

A name from `bench.workloads.SHAPES` is a config.json in a temporary folder, without weights or tokenizer. Every prompt is fresh
random tokens and the prefix cache is off, so nothing is computed once and counted twice; every request runs to exactly the length
asked, whatever end token the model chooses, and that is checked.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import record, workloads
from jaxllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, ignore_eos=True)


class Bench:
    """One loaded model and what its rows have in common. `llm` needs only `generate`."""

    def __init__(self, llm: Any, *, config: dict[str, Any], device: str, model: str, dtype: str, tp: int, repeats: int):
        self._llm = llm
        self._vocab: int = config["vocab_size"]
        self._shape = workloads.Shape.of(config)
        self._device = device
        self._common = {"model": model, "dtype": dtype, "tp": tp}
        self._repeats = repeats
        self._rng = np.random.default_rng(0)

    def decode(self, batch: int) -> record.Row:
        """Milliseconds a decode step of `batch` rows takes."""
        lengths = [workloads.DECODE_PROMPT] * batch
        one = self._median(lengths, [1] * batch)
        all_ = self._median(lengths, [1 + workloads.DECODE_STEPS] * batch)
        milliseconds = 1e3 * (all_ - one) / workloads.DECODE_STEPS
        return self._row("decode_step_ms", milliseconds, "ms", batch=batch, context=workloads.DECODE_CONTEXT)

    def prefill(self, prompt: int) -> record.Row:
        """Prompt tokens a second, for 16 prompts of `prompt` tokens."""
        batch = workloads.PREFILL_BATCH
        seconds = self._median([prompt] * batch, [1] * batch)
        return self._row("prefill_tok_s", batch * prompt / seconds, "tok/s", batch=batch, context=prompt)

    def mix(self, *, sampled: bool) -> record.Row:
        """Seconds that MIX takes, once: it is long enough to need no repetition."""
        prompts, outputs = (lengths.tolist() for lengths in workloads.mix_lengths())
        seconds = self._seconds(prompts, outputs, SAMPLED if sampled else GREEDY)
        return self._row("mix_sampled_s" if sampled else "mix_s", seconds, "s", batch=len(prompts), tokens=sum(prompts) + sum(outputs))

    def warm_up(self) -> None:
        """Touches what a first request touches (pages, caches of the host) before anything is timed."""
        for how in (GREEDY, SAMPLED):
            self._seconds([workloads.DECODE_PROMPT] * 4, [16] * 4, how)

    def _median(self, prompts: list[int], outputs: list[int]) -> float:
        return statistics.median(self._seconds(prompts, outputs, GREEDY) for _ in range(self._repeats))

    def _seconds(self, prompts: list[int], outputs: list[int], how: SamplingParams) -> float:
        """How long it takes until all requests, submitted at once, are answered. Lengths in tokens."""
        tokens = workloads.random_prompts(self._rng, prompts, self._vocab)
        params = [how.with_defaults(max_tokens=length) for length in outputs]
        start = time.perf_counter()
        answers = self._llm.generate(tokens, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        got = [len(answer.outputs[0].token_ids) for answer in answers]
        if got != outputs:
            raise RuntimeError(
                f"{sum(outputs)} tokens were asked of {len(outputs)} requests, but {sum(got)} came from {len(got)}: no measurement"
            )
        return seconds

    def _row(self, name: str, value: float, unit: str, **measured_on: Any) -> record.Row:
        row = {"name": name, "value": _rounded(value), "unit": unit} | self._common | measured_on
        extra = {
            "limit": _rounded(workloads.limit(self._device, self._shape, row)),
            "anchor": workloads.vllm_figure(self._device, row),
        }
        return row | {key: found for key, found in extra.items() if found is not None}


def _rounded(value: float | None) -> float | None:
    """Four digits: more is noise."""
    return None if value is None else float(f"{value:.4g}")


def describe(row: record.Row) -> str:
    """A row as a line: the value, tokens a second, and how far it is from the limit and from vLLM."""
    value, unit = row["value"], row["unit"]
    context = f" context {row['context']}" if "context" in row else ""
    tokens = {"ms": lambda: 1e3 * row["batch"] / value, "s": lambda: row["tokens"] / value, "tok/s": lambda: value}[unit]()
    speed = "" if unit == "tok/s" else f"  {tokens:>9,.0f} tok/s"
    line = f"{row['name']:<15} batch {row['batch']:>4}{context:<16} {value:>10,.4g} {unit:<5}{speed:<17}"
    faster = (lambda other: value / other) if unit == "tok/s" else (lambda other: other / value)
    if "limit" in row:
        line += f"  limit {row['limit']:,.4g} ({faster(row['limit']):.0%} of it)"
    if "anchor" in row:
        line += f"  vLLM {row['anchor']:,.4g} ({faster(row['anchor']):.2f} times its speed)"
    return line


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A path to load and its config.json: of a shape's name, a temporary folder that holds the config alone."""
    if model in workloads.SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            config = workloads.SHAPES[model]
            (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))
            yield folder, config
        return
    path = Path(model) / "config.json"
    if not path.is_file():
        raise SystemExit(f"{model} is neither a folder with a config.json nor a shape; shapes: {', '.join(workloads.SHAPES)}")
    yield model, json.loads(path.read_text())


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """EngineConfig's fields for these workloads: room for their longest request and their largest batch."""
    longest, rows = 0, 0
    if "decode" in args.workload:
        longest, rows = workloads.DECODE_PROMPT + 1 + workloads.DECODE_STEPS, max(args.batch)
    if "prefill" in args.workload:
        longest, rows = max(longest, 1 + max(args.prompt)), max(rows, workloads.PREFILL_BATCH)
    if {"mix", "mix-sampled"} & set(args.workload):
        longest, rows = max(longest, 2048 + 1024), max(rows, workloads.MIX_ROWS)
    chosen = {"max_model_len": longest, "max_num_seqs": rows, "enable_prefix_caching": False}
    shared = {"load_format": args.load_format, "dtype": args.dtype, "tensor_parallel_size": args.tensor_parallel_size}
    return chosen | shared | dict(args.set)


def run(bench: Bench, args: argparse.Namespace) -> Iterator[record.Row]:
    """The rows of the workloads asked for, each as soon as it is measured."""
    bench.warm_up()
    for workload in args.workload:
        if workload == "decode":
            yield from (bench.decode(batch) for batch in args.batch)
        elif workload == "prefill":
            yield from (bench.prefill(prompt) for prompt in args.prompt)
        else:
            yield bench.mix(sampled=workload == "mix-sampled")


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.offline", description="Measures the engine without HTTP.")
    made.add_argument("--model", required=True, help=f"a folder, or a shape: {', '.join(workloads.SHAPES)}")
    made.add_argument("--load-format", default="auto", help="dummy: random weights (default: auto)")
    made.add_argument("--workload", nargs="+", default=["decode"], choices=["decode", "prefill", "mix", "mix-sampled"])
    made.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256], help="decode: rows in a batch")
    made.add_argument("--prompt", nargs="+", type=int, default=list(workloads.PREFILL_PROMPTS), help="prefill: tokens in a prompt")
    made.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    made.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    made.add_argument("--repeats", type=int, default=3, help="decode and prefill: the median of so many (default: 3)")
    made.add_argument("--set", nargs="+", type=_setting, default=[], metavar="NAME=VALUE", help="other fields of EngineConfig")
    made.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the result files")
    made.add_argument("--no-save", action="store_true", help="print only")
    return made


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command = shlex.join(["python", "-m", "bench.offline", *argv])
    for path in (args.model, str(args.results)):  # a path is one machine's; its last part is enough to know the model by
        command = command.replace(path, Path(path).name)
    with model_folder(args.model) as (folder, config):
        start = time.perf_counter()
        llm = LLM(model=folder, **engine_options(args))
        started = time.perf_counter() - start

        import jax  # only now: the engine chooses devices before the backend starts

        device = jax.devices()[0].device_kind
        print(f"{args.model} on {device}, {record.versions()}, started in {started:.1f} s", flush=True)
        name = args.model if args.model in workloads.SHAPES else Path(args.model).name
        bench = Bench(llm, config=config, device=device, model=name, dtype=args.dtype, tp=args.tensor_parallel_size, repeats=args.repeats)
        for row in run(bench, args):
            print(describe(row), flush=True)
            if not args.no_save:  # at once: what is measured stays measured if a later workload fails
                record.save("offline", device, command, [row], args.results)


if __name__ == "__main__":
    main()
