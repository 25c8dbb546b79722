"""What rows whose answers must have a form cost their neighbours: free rows by themselves, and beside as many that follow a grammar.

jaxllm bench structured --model qwen2.5-0.5b --load-format dummy --rows 32

Timed is what a free row waits for its next token while all rows run, and what a row with a form waits for its own. The grammar is lines
of JSON objects without an end: with ignore_eos, every request runs to exactly the length asked. A shape has no tokenizer; one with as many
made-up words as its vocabulary has is made for it, unless --tokenizer names a folder.
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
    """Milliseconds from one token of a row to its next, in batches of 2 * rows: of free rows, without and with forms in the other half;
    of those with forms; and the share of their tokens a second that free rows lose."""
    free, formed = [offline.SAMPLED] * (2 * rows), [FORMED] * rows + [offline.SAMPLED] * rows
    first, few = 1, max(steps // 8, 1)  # what a row with a form has for sure while free rows have `steps`
    found: dict[str, list[float]] = {"free": [], "beside": [], "formed": []}

    def wait(how: list[Any], count: int, timed: slice, others: int) -> float:
        """Of the rows `timed`, which have `count` tokens after their first while the rest have `others`."""
        lengths = [first + others] * (2 * rows)
        lengths[timed] = [first + count] * rows
        begun, ended = (max(bench.ends([prompt] * (2 * rows), each, how)[timed]) for each in ([first] * (2 * rows), lengths))
        return 1e3 * (ended - begun) / count

    one_half, other_half = slice(0, rows), slice(rows, None)
    for _ in range(repeats):  # in turns, so that what drifts on the machine drifts for all
        found["free"].append(wait(free, steps, other_half, steps))
        found["beside"].append(wait(formed, steps, other_half, steps))
        found["formed"].append(wait(formed, few, one_half, steps))
    ms = {name: statistics.median(times) for name, times in found.items()}
    on = {"batch": 2 * rows, "context": f"{prompt}-{prompt + steps}"}
    return [
        bench.row("structured_free_ms", ms["free"], "ms", forms=0, **on),
        bench.row("structured_free_ms", ms["beside"], "ms", forms=rows, **on),
        bench.row("structured_form_ms", ms["formed"], "ms", forms=rows, **on),
        bench.row("structured_loss", 1 - ms["free"] / ms["beside"], "share", forms=rows, **on),
    ]


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
    record.add_arguments(made)
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
