"""The API process's end of the engine: starts the engine process, and looks like jaxllm.Engine to the routes.

Tokenizing and HTTP happen on this side, the device and everything that must be counted once on the other. If the engine
process dies, every open request hears of it and nothing new is accepted.
"""

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from jaxllm.config import EngineConfig
from jaxllm.request import EngineDeadError, JaxllmError, Output, OverloadedError, Request, RequestError, Stats
from jaxllm.source import load_tokenizer
from serving import wire

log = logging.getLogger("jaxllm")

WATCH_S = 0.2  # how often the engine process is looked after
LEAVE_S = 20  # what it has to end by itself


class StartFailed(JaxllmError):
    """The engine process ended before it was ready. It has said why."""


class EngineProcess:
    """The engine process, started at once. It ends with `close`, or with this process.

    program: the module that is the process, and arguments before the address.
    """

    def __init__(self, config: EngineConfig, *program: str):
        self._folder = tempfile.TemporaryDirectory(prefix="jaxllm-")
        self.address = f"ipc://{self._folder.name}/engine"
        command = [sys.executable, "-m", *(program or ("serving.engine_process",)), self.address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config) + b"\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def close(self, at_once: bool = False) -> None:
        """Ends it and waits. at_once: it may be deep in a compilation, where it hears nothing but a signal."""
        if at_once:
            self._process.terminate()
        if self._process.stdin is not None:
            self._process.stdin.close()  # which is how it knows
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


class AnothersProcess:
    """An engine process that this one did not start and will not end."""

    def __init__(self, address: str, pid: int):
        self.address, self.pid = address, pid

    def status(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return -1
        return None

    def close(self, at_once: bool = False) -> None:
        """Leaves it running, for the others who use it."""


class _Box:
    """What came for one request and nobody took yet. ended: the last of it was taken, or an error took its place."""

    def __init__(self):
        self.ended = False
        self._pieces: list[wire.Piece] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, piece: wire.Piece) -> None:
        self._pieces.append(piece)
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    async def take(self) -> list[wire.Piece]:
        """Everything, as soon as there is something. Raises what `fail` was given, behind all that came before it."""
        while not self._pieces:
            if self._error is not None:
                self.ended = True
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pieces, self._pieces = self._pieces, []
        self.ended = pieces[-1].finished
        return pieces

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _output(request: Request, pieces: list[wire.Piece]) -> Output:
    """Pieces that follow each other, as one output."""
    completions = tuple([completion for piece in pieces for completion in piece.completions])
    prompt_logprobs = next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None), None)
    last = pieces[-1]
    ids = request.prompt_token_ids
    return Output(request.id, request.prompt, ids, completions, last.finished, prompt_logprobs, last.cached, last.embedding)


class RemoteEngine:
    """The way to an engine process, ready after `wait`. Use from one event loop; `close` ends the process if it is ours."""

    def __init__(self, config: EngineConfig, process: EngineProcess | AnothersProcess | None = None):
        self.config = config
        self.process = process or EngineProcess(config)
        self._boxes: dict[str, _Box] = {}
        self._asked: deque[asyncio.Future[wire.Reply]] = deque()
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task] = []

    def wait(self) -> "RemoteEngine":
        """Returns when the engine has loaded and compiled. Raises StartFailed if it does not come up."""
        try:
            hello = self._wait_for_hello()
            self.model_name, self.model_path = hello.model_name, hello.model_path
            self.default_params, self.limits = hello.default_params, hello.limits
            self.tokenizer = load_tokenizer(self.config, Path(hello.model_path))
        except BaseException:
            self.process.close(at_once=True)
            raise
        return self

    @property
    def max_model_len(self) -> int:
        return self.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.limits.vocab_size

    @property
    def memory(self) -> "RemoteEngine":
        """What outlives a request, see memory.Memory."""
        return self

    @property
    def healthy(self) -> bool:
        return self.process.status() is None

    def check(self, request: Request) -> None:
        """Raises RequestError for what can never be served."""
        self.limits.check(request)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """As Engine.generate, but what came since the last output is one output, with a completion for each token.

        Leaving early aborts the request. Raises EngineDeadError if the engine is gone.
        """
        self.check(request)
        self._send(wire.Add(request))
        box = self._boxes[request.id] = _Box()
        try:
            while not box.ended:
                yield _output(request, await box.take())
        finally:
            del self._boxes[request.id]
            if not box.ended:
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """Ends a request and gives its pages back at the engine's next turn."""
        if self.healthy:
            self._send(wire.Abort(request_id))

    async def stats(self) -> Stats:
        """The engine's figures of the moment."""
        hello = await self._ask(wire.Ask())
        assert isinstance(hello, wire.Hello)
        return hello.stats

    async def forget(self) -> None:
        """Empties the prefix cache."""
        await self._ask(wire.Forget())

    async def profile(self, folder: str | None) -> None:
        """Starts a profile in the folder, or (None) ends it. Raises RuntimeError if one runs already, or none does."""
        done = await self._ask(wire.Profile(folder))
        if isinstance(done, wire.Done) and done.error is not None:
            raise RuntimeError(done.error)

    async def keep(self, key: str, value: bytes | None) -> None:
        """As memory.Memory, which this is: the engine's process keeps it."""
        await self._ask(wire.Keep(key, value))

    async def recall(self, key: str) -> bytes | None:
        found = await self._ask(wire.Recall(key))
        assert isinstance(found, wire.Recalled)
        return found.value

    def close(self) -> None:
        """Ends the engine process. May be called twice."""
        for task in self._tasks:
            if not task.get_loop().is_closed():
                task.cancel()
        if self._socket is not None:
            self._socket.close(linger=0)
        self.process.close()

    # ------------------------------------------------------------------ the way there

    def _wait_for_hello(self) -> wire.Hello:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(self.process.address)  # which the engine binds when it is ready; until then this tries again and again
            socket.send(wire.encode(wire.Ask()))
            while not socket.poll(100):
                if (status := self.process.status()) is not None:
                    raise StartFailed(f"the engine process ended with status {status} before it was ready")
            hello = wire.decode_answer(socket.recv())
            assert isinstance(hello, wire.Hello)
            return hello

    async def _ask(self, question: wire.Question) -> wire.Reply:
        future = asyncio.get_running_loop().create_future()
        self._send(question)
        self._asked.append(future)
        return await future

    def _send(self, message: msgspec.Struct) -> None:
        if not self.healthy:
            raise self._death()
        if self._socket is None:
            self._connect()
        assert self._socket is not None
        self._socket.send(wire.encode(message))  # a future that is done already: the queue behind it has no limit

    def _connect(self) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.connect(self.process.address)
        self._tasks = [asyncio.create_task(self._listen(self._socket)), asyncio.create_task(self._watch())]

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            match wire.decode_answer(await socket.recv()):
                case wire.Pieces(pieces):
                    for piece in pieces:
                        if (box := self._boxes.get(piece.request_id)) is not None:  # or it was aborted here, and this was under way
                            box.put(piece)
                case wire.Refused(request_id, message, param, overloaded):
                    if (box := self._boxes.get(request_id)) is not None:
                        box.fail(OverloadedError(message) if overloaded else RequestError(message, param))
                case reply:
                    if not (future := self._asked.popleft()).done():
                        future.set_result(reply)

    async def _watch(self) -> None:
        while self.healthy:
            await asyncio.sleep(WATCH_S)
        error = self._death()
        log.error("%s", error)
        for box in self._boxes.values():
            box.fail(error)
        for future in self._asked:
            if not future.done():
                future.set_exception(error)

    def _death(self) -> EngineDeadError:
        return EngineDeadError(f"the engine has stopped: its process ended with status {self.process.status()}")
