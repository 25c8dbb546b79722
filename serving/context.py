"""What all routes of one application share, and the way of a POST through it: body read, work done, errors told, unknown fields named."""

import asyncio
import hashlib
import inspect
import logging
import re
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm import __version__
from jaxllm.request import ConfigError
from serving.errors import ApiError, error_of, told
from serving.memory import LocalMemory, Memory
from serving.options import ServerOptions
from serving.parsers.table import Parsers, choose
from serving.protocol import Body, EngineLike, check_model, parse

log = logging.getLogger("jaxllm.server")


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


def parsers_of(engine: EngineLike, options: ServerOptions) -> Parsers:
    """What this model's answers are read with. Raises ConfigError where there is none that was asked for."""
    found = choose(options.tool_call_parser, options.reasoning_parser, {} if engine.tokenizer is None else engine.tokenizer.chat_templates)
    if options.enable_auto_tool_choice and found.tool is None:
        raise ConfigError(
            "--enable-auto-tool-choice: this model's chat template has no form of calls that is known; name one with --tool-call-parser"
        )
    return found


class Context:
    """The engine is the caller's, and closed by it. memory: what outlives a request, kept where all API processes find it.

    parsers: what answers are read with. Raises ConfigError where there is none that was asked for.
    """

    def __init__(self, engine: EngineLike, options: ServerOptions, memory: Memory | None = None):
        self.engine, self.options, self.memory = engine, options, memory or LocalMemory()
        # Two servers that answer alike share it: the version and every option that could change an answer.
        self.fingerprint = f"jaxllm-{__version__}-{hashlib.sha256(repr(engine.config).encode()).hexdigest()[:8]}"
        self.parsers = parsers_of(engine, options)
        self.deadline = asyncio.Event()  # the server stops, and what still runs has had its time
        self._ignored = _IgnoredFields()

    async def post[B: Body](self, http: HttpRequest, kind: type[B], work: Callable[[B], Awaitable[Response]]) -> Response:
        """The response of `work` to the body, or what went wrong."""
        try:
            _check_content_type(http)
            body, ignored = parse(kind, await http.body(), self.options.strict)
            check_model(self.engine, body.model)
            response = await work(body)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it; nginx's number for the same
        except Exception as error:
            return told(error_of(error))
        if ignored:
            response.headers["x-jaxllm-ignored-fields"] = self._ignored.note(ignored, http.url.path)
        return response

    async def until_gone[T](self, http: HttpRequest, work: Awaitable[T]) -> T:
        """The result of `work`. Raises ClientGone, with `work` cancelled and finished, as soon as the client closes its connection, and
        ApiError when the server stops and can wait no longer."""
        task, watch, late = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http)), asyncio.ensure_future(self.deadline.wait())
        try:
            await asyncio.wait((task, watch, late), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ApiError(503, "The server is stopping, and the answer was not complete in time") if late.done() else ClientGone
        finally:
            for each in (task, watch, late):
                each.cancel()
            await asyncio.gather(task, watch, late, return_exceptions=True)


async def settled[T](value: T | Awaitable[T]) -> T:
    """What an engine in this process answers at once, and one in another later."""
    return await value if inspect.isawaitable(value) else value  # pyright: ignore[reportReturnType]


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _check_content_type(http: HttpRequest) -> None:
    # A web page may post text/plain to a server on its visitor's machine without asking; JSON it may not.
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, f"The body must be sent as Content-Type: application/json, but it came as {kind or 'nothing'}")


class _IgnoredFields:
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
