"""The HTTP application: routes, the API key, and the one error shape whatever goes wrong. A route translates and nothing else.

The engine is given, ready-made. One request runs through it when the application starts, before the socket listens: a load balancer is
refused until then, and /health is 200 from the first answer on, and 503 once the engine is no longer well.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxllm import __version__
from jaxllm.request import Request, SamplingParams
from serving import chat, completions
from serving.options import ServerOptions
from serving.protocol import ApiError, ChatBody, CompletionBody, EngineLike, SamplingBody, check_model, parse
from serving.stream import UNFORESEEN, Answer, ClientGone, error_of, json_response, respond

log = logging.getLogger("jaxllm.server")


def build_app(engine: EngineLike, options: ServerOptions) -> FastAPI:
    """The application that serves `engine`; closing the engine is the caller's."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        start = time.perf_counter()
        await first_request(engine)
        log.info("%-24s %6.2f s", "first request", time.perf_counter() - start)
        yield

    app = FastAPI(title="jaxllm", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(KeyCheck, api_key=options.api_key)
    _add_errors(app)
    _add_facts(app, engine)
    _add_generation(app, engine, options)
    return app


async def first_request(engine: EngineLike) -> None:
    """One token, through everything that a client's request goes through."""
    text = [] if engine.tokenizer is None else engine.tokenizer.encode("Hello")[: engine.max_model_len - 1]
    prompt = text or [0]
    async with aclosing(engine.generate(Request("first-request", tuple(prompt), SamplingParams(max_tokens=1, temperature=0.0)))) as outputs:
        async for _ in outputs:
            pass


def _add_facts(app: FastAPI, engine: EngineLike) -> None:
    created = int(time.time())

    def model_card() -> dict:
        return {
            "id": engine.model_name,
            "object": "model",
            "created": created,
            "owned_by": "jaxllm",
            "root": str(engine.model_path),
            "parent": None,
            "max_model_len": engine.max_model_len,
            "permission": [_permission(engine.model_name, created)],
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card()]})

    @app.get("/v1/models/{name:path}")  # path: a Hub id has a slash
    async def model(name: str) -> Response:
        check_model(engine, name)
        return json_response(model_card())

    @app.get("/health")
    async def health() -> Response:
        if not engine.healthy:
            raise ApiError(503, "The engine has stopped")
        return Response()

    @app.get("/version")
    async def version_route() -> Response:
        return json_response({"version": __version__})


def _permission(model: str, created: int) -> dict:
    return {
        "id": f"modelperm-{hashlib.sha256(model.encode()).hexdigest()[:32]}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def _add_generation(app: FastAPI, engine: EngineLike, options: ServerOptions) -> None:
    # Two servers that answer alike share it: the version and every option that could change an answer.
    fingerprint = f"jaxllm-{__version__}-{hashlib.sha256(repr(engine.config).encode()).hexdigest()[:8]}"
    ignored_fields = IgnoredFields()

    async def answer[Body: SamplingBody](
        http: HttpRequest, kind: type[Body], prepare: Callable[[EngineLike, Body, str], Awaitable[Answer]]
    ) -> Response:
        try:
            _check_content_type(http)
            body, ignored = parse(kind, await http.body())
            check_model(engine, body.model)
            work = await prepare(engine, body, fingerprint)
            response = await respond(
                http, engine, work, stream=bool(body.stream), include_usage=body.include_usage, logged=options.enable_log_requests
            )
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it; nginx's number for the same
        except Exception as error:
            return _told(error_of(error))
        if ignored:
            response.headers["x-jaxllm-ignored-fields"] = ignored_fields.note(ignored, http.url.path)
        return response

    @app.post("/v1/completions")
    async def completions_route(http: HttpRequest) -> Response:
        return await answer(http, CompletionBody, completions.prepare)

    @app.post("/v1/chat/completions")
    async def chat_route(http: HttpRequest) -> Response:
        return await answer(http, ChatBody, chat.prepare)


def _check_content_type(http: HttpRequest) -> None:
    # A web page may post text/plain to a server on its visitor's machine without asking; JSON it may not.
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, f"The body must be sent as Content-Type: application/json, but it came as {kind or 'nothing'}")


class IgnoredFields:
    """Names each unknown field to its sender every time, and to the log once."""

    def __init__(self):
        self._logged: set[str] = set()

    def note(self, names: list[str], path: str) -> str:
        """The header's value: the first 20 names, made safe for a header."""
        safe = [re.sub(r"[^A-Za-z0-9_.-]", "?", name)[:64] for name in names[:20]]
        for name in safe:
            if name not in self._logged and len(self._logged) < 1000:  # a client inventing names must not fill memory or the log
                self._logged.add(name)
                log.warning("%s: unknown field %s ignored (said once)", path, name)
        return ", ".join(safe)


def _add_errors(app: FastAPI) -> None:
    async def api_error(http: HttpRequest, error: Exception) -> Response:
        return _told(error_of(error))

    async def http_error(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = {404: f"There is no route {http.method} {http.url.path}", 405: f"{http.url.path} does not take {http.method}"}
        return _told(ApiError(error.status_code, known.get(error.status_code, str(error.detail))), dict(error.headers or {}))

    async def unforeseen(http: HttpRequest, error: Exception) -> Response:
        # Logged by uvicorn, to which Starlette raises the error again once this is sent.
        return _told(ApiError(500, UNFORESEEN))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unforeseen)


def _told(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    return json_response(error.body, error.status, headers)


class KeyCheck:
    """Refuses what does not carry the key, everywhere but at /health. Without a key everybody is served, whatever they carry."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app = app
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is None or scope["type"] == "lifespan" or scope["path"] == "/health" or _carries(scope, self._key):
            return await self._app(scope, receive, send)
        error = ApiError(401, "The API key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key")
        await _told(error, {"www-authenticate": "Bearer"})(scope, receive, send)


def _carries(scope: Scope, key: bytes) -> bool:
    sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, sent_key = sent.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(sent_key.strip(), key)
