"""From what a client received to what it means: events to token times, and token times to the figures people compare servers by.

TTFT: from sending to the first token. ITL: each gap between two tokens. TPOT: one request's mean gap, its first token left out.
E2EL: from sending to the last token. A token is an event that carries one: not the role that opens a chat, not the usage at the end.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.client import Reply
from bench.traffic import Call

METRICS = {  # name: (title of its section, short name)
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


@dataclass(frozen=True)
class Answer:
    """One request's outcome. `sent` and `times`, one a token event, are perf_counter's; tokens are the server's count if it gave one."""

    index: int
    sent: float
    prompt_tokens: int
    output_tokens: int
    times: tuple[float, ...] = ()
    text: str = ""
    error: str | None = None
    wanted: int = 0  # tokens asked for

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def e2el(self) -> float:
        return self.times[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """None of an answer of one token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        return np.diff(self.times).tolist()


def read(call: Call, reply: Reply) -> Answer:
    """What a reply says. An answer that ended early, or said an error after its 200, is one with `error`."""
    times, texts, usage, error, complete = [], [], {}, reply.error, False
    for when, data in _events(reply):
        if data == b"[DONE]":
            complete = True
            continue
        try:
            event = json.loads(data)
        except ValueError:
            error = error or f"an event is not JSON: {data[:60]!r}"
            break
        if said := event.get("error"):
            error = error or str(said.get("message", said) if isinstance(said, dict) else said)
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            if (text := _token(choice)) is not None:
                times.append(when)
                texts.append(text)
    if not error and not complete:
        error = "the stream ended before its [DONE]"
    if not error and not times:
        error = "the answer has no tokens"
    prompt, output = usage.get("prompt_tokens", call.prompt), usage.get("completion_tokens", len(times))
    return Answer(call.index, reply.sent, prompt, output, tuple(times), "".join(texts), error, call.output)


def _events(reply: Reply) -> Iterator[tuple[float, bytes]]:
    """(when it was complete, its data) for each server-sent event."""
    rest = b""
    for when, piece in reply.pieces:
        *events, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield when, b"\n".join(data)


def _token(choice: dict[str, Any]) -> str | None:
    """The text of an event's choice, which may be empty (half a character is held back); None if the choice carries no token."""
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    named = {"content", "reasoning_content", "reasoning", "tool_calls"} & delta.keys()
    return text if text or (named and "role" not in delta) else None


@dataclass(frozen=True)
class Figures:
    """A run's numbers. `keys` has vLLM's names for them, times in milliseconds; `lists` is what they were made from."""

    keys: dict[str, Any]
    lists: dict[str, list[Any]]
    slo: dict[str, float] = field(default_factory=dict)


def figures(answers: Sequence[Answer], *, percentiles: Sequence[float] = (99,), slo: dict[str, float] | None = None) -> Figures:
    """slo: milliseconds by metric; goodput counts the requests that keep every one of them."""
    good = [a for a in answers if a.error is None]
    begun, ended = min((a.sent for a in answers), default=0.0), max((a.times[-1] for a in answers if a.times), default=0.0)
    duration = max(ended - begun, 1e-9)
    inputs, outputs = sum(a.prompt_tokens for a in good), sum(a.output_tokens for a in good)
    keys: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(_keeps(a, slo) for a in good) / duration if slo else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": peak_tokens(good, begun),
        "max_concurrent_requests": peak_concurrency(answers),
    }
    samples = {
        "ttft": [a.ttft for a in good],
        "tpot": [a.tpot for a in good if a.tpot is not None],
        "itl": [gap for a in good for gap in a.itls],
        "e2el": [a.e2el for a in good],
    }
    for name, seconds in samples.items():
        keys |= summary(name, seconds, percentiles)
    ordered = sorted(answers, key=lambda a: a.index)
    lists = {
        "input_lens": [a.prompt_tokens for a in ordered],
        "output_lens": [a.output_tokens if a.error is None else 0 for a in ordered],
        "ttfts": [a.ttft if a.error is None else 0.0 for a in ordered],
        "itls": [a.itls if a.error is None else [] for a in ordered],
        "generated_texts": [a.text for a in ordered],
        "errors": [a.error or "" for a in ordered],
    }
    return Figures(keys, lists, slo or {})


def summary(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """mean_, median_, std_ and pNN_ of a metric in milliseconds; zeros of nothing."""
    values = 1e3 * np.asarray(seconds or [0.0])
    found = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
    found |= {f"p{p:g}": np.percentile(values, p) for p in percentiles}
    return {f"{statistic}_{name}_ms": float(value) for statistic, value in found.items()}


def _keeps(answer: Answer, slo: dict[str, float]) -> bool:
    """Does a request keep its objectives? ITL counts by the worst gap; a single token has no TPOT to break."""
    worst = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "itl": max(answer.itls, default=0.0), "e2el": answer.e2el}
    return all(1e3 * worst[name] <= limit for name, limit in slo.items())


def peak_tokens(answers: Sequence[Answer], begun: float) -> float:
    """Most token events within one whole second, counted from the beginning."""
    times = np.array([t for a in answers for t in a.times]) - begun
    return float(np.bincount(times.astype(int)).max()) if len(times) else 0.0


def peak_concurrency(answers: Sequence[Answer]) -> int:
    """Most requests under way at one moment."""
    # At the same moment an end comes before a beginning.
    changes = sorted(change for a in answers if a.times for change in ((a.sent, 1), (a.times[-1], -1)))
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def block(run: Figures, *, concurrency: int | None, rate: float | None, metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The result in the layout that users of vLLM's bench know."""
    keys = run.keys
    lines = [_title(" Serving Benchmark Result ", "=")]
    lines += [_line("Successful requests:", keys["completed"]), _line("Failed requests:", keys["failed"])]
    if concurrency is not None:
        lines.append(_line("Maximum request concurrency:", concurrency))
    if rate is not None and rate != float("inf"):
        lines.append(_line("Request rate configured (RPS):", float(rate)))
    lines += [
        _line("Benchmark duration (s):", keys["duration"]),
        _line("Total input tokens:", keys["total_input_tokens"]),
        _line("Total generated tokens:", keys["total_output_tokens"]),
        _line("Request throughput (req/s):", keys["request_throughput"]),
    ]
    if run.slo:
        lines.append(_line("Request goodput (req/s):", keys["request_goodput"]))
    lines += [
        _line("Output token throughput (tok/s):", keys["output_throughput"]),
        _line("Peak output token throughput (tok/s):", keys["max_output_tokens_per_s"]),
        _line("Peak concurrent requests:", float(keys["max_concurrent_requests"])),
        _line("Total token throughput (tok/s):", keys["total_token_throughput"]),
    ]
    for name in metrics:
        title, short = METRICS[name]
        lines += [_title(title, "-"), _line(f"Mean {short} (ms):", keys[f"mean_{name}_ms"])]
        lines.append(_line(f"Median {short} (ms):", keys[f"median_{name}_ms"]))
        lines += [_line(f"P{p:g} {short} (ms):", keys[f"p{p:g}_{name}_ms"]) for p in percentiles]
    return "\n".join([*lines, "=" * 50])


def _title(text: str, fill: str) -> str:
    return f"{text:{fill}^50}"


def _line(name: str, value: float) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"
