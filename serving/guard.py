"""What every request passes before a route sees it: its id, its key, and the size of its body. Plain ASGI, so that streams stay streams."""

import asyncio
import contextlib
import hashlib
import hmac
import re
from collections.abc import Iterable
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, told

LINGER_S, IDLE_S = 10, 1  # how long a body that is too large is read for nothing, in all and without a byte coming
OPEN = frozenset({"/health", "/ping"})  # what load balancers ask, who carry no key


class RequestIds:
    """Gives every request an id and every answer the header X-Request-Id: the client's own where it sent a sane one."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        sent = _header(scope, b"x-request-id").decode("latin-1")
        request_id = sent if re.fullmatch(r"[\x21-\x7e]{1,128}", sent) else uuid4().hex
        scope["state"]["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("x-request-id", request_id)
            await send(message)

        await self._app(scope, receive, send_named)


class Keys:
    """Refuses what does not carry one of the keys, everywhere but at `open` paths. Without keys everybody is served."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open: frozenset[str] = OPEN):
        self._app, self._open = app, open
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._digests or scope["type"] == "lifespan" or scope["path"] in self._open or self._knows(_sent_key(scope)):
            return await self._app(scope, receive, send)
        message = "The API key is missing or wrong: send it as Authorization: Bearer KEY"
        await told(ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"}))(scope, receive, send)

    def _knows(self, key: bytes) -> bool:
        # Every digest is compared, and in full, so that the time it takes says nothing about any key.
        digest = _digest(key)
        return bool(sum([hmac.compare_digest(digest, known) for known in self._digests]))


class BodyLimit:
    """Refuses a body of more than `limit` bytes: by what it says of itself, or when that many have come."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        said = _header(scope, b"content-length")
        if said.isdigit() and int(said[:20]) > self._limit:
            await _discard(receive)
            return await told(self._error(f"{int(said[:20]):,} bytes"))(scope, receive, send)
        come = 0

        async def counted() -> Message:
            nonlocal come
            message = await receive()
            come += len(message.get("body", b""))
            if come > self._limit:
                await _discard(receive)
                raise self._error("more than that")
            return message

        await self._app(scope, counted, send)

    def _error(self, size: str) -> ApiError:
        # The rest of the body may not have been read, so the connection cannot be used again.
        return ApiError(
            413,
            f"The body may have {self._limit:,} bytes, but it has {size}: send less, or start the server with a larger --max-body-bytes",
            headers={"connection": "close"},
        )


async def _discard(receive: Receive) -> None:
    """Reads what is still coming, for a while: a client that is cut off while it sends may never see the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            more = True
            while more:
                more = (await asyncio.wait_for(receive(), IDLE_S)).get("more_body", False)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _sent_key(scope: Scope) -> bytes:
    """The bearer token, or what Anthropic's clients send as x-api-key."""
    scheme, _, key = _header(scope, b"authorization").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else _header(scope, b"x-api-key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
