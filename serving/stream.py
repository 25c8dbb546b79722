"""From engine to socket: runs an answer's requests together, and writes it as one JSON body or as server-sent events.

A route makes an `Answer` (completions.py, chat.py); everything else about answering is here: several engine requests merged into one
stream, one event a token, usage, errors after the 200, and a client that vanishes, whose requests are aborted at once by closing their
generators. What an event says is the Answer's business; this module does not look inside.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxllm.request import Completion, EngineDeadError, Output, Request, RequestError
from serving.protocol import ApiError, EngineLike

log = logging.getLogger("jaxllm.server")

# Compact, and text as UTF-8 rather than \u escapes. allow_nan=False: NaN is not JSON, and no client could read it.
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

UNFORESEEN = "The server failed to answer this request; its log says why"
DONE = b"data: [DONE]\n\n"
SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # asks nginx not to gather events
}


class Answer(Protocol):
    """What one HTTP request wants from the engine, and how to say what came: one Request a prompt, each with its n choices."""

    @property
    def id(self) -> str: ...
    @property
    def requests(self) -> Sequence[Request]: ...
    def streams(self, engine: EngineLike) -> list[AsyncGenerator[Output, None]]: ...
    def whole(self, outputs: list[Output]) -> dict: ...
    def first(self, i: int, output: Output) -> bytes: ...  # events before prompt i's first token; may be none
    def event(self, i: int, completion: Completion) -> bytes: ...
    def usage_event(self, usage: dict) -> bytes: ...


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class Usage:
    """Tokens of one answer, counted as its outputs pass by."""

    def __init__(self, prompts: int):
        self._prompt, self._cached = [0] * prompts, [0] * prompts
        self.completion_tokens = 0
        self.finish_reasons: list[str] = []

    def add(self, i: int, output: Output) -> None:
        self._prompt[i] = len(output.prompt_token_ids)
        self._cached[i] = max(self._cached[i], output.num_cached_tokens)
        for completion in output.outputs:
            self.completion_tokens += len(completion.token_ids)
            if completion.finish_reason is not None:
                self.finish_reasons.append(completion.finish_reason)

    @property
    def prompt_tokens(self) -> int:
        return sum(self._prompt)

    def body(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }


class Frame:
    """The part of every event that never changes, made once an answer, so that a token costs one f-string and not a walk through a dict."""

    def __init__(self, head: dict, include_usage: bool):
        self._open = f'data: {encode(head)[:-1]},"choices":['
        self._close = '],"usage":null}\n\n' if include_usage else "]}\n\n"  # OpenAI sends the null while usage is still to come

    def choice(self, json_text: str) -> bytes:
        return f"{self._open}{json_text}{self._close}".encode()

    def usage(self, usage: dict) -> bytes:
        return f'{self._open}],"usage":{encode(usage)}}}\n\n'.encode()


def json_response(body: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, media_type="application/json")


def error_of(error: Exception) -> ApiError:
    """What the client is told about `error`. What we did not foresee is logged here, and its text stays inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error) or "The engine has stopped")
    log.error("request failed", exc_info=error)
    return ApiError(500, UNFORESEEN)


def _error_event(error: Exception) -> bytes:
    return f"data: {encode(error_of(error).body)}\n\n".encode()


async def respond(http: HttpRequest, engine: EngineLike, answer: Answer, *, stream: bool, include_usage: bool, logged: bool) -> Response:
    """The HTTP response to `answer`: complete, or a stream whose first event is at hand, so that an error before it has its own status."""
    usage = Usage(len(answer.requests))
    trace = _Trace(http, answer, usage) if logged else None
    try:
        if not stream:
            body = await until_gone(http.receive, _whole(engine, answer, usage))
            if trace:
                trace.done()
            return json_response(body)
        events = _events(engine, answer, usage, include_usage)
        first = await until_gone(http.receive, anext(events))
        return EventStream(first, events, trace)
    except BaseException as error:
        if trace:
            trace.done(error)
        raise


async def until_gone[T](receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`. Raises ClientGone, with `work` cancelled and finished, as soon as the client closes its connection."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge(streams: Sequence[AsyncGenerator[Output, None]]) -> AsyncGenerator[tuple[int, Output], None]:
    """(which stream, its output), as they come. The first error ends all; closing this closes every stream."""
    if len(streams) == 1:  # no queue and no task for the usual case
        async with aclosing(streams[0]) as only:
            async for output in only:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(queue, i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            i, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield i, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(queue: asyncio.Queue, i: int, stream: AsyncGenerator[Output, None]) -> None:
    try:
        async with aclosing(stream):
            async for output in stream:
                queue.put_nowait((i, output))
        queue.put_nowait((i, None))
    except Exception as error:
        queue.put_nowait((i, error))


async def _outputs(engine: EngineLike, answer: Answer, usage: Usage) -> AsyncGenerator[tuple[int, Output], None]:
    """Every output of every prompt, counted. Raises for a choice that ended in an error: nobody should take it for an answer."""
    async with aclosing(merge(answer.streams(engine))) as outputs:
        async for i, output in outputs:
            usage.add(i, output)
            if any(completion.finish_reason == "error" for completion in output.outputs):
                raise ApiError(500, "The engine failed while it answered this request")
            yield i, output


async def _whole(engine: EngineLike, answer: Answer, usage: Usage) -> dict:
    parts: list[list[Output]] = [[] for _ in answer.requests]
    async with aclosing(_outputs(engine, answer, usage)) as outputs:
        async for i, output in outputs:
            parts[i].append(output)
    return answer.whole([joined(outputs) for outputs in parts]) | {"usage": usage.body()}


def joined(outputs: list[Output]) -> Output:
    """One request's pieces put together: each index once, in order, with all of its text, tokens and logprobs."""
    pieces: dict[int, list[Completion]] = {}
    for output in outputs:
        for completion in output.outputs:
            pieces.setdefault(completion.index, []).append(completion)
    prompt_logprobs = next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None)
    whole = tuple(_join_completion(pieces[index]) for index in sorted(pieces))
    return replace(outputs[-1], outputs=whole, prompt_logprobs=prompt_logprobs)


def _join_completion(pieces: list[Completion]) -> Completion:
    end = pieces[-1]
    logprobs = None
    if any(piece.logprobs is not None for piece in pieces):
        logprobs = tuple(entry for piece in pieces for entry in piece.logprobs or ())
    token_ids = tuple(token for piece in pieces for token in piece.token_ids)
    return replace(end, text="".join(piece.text for piece in pieces), token_ids=token_ids, logprobs=logprobs)


async def _events(engine: EngineLike, answer: Answer, usage: Usage, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """The answer's events, as many at a time as one output gave; all but [DONE], which the writer adds whatever happens."""
    begun = [False] * len(answer.requests)
    async with aclosing(_outputs(engine, answer, usage)) as outputs:
        async for i, output in outputs:
            events = [answer.event(i, c) for c in output.outputs if c.token_ids or c.text or c.finish_reason is not None]
            if not begun[i]:
                begun[i] = True
                events.insert(0, answer.first(i, output))
            if data := b"".join(events):
                yield data
    if include_usage:
        yield answer.usage_event(usage.body())


class EventStream(Response):
    """Writes events as they come. An error after the 200 is one more event; a vanished client closes `events`: its requests are aborted."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], trace: "_Trace | None" = None):
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self._first, self._events, self._trace = first, events, trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: BaseException | None = None
        try:
            async with aclosing(self._events):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await until_gone(receive, self._write(send))
        except BaseException as caught:
            error = caught
            if not isinstance(caught, ClientGone):
                raise
        finally:
            if self._trace:
                self._trace.done(error)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            if self._trace:
                self._trace.done(error)
            await send({"type": "http.response.body", "body": _error_event(error), "more_body": True})
        await send({"type": "http.response.body", "body": DONE})


class _Trace:
    """`--enable-log-requests`: one line for each request, written when it ends."""

    def __init__(self, http: HttpRequest, answer: Answer, usage: Usage):
        self._path, self._answer, self._usage, self._start = http.url.path, answer, usage, time.perf_counter()
        self._written = False

    def done(self, error: BaseException | None = None) -> None:
        if self._written:
            return
        self._written = True
        end = ",".join(self._usage.finish_reasons) or "-"
        if isinstance(error, ClientGone | asyncio.CancelledError):
            end = "client gone"
        elif error is not None:
            end = f"{type(error).__name__}: {error}"
        log.info(
            "%s %s: %d prompt tokens, %d generated, %s, %.3f s, %s",
            self._answer.id,
            self._path,
            sum(len(request.prompt_token_ids) for request in self._answer.requests),
            self._usage.completion_tokens,
            end,
            time.perf_counter() - self._start,
            self._answer.requests[0].params,
        )
