"""OpenTelemetry spans (--otlp-traces-endpoint): one for each request that generates, with OpenTelemetry's gen_ai names, as a child of the
client's own span where it sent a traceparent. Needs the extra `otel`; imported only when asked for.
"""

from functools import cache

from opentelemetry import trace as otel
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxllm import __version__
from serving.trace import Trace


def start(endpoint: str) -> None:
    """Spans go to `endpoint` from now on, in batches, from a thread of their own."""
    provider = TracerProvider(resource=Resource.create({"service.name": "jaxllm"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    otel.set_tracer_provider(provider)


@cache
def _tracer() -> otel.Tracer:
    return otel.get_tracer("jaxllm", __version__)


def export(trace: Trace) -> None:
    """The span of a request that is over."""
    parent = TraceContextTextMapPropagator().extract(dict(trace.http.headers))
    params = trace.requests[0].params
    attributes: dict = {
        "gen_ai.request.id": trace.id,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.input_tokens": trace.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": trace.usage.completion_tokens,
        "gen_ai.response.finish_reasons": trace.usage.finish_reasons,
        "http.route": trace.http.url.path,
        "http.request.header.x-request-id": trace.http.state.request_id,
    }
    span = _tracer().start_span("llm_request", parent, SpanKind.SERVER, attributes, start_time=trace.start_ns)
    if not trace.usage.finish_reasons:
        span.set_status(Status(StatusCode.ERROR, trace.end))
    span.end(trace.start_ns + int(trace.seconds * 1e9))
