"""What the core counts while it works: when requests waited, began, spoke and ended. Plain numbers: serving/exposition.py names them.

Times are seconds of `time.perf_counter`. A token costs the core one dictionary entry, not a histogram's search: tokens of one step whose
rows also shared the step before are observed together.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

from jaxllm.request import Histogram

_SHORT = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
_LONG = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
BOUNDS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": _LONG,
    "inter_token_latency_seconds": _SHORT,
    "e2e_request_latency_seconds": _LONG,
    "request_queue_time_seconds": _LONG,
    "request_prefill_time_seconds": _LONG,
    "request_decode_time_seconds": _LONG,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
}


@dataclass
class Times:
    """A request's moments so far."""

    arrived: float
    begun: float | None = None  # its first step was dispatched
    first: float | None = None  # its first token was read
    tokens: int = 0


@dataclass
class Metrics:
    ended: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(bounds, [0] * (len(bounds) + 1)) for name, bounds in BOUNDS.items()}
    )
    now: float = 0.0  # when the step at hand was read
    _gaps: Counter[float] = field(default_factory=Counter)  # the row's token before -> how many rows

    def arrive(self) -> Times:
        return Times(time.perf_counter())

    def begin(self, times: Times) -> None:
        """Its first step is on the way. A request that was preempted begins only once."""
        if times.begun is None:
            times.begun = time.perf_counter()
            self._observe("request_queue_time_seconds", times.begun - times.arrived)

    def read(self) -> None:
        """A step's tokens are here."""
        self.now = time.perf_counter()

    def tokens(self, times: Times, before: float | None, count: int) -> None:
        """What one row drew in the step at hand. `before`: when its last token was read; None for the first."""
        if not count:
            return
        times.tokens += count
        if before is not None:
            self._gaps[before] += 1
        elif times.first is None:
            times.first = self.now
            self._observe("time_to_first_token_seconds", self.now - times.arrived)
        if count > 1:  # which came together
            self._gaps[self.now] += count - 1

    def flush(self) -> None:
        """Observes what `tokens` gathered of one step."""
        for before, count in self._gaps.items():
            self.histograms["inter_token_latency_seconds"].add(self.now - before, count)
        self._gaps.clear()

    def end(self, times: Times, reason: str, prompt_tokens: int) -> None:
        """The whole request is over."""
        self.ended[reason] += 1
        now = time.perf_counter()
        self._observe("e2e_request_latency_seconds", now - times.arrived)
        self._observe("request_prompt_tokens", prompt_tokens)
        self._observe("request_generation_tokens", times.tokens)
        if times.first is not None and times.begun is not None:
            self._observe("request_prefill_time_seconds", times.first - times.begun)
            self._observe("request_decode_time_seconds", now - times.first)

    def _observe(self, name: str, value: float) -> None:
        self.histograms[name].add(value)
