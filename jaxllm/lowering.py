"""Lowers programs: here, one after the other, and at the same time in other processes.

Lowering is Python, which holds one lock a process: 1 to 3 s for a step whose kernels are Mosaic's, where XLA then needs seconds without
the lock. A helper is a process that never touches the device. It knows the device from its description, builds the same programs, and
answers a program's name with its StableHLO. Whatever a helper does not lower, for whatever reason, is lowered here.
"""

import contextlib
import io
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.stages import Lowered

from converters.checkpoint import tensor_shapes
from converters.model_config import ModelConfig
from jaxllm.decoder import Decoder
from jaxllm.executables import settings
from jaxllm.parallel import make_mesh
from jaxllm.plan import Plan
from jaxllm.programs import Program, programs
from jaxllm.weights import WeightShapes

log = logging.getLogger("jaxllm")

EACH = 10  # programs that a helper must find to do, or it is not worth its start: 2 to 3 s, mostly imports
MOST = 8  # helpers, of some 400 MB each: with more, XLA is what takes the time
PATIENCE_S = 60.0  # without any answer, and nothing left to do here
_PLACES = ("jax_platforms", "jax_cuda_visible_devices", "jax_default_device")  # settings that say where things run


@dataclass(frozen=True)
class Recipe:
    """What programs are made from, where weights are of the plan's dtype and there is no patch."""

    model: ModelConfig
    plan: Plan
    mesh: Mesh
    implementation: str

    def programs(self) -> list[Program]:
        shapes = WeightShapes(tensor_shapes(self.model), self.mesh, self.plan.dtype)
        return programs(Decoder(shapes, self.model), self.plan, self.mesh, self.implementation)

    def described(self) -> bytes:
        """For another process, which has not these devices but their description."""
        devices = list(self.mesh.devices.flat)
        topology = topologies.TopologyDescription(devices).serialize()
        facts = [_facts(device) for device in devices]
        return pickle.dumps((settings(), topology, facts, self.model, self.plan, self.implementation))

    @classmethod
    def read(cls, described: bytes) -> "Recipe":
        """There. Everything is traced and lowered as if the described devices were this process's from here on.

        Raises ValueError if the description lost what kernels are chosen by.
        """
        settings_there, topology, facts, model, plan, implementation = pickle.loads(described)
        for name, value in settings_there.items():
            if name not in _PLACES and jax.config.values.get(name) != value:
                jax.config.update(name, value)
        jax.devices()  # starts what the description is read with
        by_id = {device.id: device for device in topologies.TopologyDescription.deserialize(topology).devices}
        devices = [by_id[number] for number, *_ in facts]
        if (found := [_facts(device) for device in devices]) != facts:
            raise ValueError(f"the devices are {facts}, but their description says {found}")
        jax.config.update("jax_default_device", devices[0])  # which kernels ask for, and for its capability
        return cls(model, plan, make_mesh(devices), implementation)


def _facts(device: Any) -> tuple:
    """What tells the device, and what kernels and their sizes are chosen by."""
    return device.id, device.platform, device.device_kind, *(getattr(device, name, None) for name in ("compute_capability", "core_count"))


@dataclass(frozen=True)
class Answer:
    """A lowered program on its way between processes. arguments: what it was lowered for; out: the shapes of its results."""

    stablehlo: bytes
    arguments: list[tuple]
    out: Any

    @classmethod
    def of(cls, program: Program) -> "Answer":
        done = program.lower({})
        inner: Any = done._lowering
        extra = inner.const_args, inner.compile_args["keepalive"], inner.compile_args["host_callbacks"]
        if any(extra):
            raise ValueError(f"{program.name} is more than its text: {extra}")
        text = io.BytesIO()
        inner.stablehlo().operation.write_bytecode(text)
        out = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), done.out_info)
        return cls(text.getvalue(), arguments(program), out)

    def adopted(self, program: Program, options: dict[str, Any]) -> Lowered:
        """As `program.lower` would have made it. Raises ValueError if it was lowered for other arguments."""
        if self.arguments != arguments(program):
            raise ValueError(f"{program.name} was lowered for {self.arguments}, not for {arguments(program)}")

        def stand_in(*_):
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.out)

        return with_text(program.jit(stand_in, options).lower(*program.args), self.stablehlo)


def with_text(made: Lowered, stablehlo: bytes) -> Lowered:
    """`made`, which takes and gives the same, with this text in place of its own. No public way leads from a text to a compiled program."""
    inner: Any = made._lowering
    inner._hlo = type(inner._hlo).parse(stablehlo, inner._hlo.context)
    return made


def arguments(program: Program) -> list[tuple]:
    return [(a.shape, str(a.dtype), str(getattr(a.sharding, "spec", ""))) for a in jax.tree.leaves(program.args)]


def helpers_for(devices: Sequence[Any]) -> int:
    """How many helpers a start may have. None on a CPU: its programs hold no kernels and are lowered in milliseconds."""
    return min(MOST, (os.cpu_count() or 1) // 2) if devices[0].platform == "gpu" else 0


def lowered(todo: Sequence[Program], options: dict[str, Any], recipe: Recipe, helpers: int = 0) -> Iterator[tuple[Program, Lowered]]:
    """Each of `todo` once, the slowest of which stand first. recipe: what they were made from. helpers: at most; less to do, fewer helpers.

    Helpers begin with the first ones and this process with the last, whose compiling need not wait for the others.
    """
    with contextlib.closing(_Work(todo, recipe, min(helpers, len(todo) // EACH))) as work:
        for _ in todo:
            program, answer = work.next()
            done = None
            try:
                done = answer and answer.adopted(program, options)
            except Exception as error:  # no answer is worth a start
                log.warning("a helper's answer cannot be used (%s): lowering it here", error)
            yield program, done or program.lower(options)


class _Work:
    """The programs that nobody has begun, and the helpers that take from them, each driven by a thread."""

    def __init__(self, todo: Sequence[Program], recipe: Recipe, helpers: int):
        self._waiting = deque(todo)
        self._answers: queue.SimpleQueue[tuple[Program, Answer | None]] = queue.SimpleQueue()
        self._over = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        try:
            described = recipe.described() if helpers else b""
            for _ in range(helpers):
                self._processes.append(process := _start())
                self._threads.append(threading.Thread(target=self._drive, args=(process, described)))
                self._threads[-1].start()
        except Exception as error:
            log.warning("%d of %d helpers could be started (%s)", len(self._threads), helpers, error)

    def next(self) -> tuple[Program, Answer | None]:
        """A program and what a helper made of it, or one that is to be lowered here. To be called once for each program."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._answers.get_nowait()
            if (program := self._take(last=bool(self._threads))) is not None:
                return program, None
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=PATIENCE_S)
            log.warning("no helper has lowered anything for %.0f s: lowering what is left here", PATIENCE_S)
            self.close()  # whereupon their threads hand back what they waited for

    def close(self) -> None:
        self._over = True
        for process in self._processes:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join()

    def _take(self, last: bool = False) -> Program | None:
        with contextlib.suppress(IndexError):
            return self._waiting.pop() if last else self._waiting.popleft()
        return None

    def _drive(self, process: subprocess.Popen[bytes], described: bytes) -> None:
        program = None
        try:
            with process:
                _ask(process, described)  # it is ready then: what comes first should not wait for its imports
                while (program := self._take()) is not None:
                    answer = _ask(process, program.name)
                    if isinstance(answer, str):
                        log.warning("a helper could not lower %s (%s): lowering it here", program.name, answer)
                    self._answers.put((program, answer if isinstance(answer, Answer) else None))
                process.kill()
        except Exception as error:  # which may be anything, where another process's bytes are read
            if not self._over:
                log.warning("a helper ended too early (%r): lowering its programs here", error)
            if program is not None:
                self._answers.put((program, None))


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from jaxllm.lowering import help_out; help_out()"]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _ask(process: subprocess.Popen[bytes], question: Any) -> Any:
    assert process.stdin is not None and process.stdout is not None
    pickle.dump(question, process.stdin)
    process.stdin.flush()
    return pickle.load(process.stdout)


def help_out() -> None:
    """A helper's life: a recipe, then names, and an answer to each; a sentence for what cannot be lowered. It ends when stdin does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the end of stdin is what ends this
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    ready: Any = "ready"
    with contextlib.suppress(EOFError, BrokenPipeError):
        made = {program.name: program for program in Recipe.read(pickle.load(sys.stdin.buffer)).programs()}
        while True:
            pickle.dump(ready, answers)
            answers.flush()
            name = pickle.load(sys.stdin.buffer)
            try:
                ready = Answer.of(made[name])
            except Exception as error:  # which this process's own try will raise, where it is understood
                ready = f"{type(error).__name__}: {error}"
