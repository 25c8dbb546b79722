"""What a load test sends, and when: lengths, arrival times, prompts; drawn from a distribution or read from a trace file.

A trace is Azure's (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's (JSONL: timestamp in ms, input_length,
output_length, hash_ids), plain or packed with xz. The same seed makes the same prompts in every process. No JAX.
"""

import csv
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np

from bench import workloads

HASHED = 512  # tokens that one of Mooncake's hash_ids stands for
# Short words that common tokenizers take as one token each, a space before them included.
_COMMON = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you were all "
    "her she there would their we him been has when who will no more if out so up said what its about than into them can only other time "
    "new some could these two may first then do any like my now over such our man me even most made after also did many off before must "
    "well back through years much where your way down should because long each just state those people too good how own work life day"
)
WORDS = _COMMON.split()


@dataclass(frozen=True)
class Call:
    """One request to make: `at` seconds after the start, so many tokens in and out. `hashes` name shared blocks of 512 tokens."""

    index: int
    at: float
    prompt: int
    output: int
    hashes: tuple[int, ...] = ()


def lengths(kind: str, count: int, prompt: int, output: int, spread: float, seed: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of `count` requests. kind: fixed; uniform, within `spread` (0 to 1) of the means; mix, as bench.workloads."""
    if kind == "fixed":
        return [(prompt, output)] * count
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        drawn = [rng.integers(max(1, round(mean * (1 - spread))), round(mean * (1 + spread)) + 1, count) for mean in (prompt, output)]
        return list(zip(*(numbers.tolist() for numbers in drawn), strict=True))
    prompts, outputs = (numbers.tolist() for numbers in workloads.mix_lengths())
    pairs = list(zip(prompts, outputs, strict=True))
    return [pairs[i % len(pairs)] for i in range(count)]


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds at which requests come, `rate` a second. Gaps are gamma-distributed: burstiness 1 is Poisson, less comes in bursts."""
    if rate == float("inf"):
        return [0.0] * count
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), count)
    return (np.cumsum(gaps) - gaps[0]).tolist() if count else []


def read_trace(path: Path, count: int | None = None, max_len: int | None = None) -> list[Call]:
    """The first `count` requests of a trace that fit into `max_len` tokens, in order of arrival, the first at 0 seconds.

    Raises ValueError if the file is of neither format, or nothing in it fits.
    """
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        first = file.readline().strip()
        if first.startswith("{"):
            found = _mooncake([first], 1), _mooncake(file, 2)
        elif first.split(",") == ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
            found = iter(()), _azure(file)
        else:
            raise ValueError(
                f"{path.name} is no trace we read: it begins with {first[:60]!r}; wanted are Azure's CSV (TIMESTAMP,ContextTokens,"
                "GeneratedTokens) or Mooncake's JSONL (timestamp, input_length, output_length, hash_ids)"
            )
        fitting = (c for part in found for c in part if c.prompt > 0 and c.output > 0 and not (max_len and c.prompt + c.output > max_len))
        calls = sorted(islice(fitting, count), key=lambda call: call.at)
    if not calls:
        raise ValueError(f"{path.name} has no request" + (f" of at most {max_len} tokens" if max_len else ""))
    return [replace(call, index=i, at=call.at - calls[0].at) for i, call in enumerate(calls)]


def _azure(file: Iterable[str]) -> Iterator[Call]:
    for number, row in enumerate(csv.reader(file), 2):
        try:
            time, prompt, output = row
            yield Call(number, datetime.fromisoformat(time).timestamp(), int(prompt), int(output))
        except ValueError as error:
            raise ValueError(f"line {number} of the trace is not a time and two lengths: {','.join(row)!r}") from error


def _mooncake(file: Iterable[str], start: int) -> Iterator[Call]:
    for number, line in enumerate(file, start):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield Call(number, row["timestamp"] / 1e3, row["input_length"], row["output_length"], tuple(row.get("hash_ids", ())))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of the trace lacks timestamp, input_length or output_length: {line[:60]!r}") from error


def token_ids(call: Call, vocab: int, seed: int) -> list[int]:
    """The prompt as random token ids. Calls share a prefix exactly as far as their hashes are the same."""
    blocks = [np.random.default_rng((seed, 1, h)).integers(0, vocab, HASHED) for h in call.hashes[: -(-call.prompt // HASHED)]]
    own = max(0, call.prompt - HASHED * len(blocks))
    blocks.append(np.random.default_rng((seed, 2, call.index)).integers(0, vocab, own))
    return np.concatenate(blocks)[: call.prompt].tolist()


def words(call: Call, seed: int) -> str:
    """The prompt as random words, about a token each, for servers and routes that take text only."""
    return " ".join(WORDS[i] for i in token_ids(call, len(WORDS), seed))
