"""What is noted of a request when it ends, however it ends: a line in the log (--enable-log-requests), an OpenTelemetry span
(--otlp-traces-endpoint), or nothing."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from starlette.requests import Request as HttpRequest

from jaxllm.request import ConfigError, Request
from serving.context import ClientGone
from serving.options import ServerOptions
from serving.usage import Usage

log = logging.getLogger("jaxllm.server")


class Trace:
    """Calls each of `sinks` once, with itself."""

    def __init__(self, http: HttpRequest, answer_id: str, requests: Sequence[Request], usage: Usage, sinks: Sequence[Callable]):
        self.http, self.id, self.requests, self.usage = http, answer_id, requests, usage
        self.start_ns, self.end = time.time_ns(), "-"
        self._begin, self._sinks = time.perf_counter(), list(sinks)
        self.seconds = 0.0

    @classmethod
    def of(cls, http: HttpRequest, options: ServerOptions, answer_id: str, requests: Sequence[Request], usage: Usage) -> "Trace":
        sinks: list[Callable] = [write_line] if options.enable_log_requests else []
        if options.otlp_traces_endpoint is not None:
            from serving.spans import export

            sinks.append(export)
        return cls(http, answer_id, requests, usage, sinks)

    def done(self, error: BaseException | None = None) -> None:
        """The request is over. Only the first call counts."""
        self.seconds = time.perf_counter() - self._begin
        self.end = ",".join(self.usage.finish_reasons) or "-"
        if isinstance(error, ClientGone | asyncio.CancelledError):
            self.end = "client gone"
        elif error is not None:
            self.end = f"{type(error).__name__}: {error}"
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink(self)


def start_spans(endpoint: str) -> None:
    """Gets ready to send spans there. Raises ConfigError if what it needs is not installed."""
    try:
        from serving import spans
    except ImportError as error:
        raise ConfigError(f"--otlp-traces-endpoint needs OpenTelemetry: pip install 'jaxllm[otel]' ({error})") from None
    spans.start(endpoint)


def write_line(trace: Trace) -> None:
    log.info(
        "%s %s %s: %d prompt tokens, %d generated, %s, %.3f s, %s",
        trace.http.state.request_id,
        trace.id,
        trace.http.url.path,
        sum(len(request.prompt_token_ids) for request in trace.requests),
        trace.usage.completion_tokens,
        trace.end,
        trace.seconds,
        trace.requests[0].params,
    )
