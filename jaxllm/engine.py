"""The engine people hold: it loads a model, turns `Core` in a thread of its own, and carries outputs to whoever waits.

Requests and aborts come in through one queue, so that scheduler and runner are touched by the engine's thread only.
Outputs of one turn go to each event loop in one call.
"""

import asyncio
import gc
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable

import jax

from jaxllm.config import EngineConfig
from jaxllm.core import Core, Refusal
from jaxllm.loading import Loaded, load_engine_parts
from jaxllm.patch import Patch
from jaxllm.plan import Plan
from jaxllm.request import EngineDeadError, JaxllmError, Output, Request, Stats
from jaxllm.text import Tokenizer
from jaxllm.weights import Params

log = logging.getLogger("jaxllm")

Sink = Callable[[Output | Exception], None]


def make_core(config: EngineConfig, parts: Loaded) -> Core:
    """The core that turns `parts` as `config` asks."""
    return Core(
        parts.runner,
        parts.plan,
        parts.vocab_size,
        parts.eos_ids,
        parts.tokenizer,
        config.seed,
        patch=parts.runner.patch,
        by_priority=config.scheduling_policy == "priority",
        max_queued=config.max_num_queued_reqs,
    )


def profile(folder: str | None) -> None:
    """Starts JAX's profiler, which writes to the folder, or (None) ends it. Raises RuntimeError if one runs already, or none does."""
    if folder is None:
        jax.profiler.stop_trace()
        return
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # noting each call of a function slows the host until the GPU waits for it
    jax.profiler.start_trace(folder, profiler_options=options)


class Engine:
    """A loaded, compiled, running model. Construction returns when it is ready; `close` (or `with`) ends it.

    patch: changes activations at the sites it names; requests bring its data (Request.patch).
    Raises ConfigError if options, checkpoint, patch and machine do not fit together.
    """

    def __init__(self, config: EngineConfig | None = None, *, patch: Patch | None = None, **options):
        config = config or EngineConfig(**options)
        parts = load_engine_parts(config, patch)
        self._start(config, parts)

    def _start(self, config: EngineConfig, parts: Loaded) -> None:
        self.config = config
        self.plan: Plan = parts.plan
        self.tokenizer: Tokenizer | None = parts.tokenizer
        self.model_path: str = parts.path
        self.model_name: str = config.served_model_name or parts.name
        self.default_params: dict = parts.default_params
        self._runner = parts.runner
        self._core = make_core(config, parts)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue, Output | Exception]]] = {}
        self._sinks: dict[str, Sink] = {}
        self._dead: Exception | None = None
        # What was loaded lives as long as the engine: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._loop, name="jaxllm-engine", daemon=True)
        self._thread.start()

    @property
    def max_model_len(self) -> int:
        return self.plan.max_model_len

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._core.eos_ids

    @property
    def vocab_size(self) -> int:
        return self._core.limits.vocab_size

    @property
    def healthy(self) -> bool:
        return self._dead is None and self._thread.is_alive()

    def stats(self) -> Stats:
        return self._core.stats()

    def check(self, request: Request) -> None:
        """Raises RequestError for what can never be served. Compiles its structured_outputs, if it has any, which may take a while."""
        self._core.check(request)
        self._core.check_form(request)

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request. `sink` gets its outputs, or one exception, from the engine's thread; it must not block.

        Raises RequestError for what can never be served (of a form that cannot be honoured the sink hears), EngineDeadError after the
        engine has stopped.
        """
        self._core.check(request)
        self._send(lambda: self._add(request, sink))

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """The request's outputs as they come, each holding only what is new: a completion for each token that a row drew in one dispatch.

        Leaving the loop early aborts the request.
        """
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue()
        self.submit(request, lambda item: self._outbox.setdefault(loop, []).append((outputs, item)))
        finished = False
        try:
            while not finished:
                item = await outputs.get()
                finished = isinstance(item, Exception) or item.finished
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            if not finished:
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """Ends a request and gives its pages back at the next turn. Its sink hears finish_reason "abort"."""
        if self.healthy:
            self._send(lambda: self._core.abort(request_id))

    def update_params(self, params: Params) -> None:
        """Serves these parameters from the next step on, and returns when it does. Nothing is compiled.

        params: every tensor that `load` gives, in the engine's dtype. Those that the engine holds as they are it takes without a
        copy, so do not donate them to a jit afterwards; those it fuses (QKV, gate and up) are joined on the devices, for which
        both sets must fit beside each other for a moment. The prefix cache is emptied. Requests that are running go on with the
        new parameters, on the keys and values that the old ones made. Raises ConfigError if names, shapes or types differ.
        """
        prepared, done = self._runner.prepare(params), threading.Event()

        def swap() -> None:
            self._runner.use(prepared)
            self._core.forget()
            done.set()

        self._send(swap)
        while not done.wait(0.1):
            if not self.healthy:
                raise EngineDeadError(f"the engine stopped before it took the parameters: {self._dead or 'it was closed'}")

    def close(self) -> None:
        """Aborts what runs and stops the thread. May be called twice."""
        self._inbox.put(None)
        self._thread.join(timeout=60)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def forget(self) -> None:
        """Empties the prefix cache at the next turn. What runs keeps its pages."""
        self._send(self._core.forget)

    def profile(self, folder: str | None) -> None:
        """As the function of the same name."""
        profile(folder)

    # ------------------------------------------------------------------ the thread

    def _send(self, message: Callable[[], None]) -> None:
        if not self.healthy:
            raise EngineDeadError(f"the engine has stopped: {self._dead or 'it was closed'}") from self._dead
        self._inbox.put(message)

    def _add(self, request: Request, sink: Sink) -> None:
        try:
            self._core.add(request, self._hear)
        except JaxllmError as error:
            sink(error)
        else:
            self._sinks[request.id] = sink

    def _hear(self, heard: Output | Refusal) -> None:
        if isinstance(heard, Refusal):
            self._sinks.pop(heard.request_id)(heard.error)
        else:
            sink = self._sinks.pop(heard.request_id) if heard.finished else self._sinks[heard.request_id]
            sink(heard)

    def _loop(self) -> None:
        try:
            busy = False
            while self._read_inbox(wait=not busy):
                busy = self._core.turn()
                self._flush()
            self._core.abort_all("abort")
        except Exception as error:
            log.exception("the engine stopped")
            self._dead = error
        finally:
            self._fail_all(EngineDeadError(f"the engine has stopped: {self._dead or 'it was closed'}"))
            self._flush()

    def _read_inbox(self, wait: bool) -> bool:
        """Does what arrived; waits for something if `wait`. False once the engine is to close."""
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()
            wait = False

    def _fail_all(self, error: Exception) -> None:
        for sink in self._sinks.values():
            sink(error)
        self._sinks.clear()

    def _flush(self) -> None:
        boxes, self._outbox = self._outbox, {}
        for loop, items in boxes.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                log.debug("an event loop closed with %d outputs under way", len(items))


def _deliver(items: list[tuple[asyncio.Queue, Output | Exception]]) -> None:
    for outputs, item in items:
        outputs.put_nowait(item)
