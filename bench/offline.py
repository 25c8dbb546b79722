"""Measures the engine through its Python API, without HTTP: decode steps, prefill, MIX, and the load of a server's clients, beside their
limits and vLLM's figures.

    python -m bench.offline --model llama-3.1-8b --load-format dummy --workload decode prefill mix --batch 1 64 256

A name from `bench.workloads.SHAPES` is a config.json in a temporary folder, without weights or tokenizer. Every prompt is fresh
random tokens and the prefix cache is off, so nothing is computed once and counted twice; every request runs to exactly the length
asked, whatever end token the model chooses, and that is checked.
"""

import argparse
import contextlib
import itertools
import json
import queue
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench import record, workloads
from bench.answers import Answer, figures
from jaxllm import LLM, Request, SamplingParams

WORKLOADS = ("decode", "prefill", "long", "mix", "mix-sampled", "clients")
WARM_TOKENS = 16  # of an answer before anything is timed
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, ignore_eos=True)


class Bench:
    """One loaded model and what its rows have in common. `llm` needs only `generate` and, for `ends`, `engine`."""

    def __init__(self, llm: Any, *, config: dict[str, Any], device: str, model: str, dtype: str, tp: int, repeats: int):
        self.llm = llm
        self._vocab: int = config["vocab_size"]
        self.shape = workloads.Shape.of(config)
        self.device = device
        self._common = {"model": model, "dtype": dtype, "tp": tp}
        self._repeats = repeats
        self._rng = np.random.default_rng(0)

    def decode(self, batch: int) -> record.Row:
        """Milliseconds a decode step of `batch` rows takes."""
        lengths = [workloads.DECODE_PROMPT] * batch
        one = self._median(lengths, [1] * batch)
        all_ = self._median(lengths, [1 + workloads.DECODE_STEPS] * batch)
        milliseconds = 1e3 * (all_ - one) / workloads.DECODE_STEPS
        return self.row("decode_step_ms", milliseconds, "ms", batch=batch, context=workloads.DECODE_CONTEXT)

    def prefill(self, prompt: int) -> record.Row:
        """Prompt tokens a second, for 16 prompts of `prompt` tokens."""
        batch = workloads.PREFILL_BATCH
        seconds = self._median([prompt] * batch, [1] * batch)
        return self.row("prefill_tok_s", batch * prompt / seconds, "tok/s", batch=batch, context=prompt)

    def mix(self, *, sampled: bool) -> record.Row:
        """Seconds that MIX takes, once: it is long enough to need no repetition."""
        prompts, outputs = (lengths.tolist() for lengths in workloads.mix_lengths())
        seconds = self.seconds(prompts, outputs, SAMPLED if sampled else GREEDY)
        return self.row("mix_sampled_s" if sampled else "mix_s", seconds, "s", batch=len(prompts), tokens=sum(prompts) + sum(outputs))

    def long(self, context: int) -> Iterator[record.Row]:
        """One prompt that leaves of so many tokens those it then decodes: seconds to the first token, milliseconds a step."""
        prompt = context - 1 - workloads.DECODE_STEPS
        one, all_ = (self._median([prompt], [output]) for output in (1, 1 + workloads.DECODE_STEPS))
        yield self.row("long_ttft_s", one, "s", batch=1, context=prompt)
        yield self.row("long_decode_step_ms", 1e3 * (all_ - one) / workloads.DECODE_STEPS, "ms", batch=1, context=prompt)

    def clients(self, count: int, requests: int, prompt: int, output: int) -> Iterator[record.Row]:
        """What `bench serve` measures, without HTTP: so many clients at a time, of streams of equal lengths."""
        found = figures(self.streamed(count, [prompt] * requests, [output] * requests)).keys
        measured_on = dict(clients=count, requests=requests, lengths="fixed", input=prompt, output=output)
        yield self.row("clients_tok_s", found["output_throughput"], "tok/s", **measured_on)
        yield self.row("clients_ttft_mean_ms", found["mean_ttft_ms"], "ms", **measured_on)
        yield self.row("clients_itl_p99_ms", found["p99_itl_ms"], "ms", **measured_on)

    def warm_up(self) -> None:
        """Touches what a first request touches (pages, caches of the host) before anything is timed."""
        for how in (GREEDY, SAMPLED):
            self.seconds([workloads.DECODE_PROMPT] * 4, [WARM_TOKENS] * 4, how)

    def _median(self, prompts: list[int], outputs: list[int]) -> float:
        return statistics.median(self.seconds(prompts, outputs, GREEDY) for _ in range(self._repeats))

    def seconds(self, prompts: list[int], outputs: list[int], how: SamplingParams | Sequence[SamplingParams]) -> float:
        """How long it takes until all requests, submitted at once, are answered. Lengths in tokens. how: one for all, or one each."""
        tokens, params = self._asked(prompts, outputs, how)
        start = time.perf_counter()
        answers = self.llm.generate(tokens, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        _check(outputs, [len(answer.outputs[0].token_ids) for answer in answers])
        return seconds

    def ends(self, prompts: list[int], outputs: list[int], how: SamplingParams | Sequence[SamplingParams]) -> list[float]:
        """As `seconds`, but when each request was answered."""
        heard: queue.SimpleQueue[tuple[int, float, Any]] = queue.SimpleQueue()
        tokens, params = self._asked(prompts, outputs, how)
        start = time.perf_counter()
        for i, (ids, each) in enumerate(zip(tokens, params, strict=True)):
            request = Request(f"bench-{i}", tuple(ids), each, stream=False)
            self.llm.engine.submit(request, lambda output, i=i: heard.put((i, time.perf_counter() - start, output)))
        found = sorted(heard.get() for _ in outputs)
        for _, _, output in found:
            if isinstance(output, Exception):
                raise output
        _check(outputs, [len(output.outputs[0].token_ids) for _, _, output in found])
        return [seconds for _, seconds, _ in found]

    def streamed(self, clients: int, prompts: list[int], outputs: list[int]) -> list[Answer]:
        """What clients hear of these requests, and when; each sends its next one when its last is answered."""
        tokens, params = self._asked(prompts, outputs, GREEDY)
        heard: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()  # of each request that ended
        sent: dict[int, float] = {}
        times: dict[int, list[float]] = defaultdict(list)

        def hear(i: int, output: Any) -> None:
            if isinstance(output, Exception):
                heard.put(output)
                return
            times[i] += [time.perf_counter()] * sum(len(completion.token_ids) for completion in output.outputs)
            if output.finished:
                heard.put(None)

        def send(i: int) -> None:
            sent[i] = time.perf_counter()
            self.llm.engine.submit(Request(f"bench-{i}", tuple(tokens[i]), params[i]), partial(hear, i))

        waiting = iter(range(len(tokens)))
        for i in itertools.islice(waiting, clients):
            send(i)
        for _ in tokens:
            if (error := heard.get()) is not None:
                raise error
            for i in itertools.islice(waiting, 1):
                send(i)
        _check(outputs, [len(times[i]) for i in range(len(tokens))])
        return [Answer(i, sent[i], prompts[i], outputs[i], tuple(times[i]), wanted=outputs[i]) for i in range(len(tokens))]

    def _asked(
        self, prompts: list[int], outputs: list[int], how: SamplingParams | Sequence[SamplingParams]
    ) -> tuple[list[list[int]], list[SamplingParams]]:
        hows = [how] * len(outputs) if isinstance(how, SamplingParams) else how
        params = [each.with_defaults(max_tokens=length) for each, length in zip(hows, outputs, strict=True)]
        return workloads.random_prompts(self._rng, prompts, self._vocab), params

    def row(self, name: str, value: float, unit: str, **measured_on: Any) -> record.Row:
        row = {"name": name, "value": record.rounded(value), "unit": unit} | self._common | measured_on
        extra = {
            "limit": record.rounded(workloads.limit(self.device, self.shape, row)),
            "anchor": workloads.vllm_figure(self.device, row),
        }
        return row | {key: found for key, found in extra.items() if found is not None}


def _check(wanted: list[int], got: list[int]) -> None:
    if got != wanted:
        raise RuntimeError(
            f"{sum(wanted)} tokens were asked of {len(wanted)} requests, but {sum(got)} came from {len(got)}: no measurement"
        )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """EngineConfig's fields for these workloads: room for their longest request and their largest batch."""
    longest, rows = 0, 0
    if "decode" in args.workload:
        longest, rows = workloads.DECODE_PROMPT + 1 + workloads.DECODE_STEPS, max(args.batch)
    if "prefill" in args.workload:
        longest, rows = max(longest, 1 + max(args.prompt)), max(rows, workloads.PREFILL_BATCH)
    if "long" in args.workload:
        longest, rows = max(longest, args.context), max(rows, 1)
    if "clients" in args.workload:
        needed = max(args.input_len + args.output_len, workloads.DECODE_PROMPT + WARM_TOKENS)
        longest, rows = max(longest, needed), max(rows, args.clients)
    if {"mix", "mix-sampled"} & set(args.workload):
        longest, rows = max(longest, 2048 + 1024), max(rows, workloads.MIX_ROWS)
    return options(args, longest, rows)


def options(args: argparse.Namespace, longest: int, rows: int) -> dict[str, Any]:
    """EngineConfig's fields: what was asked on the command line, and room for `rows` requests of `longest` tokens."""
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
        elif workload == "long":
            yield from bench.long(args.context)
        elif workload == "clients":
            yield from bench.clients(args.clients, args.num_prompts, args.input_len, args.output_len)
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


def add_engine_arguments(made: argparse.ArgumentParser) -> None:
    """The flags of every bench that loads a model itself."""
    made.add_argument("--model", required=True, help=f"a folder, or a shape: {', '.join(workloads.SHAPES)}")
    made.add_argument("--load-format", default="auto", help="dummy: random weights (default: auto)")
    made.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    made.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    made.add_argument("--set", nargs="+", type=_setting, default=[], metavar="NAME=VALUE", help="other fields of EngineConfig")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench offline", description="Measures the engine without HTTP.")
    add_engine_arguments(made)
    made.add_argument("--workload", nargs="+", default=["decode"], choices=WORKLOADS)
    made.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256], help="decode: rows in a batch")
    made.add_argument("--prompt", nargs="+", type=int, default=list(workloads.PREFILL_PROMPTS), help="prefill: tokens in a prompt")
    made.add_argument("--context", type=int, default=131_072, help="long: tokens of the prompt and its answer (default: 131072)")
    made.add_argument("--clients", type=record.count, default=256, help="clients: so many at a time (default: 256)")
    made.add_argument("--num-prompts", type=record.count, default=1000, help="clients: requests (default: 1000)")
    made.add_argument("--input-len", type=record.count, default=299, help="clients: tokens of a prompt (default: 299)")
    made.add_argument("--output-len", type=record.count, default=209, help="clients: tokens of an answer (default: 209)")
    made.add_argument("--repeats", type=int, default=3, help="decode, prefill and long: the median of so many (default: 3)")
    record.add_arguments(made)
    return made


@contextlib.contextmanager
def loaded(args: argparse.Namespace, options: dict[str, Any], repeats: int = 1) -> Iterator[Bench]:
    """The model that the arguments name, loaded; hardware, versions and starting time are printed."""
    with workloads.model_folder(args.model) as (folder, config):
        start = time.perf_counter()
        llm = LLM(model=folder, **options)
        started = time.perf_counter() - start

        import jax  # only now: the engine chooses devices before the backend starts

        device, name = jax.devices()[0].device_kind, workloads.model_name(args.model)
        print(f"{name} on {device}, {record.versions()}, started in {started:.1f} s", flush=True)
        yield Bench(llm, config=config, device=device, model=name, dtype=args.dtype, tp=args.tensor_parallel_size, repeats=repeats)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command = record.command("python -m bench.offline", argv, args.model, args.results)
    with loaded(args, engine_options(args), args.repeats) as bench:
        for row in run(bench, args):
            print(record.describe(row), flush=True)
            if not args.no_save:  # at once: what is measured stays measured if a later workload fails
                record.save("offline", bench.device, command, [row], args.results)


if __name__ == "__main__":
    main()
