"""The HTTP application: what every request passes, the routes, and the one error shape whatever goes wrong.

The engine is given, ready-made. One request runs through it when the application starts, before the socket listens: a load balancer is
refused until then, and /health is 200 from the first answer on, and 503 once the engine is no longer well.
"""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm import __version__
from jaxllm.request import Request, SamplingParams
from serving import openapi
from serving.context import Context
from serving.errors import UNFORESEEN, ApiError, error_of, told
from serving.guard import OPEN, BodyLimit, Keys, RequestIds
from serving.memory import Memory
from serving.options import ServerOptions
from serving.protocol import EngineLike
from serving.routes import admin, chat, completions, embeddings, facts, messages, page, responses, tokens
from serving.trace import start_spans

log = logging.getLogger("jaxllm.server")

ROUTES = (facts, completions, chat, responses, messages, embeddings, tokens)


def build_app(engine: EngineLike, options: ServerOptions, memory: Memory | None = None) -> FastAPI:
    """The application that serves `engine`; closing the engine is the caller's. Its context is `app.state.context`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        start = time.perf_counter()
        await first_request(engine)
        log.info("%-24s %6.2f s", "first request", time.perf_counter() - start)
        yield

    app = FastAPI(title="jaxllm", version=__version__, lifespan=lifespan, redirect_slashes=False, redoc_url=None)
    app.state.context = context = Context(engine, options, memory)
    if options.otlp_traces_endpoint is not None:
        start_spans(options.otlp_traces_endpoint)
    _add_guards(app, options)
    _add_errors(app)
    for module in (*ROUTES, *(() if options.disable_page else (page,)), *((admin,) if options.enable_admin_routes else ())):
        module.add(app, context)
    openapi.install(app)
    return app


async def first_request(engine: EngineLike) -> None:
    """One token, through everything that a client's request goes through."""
    text = [] if engine.tokenizer is None else engine.tokenizer.encode("Hello")[: engine.max_model_len - 1]
    request = Request("first-request", tuple(text or [0]), SamplingParams(max_tokens=1, temperature=0.0))
    async with aclosing(engine.generate(request)) as outputs:
        async for _ in outputs:
            pass


def _add_guards(app: FastAPI, options: ServerOptions) -> None:
    """The last one added is the first one met."""
    app.add_middleware(BodyLimit, limit=options.max_body_bytes)
    app.add_middleware(Keys, keys=options.keys(), open=OPEN if options.disable_page else OPEN | page.OPEN)
    if options.allowed_origins:  # outside the keys: a browser asks for leave without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.allowed_origins),
            allow_methods=list(options.allowed_methods),
            allow_headers=list(options.allowed_headers),
            allow_credentials=options.allow_credentials,
            expose_headers=["x-request-id", "x-jaxllm-ignored-fields"],
        )
    app.add_middleware(RequestIds)


def _add_errors(app: FastAPI) -> None:
    async def api_error(http: HttpRequest, error: Exception) -> Response:
        return told(error_of(error))

    async def http_error(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = {404: f"There is no route {http.method} {http.url.path}", 405: f"{http.url.path} does not take {http.method}"}
        message = known.get(error.status_code, str(error.detail))
        return told(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    async def unforeseen(http: HttpRequest, error: Exception) -> Response:
        # Logged by uvicorn, to which Starlette raises the error again once this is sent.
        return told(ApiError(500, UNFORESEEN))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unforeseen)
