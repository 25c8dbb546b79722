"""The engine in a process of its own: `python -m serving.engine_process ADDRESS`, its EngineConfig as JSON on stdin.

One thread, one loop: a turn of the core, then whatever the API processes sent. No lock and no interpreter is shared with
HTTP, so that a slow client or a long prompt to encode never delays the device. It ends when stdin does, which is when
the process that started it closes it or dies, and with a traceback in the log and status 1 if a step fails.
"""

import gc
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import msgspec
import zmq

from jaxllm.config import EngineConfig
from jaxllm.core import Refusal
from jaxllm.engine import make_core, profile
from jaxllm.loading import Loaded, load_engine_parts
from jaxllm.request import JaxllmError, Output, OverloadedError, Request, RequestError
from serving import wire
from serving.cli import set_up_logging
from serving.log_line import LOG_S, LogLine
from serving.memory import Store

log = logging.getLogger("jaxllm")


class Service:
    """A core that listens to API processes. A request is known by its sender and its id together."""

    def __init__(self, config: EngineConfig, parts: Loaded, socket: zmq.Socket):
        self._core = make_core(config, parts)
        self._store = Store()
        self._line = None if config.disable_log_stats else LogLine()
        self._parts, self._name, self._socket = parts, config.served_model_name or parts.name, socket
        self._senders: dict[str, tuple[bytes, str]] = {}
        self._out: dict[bytes, list[wire.Piece]] = {}

    def serve(self, until: int) -> None:
        """Serves until the file descriptor `until` can be read, which is its end."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(until, zmq.POLLIN)
        busy = False
        while True:
            ready = dict(poller.poll(0 if busy else LOG_S * 1000))
            if until in ready:
                return
            if self._socket in ready:
                self._read()
            busy = self._core.turn()
            self._flush()
            if self._line is not None and self._line.due() and (text := self._line.text(self._core.stats())):
                log.info("%s", text)

    def _read(self) -> None:
        while True:
            try:
                sender, message = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            match wire.decode_question(message):
                case wire.Add(request):
                    self._add(sender, request)
                case wire.Abort(request_id):
                    self._core.abort(_key(sender, request_id))
                case question:
                    self._send(sender, self._reply(question))

    def _reply(self, question: wire.Question) -> wire.Reply:
        match question:
            case wire.Ask():
                p = self._parts
                return wire.Hello(self._name, p.path, p.default_params, self._core.limits, self._core.stats())
            case wire.Recall(key):
                return wire.Recalled(self._store.recall(key))
            case wire.Keep(key, value):
                self._store.keep(key, value)
            case wire.Forget():
                self._core.forget()
            case wire.Profile(folder):
                try:
                    profile(folder)
                except RuntimeError as error:
                    return wire.Done(str(error))
        return wire.Done()

    def _add(self, sender: bytes, request: Request) -> None:
        key = _key(sender, request.id)
        try:
            if key in self._senders:
                raise RequestError(f"request id {request.id!r} is already running", "request_id")
            self._core.add(replace(request, id=key), self._hear)
            self._senders[key] = sender, request.id
        except RequestError as error:
            self._send(sender, wire.Refused(request.id, str(error), error.param))
        except OverloadedError as error:
            self._send(sender, wire.Refused(request.id, str(error), None, overloaded=True))

    def _hear(self, output: Output | Refusal) -> None:
        if isinstance(output, Refusal):
            sender, request_id = self._senders.pop(output.request_id)
            self._send(sender, wire.Refused(request_id, str(output.error), output.error.param))
            return
        sender, request_id = self._senders.pop(output.request_id) if output.finished else self._senders[output.request_id]
        logprobs = None if output.prompt_logprobs is None else list(output.prompt_logprobs)
        piece = wire.Piece(request_id, output.outputs, output.finished, output.num_cached_tokens, logprobs, output.embedding)
        self._out.setdefault(sender, []).append(piece)

    def _flush(self) -> None:
        for sender, pieces in self._out.items():
            self._send(sender, wire.Pieces(pieces))
        self._out.clear()

    def _send(self, sender: bytes, message: msgspec.Struct) -> None:
        self._socket.send_multipart((sender, wire.encode(message)))


def _key(sender: bytes, request_id: str) -> str:
    return f"{sender.hex()}:{request_id}"


def main(address: str, load: Callable[[EngineConfig], Loaded] = load_engine_parts) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the process that started this one decides
    set_up_logging()
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    loaded = threading.Event()
    threading.Thread(target=_leave_if_orphaned, args=(sys.stdin.fileno(), loaded), daemon=True).start()
    try:
        parts = load(config)
    except JaxllmError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return 1
    loaded.set()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.set_hwm(0)  # an API process that falls behind is its clients' loss, not a reason to drop or to wait
        socket.linger = 0
        socket.bind(address)
        try:
            gc.collect()
            gc.freeze()  # what was loaded lives to the end: the collector need not walk it again and again
            Service(config, parts, socket).serve(sys.stdin.fileno())
        except Exception:
            log.exception("the engine stopped")
            return 1
    return 0


def _leave_if_orphaned(stdin: int, loaded: threading.Event) -> None:
    """Ends this process if stdin ends before it is loaded: who compiles looks at nothing else, for minutes."""
    select.select([stdin], [], [])
    if not loaded.is_set():
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
