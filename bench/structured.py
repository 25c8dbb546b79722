"""What rows whose answers must have a form cost their neighbours: a decode step of free rows, and one of which half follow a grammar.

jaxllm bench structured --model qwen2.5-0.5b --load-format dummy --rows 32

Every row has a token of every step, with a form or without, so what a step gets longer by is what free rows lose in tokens a second. The
grammar is lines of JSON objects without an end: with ignore_eos, every request runs to exactly the length asked. A shape has no
tokenizer; one with as many made-up words as its vocabulary has is made for it, unless --tokenizer names a folder.
"""

import argparse
import contextlib
import json
import statistics
import string
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench import offline, record, workloads
from jaxllm import StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "weight": {"type": "number"},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
GRAMMAR = f"start: line+\nline: %json {json.dumps(SCHEMA)} /\\n/"
FORMED = offline.SAMPLED.with_defaults(structured_outputs=StructuredOutputs(grammar=GRAMMAR))


def measure(bench: offline.Bench, rows: int, prompt: int, steps: int, repeats: int) -> list[record.Row]:
    """Milliseconds of a step of 2 * rows rows, with and without forms in half of them, and the share that free rows lose."""
    free, formed = [offline.SAMPLED] * (2 * rows), [FORMED] * rows + [offline.SAMPLED] * rows
    prompts = [prompt] * (2 * rows)
    found: dict[int, list[float]] = {0: [], rows: []}
    for _ in range(repeats):  # in turns, so that what drifts on the machine drifts for both
        for how in (free, formed):
            one = bench.seconds(prompts, [1] * len(prompts), how)
            all_ = bench.seconds(prompts, [1 + steps] * len(prompts), how)
            found[rows if how is formed else 0].append(1e3 * (all_ - one) / steps)
    step = {forms: statistics.median(times) for forms, times in found.items()}
    on = {"batch": 2 * rows, "context": f"{prompt}-{prompt + steps}"}
    made = [bench.row("structured_step_ms", value, "ms", forms=forms, **on) for forms, value in step.items()]
    return [*made, bench.row("structured_loss", 1 - step[0] / step[rows], "share", forms=rows, **on)]


@contextlib.contextmanager
def tokenizer_folder(args: argparse.Namespace) -> Iterator[str | None]:
    """A folder with a tokenizer: the one named, the model's own (None), or one made for a shape."""
    if args.tokenizer is not None or args.model not in workloads.SHAPES:
        yield args.tokenizer
        return
    with tempfile.TemporaryDirectory() as folder:
        made_up(workloads.SHAPES[args.model]["vocab_size"]).save(str(Path(folder) / "tokenizer.json"))
        yield folder


def made_up(size: int) -> Tokenizer:
    """Byte-level, of the 256 bytes and words of 2 to 12 letters, half of which begin with a space; some hold what JSON is written with."""
    rng = np.random.default_rng(0)
    letters = np.array([*string.ascii_lowercase * 8, *string.ascii_uppercase, *string.digits, *'{}[]":,._-'])
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    while len(vocab) < size:
        word = "".join(rng.choice(letters, rng.integers(2, 13)))
        vocab.setdefault(("Ġ" if rng.random() < 0.5 else "") + word, len(vocab))
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench structured", description="Measures what answers with a form cost other rows.")
    offline.add_engine_arguments(made)
    made.add_argument("--rows", type=int, default=32, help="rows with a form, and as many without (default: 32)")
    made.add_argument("--prompt", type=int, default=workloads.DECODE_PROMPT, help=f"tokens (default: {workloads.DECODE_PROMPT})")
    made.add_argument("--steps", type=int, default=workloads.DECODE_STEPS, help=f"timed steps (default: {workloads.DECODE_STEPS})")
    made.add_argument("--repeats", type=int, default=3, help="the median of so many (default: 3)")
    made.add_argument("--tokenizer", help="a folder with the model's tokenizer")
    made.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the result files")
    made.add_argument("--no-save", action="store_true", help="print only")
    return made


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command = record.command("python -m bench.structured", argv, args.model, args.tokenizer, args.results)
    with tokenizer_folder(args) as folder:
        options: dict[str, Any] = offline.options(args, args.prompt + 1 + args.steps, 2 * args.rows)
        with offline.loaded(args, options | ({} if folder is None else {"tokenizer": folder})) as bench:
            bench.seconds([args.prompt] * 4, [16] * 4, [FORMED] * 2 + [offline.SAMPLED] * 2)  # compiles the grammar
            rows = measure(bench, args.rows, args.prompt, args.steps, args.repeats)
    print("\n".join(f"{record.describe(row)}  forms {row['forms']}" for row in rows), flush=True)
    if not args.no_save:
        record.save("structured", bench.device, command, rows, args.results)


if __name__ == "__main__":
    main()
