"""GET /metrics: the engine's figures as Prometheus reads them, with vLLM's names under `jaxllm:`."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxllm.request import Histogram, Stats

__all__ = ["CONTENT_TYPE", "text"]

GAUGES = {
    "num_requests_running": ("Sequences that hold a row.", lambda s: s.running),
    "num_requests_waiting": ("Sequences that wait for a row or for pages.", lambda s: s.waiting),
    "kv_cache_usage_perc": ("Fraction of the cache's pages that running sequences hold.", lambda s: s.held / s.pages),
}
COUNTERS = {
    "prompt_tokens": ("Prompt tokens of all requests taken.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.generation_tokens),
    "prompt_tokens_cached": ("Prompt tokens that were found in the cache.", lambda s: s.cached_tokens),
    "prefix_cache_queries": ("Prompt tokens that were looked for in the cache.", lambda s: s.prompt_tokens),
    "prefix_cache_hits": ("Prompt tokens that were found in the cache.", lambda s: s.cached_tokens),
    "num_preemptions": ("Times a sequence gave its pages back to be computed again.", lambda s: s.preemptions),
    "admission_rejections": ("Requests that the full queue turned away.", lambda s: s.ended.get("refused", 0)),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival at the engine to its first token.",
    "inter_token_latency_seconds": "Between two tokens of one sequence.",
    "e2e_request_latency_seconds": "From a request's arrival at the engine to its end.",
    "request_queue_time_seconds": "From a request's arrival at the engine to its first step.",
    "request_prefill_time_seconds": "From a request's first step to its first token.",
    "request_decode_time_seconds": "From a request's first token to its end.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Tokens generated for a request.",
}
ENDINGS = ("stop", "length", "abort", "error")


def text(stats: Stats, model: str) -> bytes:
    """The exposition of `stats`."""
    return generate_latest(_Figures(stats, model))  # pyright: ignore[reportArgumentType] (it wants no more than `collect`)


@dataclass
class _Figures(Collector):
    stats: Stats
    model: str

    def collect(self) -> Iterator[Metric]:
        labels, values = ["model_name"], [self.model]
        for name, (what, figure) in GAUGES.items():
            gauge = GaugeMetricFamily(f"jaxllm:{name}", what, labels=labels)
            gauge.add_metric(values, figure(self.stats))
            yield gauge
        for name, (what, figure) in COUNTERS.items():
            counter = CounterMetricFamily(f"jaxllm:{name}", what, labels=labels)
            counter.add_metric(values, figure(self.stats))
            yield counter
        ended = CounterMetricFamily("jaxllm:request_success", "Requests that ended, by how.", labels=[*labels, "finished_reason"])
        for reason in ENDINGS:
            ended.add_metric([*values, reason], self.stats.ended.get(reason, 0))
        yield ended
        for name, what in HISTOGRAMS.items():
            if (histogram := self.stats.histograms.get(name)) is not None:
                family = HistogramMetricFamily(f"jaxllm:{name}", what, labels=labels)
                family.add_metric(values, _buckets(histogram), histogram.total)
                yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """(upper bound, observations up to it), as Prometheus counts them."""
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
