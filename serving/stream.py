"""From engine to socket: runs an answer's requests together, and writes it as one JSON body or as server-sent events.

A route makes an `Answer` (see routes/); everything else about answering is here: several engine requests merged into one stream, one event
a token, errors after the 200, and a client that vanishes, whose requests are aborted at once by closing their generators. What an event
says is the Answer's business; this module does not look inside.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from msgspec.structs import replace
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxllm.request import Completion, Output, Request
from serving.context import ClientGone, Context
from serving.errors import ApiError, error_of, json_response
from serving.protocol import EngineLike
from serving.trace import Trace
from serving.usage import Usage

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
    async def whole(self, outputs: list[Output], usage: Usage) -> dict: ...
    def first(self, i: int, output: Output) -> bytes: ...  # events before prompt i's first token; may be none
    def event(self, i: int, completion: Completion, usage: Usage) -> bytes: ...
    async def last(self, usage: Usage) -> bytes: ...  # events after the last token
    def failed(self, error: ApiError) -> bytes: ...  # events that take the place of all that would have followed


async def respond(http: HttpRequest, context: Context, answer: Answer, *, stream: bool) -> Response:
    """The HTTP response to `answer`: complete, or a stream whose first event is at hand, so that an error before it has its own status."""
    usage = Usage(len(answer.requests))
    trace = Trace.of(http, context.options, answer.id, answer.requests, usage)
    try:
        if not stream:
            body = await context.until_gone(http, _whole(context.engine, answer, usage))
            trace.done()
            return json_response(body)
        events = _events(context.engine, answer, usage)
        first = await context.until_gone(http, anext(events))
        return EventStream(context, http, answer, first, events, trace)
    except BaseException as error:
        trace.done(error)
        raise


async def gather(http: HttpRequest, context: Context, requests: Sequence[Request]) -> list[Output]:
    """What each request came to, complete, in their order."""
    return await context.until_gone(http, _gather(context.engine, requests))


async def _gather(engine: EngineLike, requests: Sequence[Request]) -> list[Output]:
    streams: list = [engine.generate(request) for request in requests]
    parts: list[list[Output]] = [[] for _ in requests]
    async with aclosing(_checked(merge(streams))) as outputs:
        async for i, output in outputs:
            parts[i].append(output)
    return [joined(outputs) for outputs in parts]


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


async def _checked(merged: AsyncGenerator[tuple[int, Output], None]) -> AsyncGenerator[tuple[int, Output], None]:
    """`merged`. Raises for a choice that ended in an error: nobody should take it for an answer."""
    async with aclosing(merged) as outputs:
        async for i, output in outputs:
            for completion in output.outputs:
                if completion.finish_reason == "error":
                    raise ApiError(500, str(completion.stop_reason or "The engine failed while it answered this request"))
            yield i, output


async def _whole(engine: EngineLike, answer: Answer, usage: Usage) -> dict:
    parts: list[list[Output]] = [[] for _ in answer.requests]
    async with aclosing(_checked(merge(answer.streams(engine)))) as outputs:
        async for i, output in outputs:
            usage.prompt(i, output)
            for completion in output.outputs:
                usage.count(completion)
            parts[i].append(output)
    return await answer.whole([joined(outputs) for outputs in parts], usage)


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


async def _events(engine: EngineLike, answer: Answer, usage: Usage) -> AsyncGenerator[bytes, None]:
    """The answer's events, together those that came together: they are written at once, and a write costs more than an event does."""
    begun = [False] * len(answer.requests)
    async with aclosing(_checked(merge(answer.streams(engine)))) as outputs:
        async for i, output in outputs:
            usage.prompt(i, output)
            events = [] if begun[i] else [answer.first(i, output)]
            begun[i] = True
            for completion in output.outputs:
                usage.count(completion)  # before its event, which may say the usage so far
                if completion.token_ids or completion.text or completion.finish_reason is not None:
                    events.append(answer.event(i, completion, usage))
            if data := b"".join(events):
                yield data
    yield await answer.last(usage)


class EventStream(Response):
    """Writes events as they come. An error after the 200 is one more event; a vanished client closes `events`: its requests are aborted."""

    def __init__(
        self, context: Context, http: HttpRequest, answer: Answer, first: bytes, events: AsyncGenerator[bytes, None], trace: Trace
    ):
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self._context, self._http, self._answer = context, http, answer
        self._first, self._events, self._trace = first, events, trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: BaseException | None = None
        try:
            async with aclosing(self._events):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    await self._context.until_gone(self._http, self._write(send))
                except Exception as caught:
                    error = caught
                    if not isinstance(caught, ClientGone):
                        await send({"type": "http.response.body", "body": self._answer.failed(error_of(caught)), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._trace.done(error)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
