"""uvicorn's HTTP connection, with the limits that it leaves to a proxy: the size of a request's head, and the time it may take to arrive.

What is refused here never reaches the application, so the answer is written by hand; its body has the same shape as every other error.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.errors import ApiError, encode

LINGER_S = 10  # how long a client that was refused may go on sending for nothing: most look at answers only when they have sent all
MAX_HEAD = 64 * 1024  # bytes of request line and headers: what proxies allow, and more than any client sends
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class Connection(HttpToolsProtocol):
    """One client's connection. `receive_timeout`: seconds that a request may take from its first byte, or from connecting, to its last."""

    receive_timeout: float = 60

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head: int | None = 0  # bytes of the head so far; None once it is complete
        self._refusal: ApiError | None = None
        self._refused = False
        self._clock: asyncio.TimerHandle | None = None
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and self._head > MAX_HEAD and not self.transport.is_closing():
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._clock is None:
            self._start_clock()

    def on_headers_complete(self) -> None:
        self._head = None
        if sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > MAX_HEAD:
            self._refusal = _too_large()
            raise ValueError("headers too large")  # which ends the parsing, and comes back as send_400_response
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_clock()
        self._head = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError(400, "What was sent is not an HTTP request"))

    def _start_clock(self) -> None:
        self._clock = self.loop.call_later(self.receive_timeout, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if answering or self.pipeline:  # an answer that does not wait for the rest of the body, or one that runs before this request
            return
        self._refuse(ApiError(408, f"The request did not arrive within {self.receive_timeout:g} s"))

    def _refuse(self, error: ApiError) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        body = encode(error.body).encode()
        head = f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        if not self.transport.can_write_eof():  # TLS
            return self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:  # who waits for the rest of this request need not
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        # Closed at once, the next byte that comes would be met by a reset, and whoever sends it might never see the answer.
        self.transport.write_eof()
        self.flow.resume_reading()  # or what is still being sent would stand before a closed door
        self.loop.call_later(LINGER_S, self.transport.close)


def _too_large() -> ApiError:
    return ApiError(431, f"The request's headers are longer than the {MAX_HEAD} bytes that this server reads")
