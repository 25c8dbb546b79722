"""A server that answers without a model: as many tokens as asked, at once or at a fixed pace, an event a write.

    python -m bench.null_server --port 8001 --step-ms 10

It shows what a client alone can do (`bench.serve --ceiling`), and gives tests a stream whose times are known. All running answers
get their next event in one turn, as a batch's would.
"""

import argparse
import asyncio
import json
import re
from typing import cast

from bench.client import loop_factory

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_WANTED = re.compile(rb'"max_(?:completion_)?tokens":\s*(\d+)')
# The size of what real servers send for a token.
_START = {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 1700000000, "model": "null", "system_fingerprint": "null"}


def _chunk(event: str) -> bytes:
    data = f"data: {event}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(chat: bool, text: str, end: str | None = None) -> bytes:
    said = {"delta": {"content": text}} if chat else {"text": text}
    return _chunk(json.dumps(_START | {"choices": [{"index": 0, **said, "logprobs": None, "finish_reason": end}], "usage": None}))


_ROLE = _chunk(json.dumps(_START | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}))
_EVENTS = {chat: (_event(chat, " a"), _event(chat, " a", "length")) for chat in (False, True)}


def _body(status: str, body: dict) -> bytes:
    text = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text


class NullServer:
    """Running answers, and the turn that gives each its next token. step: seconds from one turn to the next."""

    def __init__(self, step: float = 0.0, vocab: int = 2**31):
        self.step, self.vocab = step, vocab
        self.running: dict[_Connection, int] = {}
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._turning: asyncio.Task[None] | None = None

    async def listen(self, port: int = 0) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port, backlog=4096)
        return self._server

    async def close(self) -> None:
        """Ends every connection and answer."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()
        if self._turning is not None:
            self._turning.cancel()
            await asyncio.wait([self._turning])
        await asyncio.sleep(0.01)  # a transport closes in the turns after

    def add(self, connection: "_Connection", tokens: int) -> None:
        self.running[connection] = tokens
        if self._turning is None or self._turning.done():
            self._turning = asyncio.create_task(self._turn())

    async def _turn(self) -> None:
        while self.running:
            await asyncio.sleep(self.step)
            for connection, left in list(self.running.items()):
                connection.token(last=left == 1)
                if left == 1:
                    self.running.pop(connection, None)
                elif connection in self.running:
                    self.running[connection] = left - 1


class _Connection(asyncio.Protocol):
    def __init__(self, server: NullServer):
        self._server, self._buffer, self._chat, self._usage = server, b"", False, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.running.pop(self, None)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.I)
        if not found or len(body) < (int(length[1]) if length else 0):
            return
        self._buffer = b""
        self._answer(head.split(b" ", 2)[1].decode(), body)

    def _answer(self, path: str, body: bytes) -> None:
        wanted = _WANTED.search(body)
        if path.endswith("/models"):
            self._transport.write(_body("200 OK", {"object": "list", "data": [{"id": "null", "object": "model"}]}))
        elif not path.endswith("/completions") or wanted is None:
            self._transport.write(_body("400 Bad Request", {"error": {"message": "the null server wants completions with max_tokens"}}))
        else:
            self._chat = path.endswith("/chat/completions")
            tokens = int(wanted[1])
            prompt = body.count(b",", body.find(b'"prompt"'), body.find(b"]")) + 1 if b'"prompt":[' in body else body.count(b" ") + 1
            usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
            self._usage = _chunk(json.dumps(_START | {"choices": [], "usage": usage}))
            self._transport.write(HEAD + (_ROLE if self._chat else b""))
            self._server.add(self, tokens)

    def token(self, last: bool) -> None:
        event, end = _EVENTS[self._chat]
        self._transport.write(end + self._usage + _chunk("[DONE]") + b"0\r\n\r\n" if last else event)


async def _serve(port: int, step: float) -> None:
    server = await NullServer(step).listen(port)
    print(f"ready: http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(prog="python -m bench.null_server", description="Answers at once, without a model.")
    made.add_argument("--port", type=int, default=0)
    made.add_argument("--step-ms", type=float, default=0.0, help="time between the tokens of an answer (default: none)")
    args = made.parse_args(argv)
    with asyncio.Runner(loop_factory=loop_factory()[0]) as runner:
        runner.run(_serve(args.port, args.step_ms / 1e3))


if __name__ == "__main__":
    main()
