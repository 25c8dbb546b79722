"""Owns the parameters, the KV pages and the row state on the device, and one compiled step for each bucket.

Everything is compiled before the engine says ready; a shape that was not is a KeyError. `run` dispatches and returns at
once; the tokens are on their way to the host and wait in the Handle. A step is one executable that also draws each row's
token; when some row's logits are to be edited first, a second small one draws again over the same logits.

A step's inputs and outputs keep their addresses: what it makes goes to donated ports, what it is told is copied into an
inbox. XLA then launches the step's CUDA graph as it is, where one new address makes it look through every node.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import stack_size
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from jaxllm import mask, mosaic, scheduler
from jaxllm import step as device
from jaxllm.batch import StepResult, pack, packed_size
from jaxllm.cache import Cache, make_cache
from jaxllm.decoder import Decoder
from jaxllm.executables import Executables
from jaxllm.lowering import Recipe, lowered
from jaxllm.parallel import sharding
from jaxllm.params import abstract, place
from jaxllm.patch import Patch
from jaxllm.plan import GIB, Bucket, Plan
from jaxllm.programs import ADMITTED, OPTIONS, Program, RowState, programs
from jaxllm.request import ConfigError
from jaxllm.scheduler import Step
from jaxllm.sharded import Mailboxes
from jaxllm.weights import Given, Join, Params

log = logging.getLogger("jaxllm")

Prepared = tuple[Array, ...]

_COMPILER_STACK = 64 * 2**20  # XLA's recursion over a deep model overflows a thread's usual 8 MiB


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """What StepResult has, on the device. tokens: of each turn, where they are wanted; last: the last turn's, if they were drawn again."""

    tokens_RM: Array | None
    last_M: Array | None
    logprobs: tuple[Array, ...] | None
    prompt: tuple[Array, ...] | None
    hidden_MD: Array | None


def _compile(name: str, lowered: Lowered) -> Compiled:
    start = time.monotonic()
    made = lowered.compile()
    log.debug("%s: compiled in %.1f s", name, time.monotonic() - start)
    return made


def _made(pool: ThreadPoolExecutor, programs: Iterable[tuple[Program, Lowered]], device: Any) -> dict[str, Compiled]:
    """The executables by name: while programs come, those without Mosaic's kernels, then all of those kernels, then the programs with them.

    One at a time, because XLA's compiling and Mosaic's keep each other waiting (mosaic.py).
    """
    kernels: dict[bytes, mosaic.Kernel] = {}
    with_kernels: dict[str, Lowered] = {}
    without: dict[str, Future[Compiled]] = {}
    for program, done in programs:
        if found := mosaic.kernels(done):
            kernels |= found
            with_kernels[program.name] = done
        else:
            without[program.name] = pool.submit(_compile, program.name, done)
    made = {name: future.result() for name, future in without.items()}
    shares = [mosaic.program(share, device) for share in mosaic.shares(kernels.values(), os.cpu_count() or 1)]
    list(pool.map(_compile, [f"kernels {i}" for i in range(len(shares))], shares))
    return made | dict(zip(with_kernels, pool.map(_compile, with_kernels, with_kernels.values()), strict=True))


class Handle:
    """A dispatched step. `draw` chooses its tokens, if that was not done at once; `read` waits for them."""

    def __init__(self, step: Step, choose: Callable[[], Drawn]):
        self._step, self._choose = step, choose
        self._drawn: Drawn | None = None

    def draw(self) -> None:
        if self._drawn is None:
            self._drawn = self._choose()
            for array in jax.tree.leaves(self._drawn):
                array.copy_to_host_async()

    def read(self) -> StepResult:
        assert self._drawn is not None, "a step is read that drew nothing yet"
        drawn, turns = jax.tree.map(np.asarray, self._drawn), self._step.turns
        turns_R = [] if drawn.tokens_RM is None else [*drawn.tokens_RM[:turns]]
        if drawn.last_M is not None:
            turns_R[turns - 1 :] = [drawn.last_M]
        tokens = np.stack(turns_R).T.tolist()
        # Who draws less often than others draws in the last turns.
        own = [row[turns - each.samples :] for each, row in zip(self._step.rows, tokens, strict=False)]
        return StepResult(own, drawn.logprobs, drawn.prompt, drawn.hidden_MD)


class Runner:
    """A model ready to run the plan's steps once `compile` and then `start` have returned.

    decoder: the network, of arrays or of what stands for them (`WeightShapes`): compiling need not wait for weights.
    """

    def __init__(self, decoder: Decoder, plan: Plan, mesh: Mesh, implementation: str, patch: Patch | None = None):
        self.plan, self.model, self.patch = plan, decoder.c, patch
        if patch is not None:
            patch.check(len(decoder.c.layers))
        self._mesh, self._implementation = mesh, implementation
        self._graph, state = nnx.split(decoder)
        leaves, self._tree = jax.tree.flatten(state)
        self._params = tuple(leaves)  # shapes, until `start`
        self._everywhere = sharding(mesh, ())
        self._cache: Cache = []
        self._state = RowState(**self._zeros(vars(RowState.shapes(plan, decoder.c))))
        self._programs = programs(decoder, plan, mesh, implementation, patch)
        self._steps: dict[Bucket, Compiled] = {}
        self._loads: dict[Bucket, Compiled] = {}
        self._takes: dict[int, Compiled] = {}
        self._hiddens: dict[int, Compiled] = {}
        self._masked_draws: dict[int, Compiled] = {}
        self._edited_draws: dict[int, Compiled] = {}
        self._admits: dict[str, Compiled] = {}
        self._inboxes: dict[Bucket, Array] = {}
        self._ports: dict[int, device.Ports] = {}
        self._joins: dict[Join, Compiled] = {}
        self._mailboxes: Mailboxes | None = None
        self._patch_S = self._empty_patch()
        self._patched: set[int] = set()  # slots whose last sequence brought data
        self._masked: set[int] = set()  # slots whose last sequence had a mask

    def _empty_patch(self) -> dict[str, Array]:
        """For every row slot what the patch takes from one that brings nothing."""
        row, slots = ({} if self.patch is None else self.patch.row(None)), self.plan.max_num_seqs + 1
        return {name: jax.device_put(np.broadcast_to(value, (slots, *value.shape)), self._everywhere) for name, value in row.items()}

    def _zeros(self, shapes: Any) -> Any:
        make = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=self._everywhere)
        return make()

    # ------------------------------------------------------------------ compiling

    def compile(self, kept: Executables | None = None, helpers: int = 0) -> None:
        """Compiles every program, or takes what an earlier start kept. helpers: processes, at most, that lower beside this one.

        Raises ConfigError if the largest step does not fit into what the plan set aside for it.
        """
        compiled = self._compiled(kept, helpers)
        homes: dict[str, dict] = {
            "step": self._steps,
            "load": self._loads,
            "take": self._takes,
            "hidden": self._hiddens,
            "masked draw": self._masked_draws,
            "edited draw": self._edited_draws,
            "admit": self._admits,
            "join": self._joins,
        }
        for program in self._programs:
            homes[program.kind][program.key] = compiled[program.name]
        self._check_memory()
        if kept is not None:
            kept.keep(compiled)

    def _compiled(self, kept: Executables | None, helpers: int) -> dict[str, Compiled]:
        """The executables by name. Threads compile, which lets go of Python's lock, while this one lowers."""
        options, names = OPTIONS | (kept.options if kept else {}), [program.name for program in self._programs]
        recipe = Recipe(self.model, self.plan, self._mesh, self._implementation)
        before = stack_size(_COMPILER_STACK)
        try:
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                found = {} if kept is None else {n: got for n, got in zip(names, pool.map(kept.get, names), strict=True) if got is not None}
                missing = [program for program in self._programs if program.name not in found]
                made = _made(pool, lowered(missing, options, recipe, helpers), self._mesh.devices.item(0))
        finally:
            stack_size(before)
        return found | made

    def start(self, decoder: Decoder) -> None:
        """Takes the weights, allocates the cache and runs each shape once on padding, so that nothing is left for the first request.

        Only now, because XLA tries kernels on the device as it compiles, and needs room for it.
        """
        self._params = tuple(jax.tree.leaves(nnx.state(decoder)))
        self._cache = make_cache(self.plan, self.model, self._mesh)
        if self.plan.mailboxes:
            self._mailboxes = Mailboxes.make(self._mesh, self.model.d_model)
            self._mailboxes.check(self._mesh, self.model.d_model, self.plan.dtype)
        self._inboxes = self._zeros({b: jax.ShapeDtypeStruct((packed_size(b),), jnp.int32) for b in self._steps})
        self._ports = {m: self._zeros(device.Ports.shapes(m, self.model, self.plan)) for m in self._takes}
        self._warm_up()

    def _check_memory(self) -> None:
        """A step must fit beside weights and cache. It is XLA's own figure, not a trial run's."""
        compiled: list[Any] = [*self._steps.values(), *self._edited_draws.values()]
        needed = max(c.memory_analysis().temp_size_in_bytes for c in compiled)
        log.debug("the largest step needs %.2f GiB beside weights and cache", needed / GIB)
        if self.plan.step_bytes is not None and needed > self.plan.step_bytes:
            raise ConfigError(
                f"the largest step needs {needed / GIB:.2f} GiB of temporaries, but {self.plan.step_bytes / GIB:.2f} GiB "
                "were set aside; lower --max-num-batched-tokens or --max-num-seqs"
            )

    def _warm_up(self) -> None:
        for bucket in self._steps:
            self._dispatch(Step([], bucket))
            self._takes[bucket.rows](self._ports[bucket.rows].tokens_RM)
            self._hiddens[bucket.rows](self._ports[bucket.rows].hidden_MD)
            self._draw_masked(bucket.rows)
            self._draw_edited(bucket.rows)
        self._admit_rows([])
        self._admit_edits(None)
        if self.patch is not None:
            self._admit_patch(self.plan.max_num_seqs, None)
        self._admit_masks([], self._unmasked()[:0])
        jax.block_until_ready((self._cache, vars(self._state)))

    # ------------------------------------------------------------------ running

    def run(self, step: Step) -> Handle:
        """Dispatches a step: new rows' state first, then model and draw, then another draw if a row's logits are edited.

        That other draw waits for Handle.draw if a row's mask depends on tokens that have not been read yet: those of the step before.
        """
        for start in range(0, len(step.admitted), ADMITTED):
            self._admit_rows(step.admitted[start : start + ADMITTED])
        for sequence in step.admitted:
            if sequence.params.edits:
                self._admit_edits(sequence)
            if sequence.slot is not None and (sequence.request.patch or sequence.slot in self._patched):
                self._admit_patch(sequence.slot, sequence.request.patch)
        self._admit_fixed_masks(step.admitted)
        prompt = self._dispatch(step)
        handle = Handle(step, partial(self._draw, step, prompt if step.bucket.scored else None))
        if not any(row.samples and row.sequence.masked for row in step.rows):
            handle.draw()
        return handle

    def _draw(self, step: Step, prompt: tuple[Array, ...] | None) -> Drawn:
        rows, last, logprobs = step.bucket.rows, None, None
        self._admit_changed_masks(step)
        sampling = [row.sequence.params for row in step.rows if row.samples]
        if any(p.edits for p in sampling):
            last, *found = self._draw_edited(rows)
            logprobs = tuple(found) if any(p.logprobs is not None for p in sampling) else None
        elif any(p.masks for p in sampling):
            last = self._draw_masked(rows)
        tokens = self._takes[rows](self._ports[rows].tokens_RM) if last is None or step.turns > 1 else None
        embeds = any(row.samples and row.sequence.request.embed for row in step.rows)
        hidden = self._hiddens[rows](self._ports[rows].hidden_MD) if embeds else None
        return Drawn(tokens, last, logprobs, prompt, hidden)

    def _dispatch(self, step: Step) -> tuple[Array, ...]:
        bucket, s = step.bucket, self._state
        run, addresses = self._steps[bucket], None if self._mailboxes is None else self._mailboxes.addresses_WV2
        inbox = self._inboxes[bucket] = self._loads[bucket](self._inboxes[bucket], pack(step, self.plan))
        self._cache, s.last_S, s.table_SP, self._ports[bucket.rows], prompt = run(
            self._params, self._cache, s.last_S, s.table_SP, s.floats_SF, s.ints_SI, inbox, self._ports[bucket.rows], addresses,
            self._patch_S,
        )  # fmt: skip
        return prompt

    def _draw_masked(self, rows: int) -> Array:
        s, ports = self._state, self._ports[rows]
        s.last_S, tokens, logits = self._masked_draws[rows](s.last_S, s.floats_SF, s.ints_SI, s.banned_SW, ports.head_3M, ports.logits_MV)
        self._ports[rows] = replace(ports, logits_MV=logits)
        return tokens

    def _draw_edited(self, rows: int) -> list[Array]:
        s, ports = self._state, self._ports[rows]
        s.last_S, s.counts_SV, *found = self._edited_draws[rows](
            s.last_S, s.counts_SV, s.floats_SF, s.ints_SI, s.edits_SE, s.in_prompt_SV, s.banned_SW, ports.head_3M, ports.logits_MV
        )
        return found

    def _admit_rows(self, sequences: Sequence[scheduler.Sequence]) -> None:
        packed = np.zeros((ADMITTED, device.row_width(self.plan)), np.int32)
        packed[:, 0] = self.plan.max_num_seqs
        for row, sequence in zip(packed, sequences, strict=False):
            device.pack_row(row, sequence)
        s = self._state
        s.table_SP, s.floats_SF, s.ints_SI, s.edits_SE = self._admits["rows"](s.table_SP, s.floats_SF, s.ints_SI, s.edits_SE, packed)

    def _admit_edits(self, sequence: scheduler.Sequence | None) -> None:
        s, packed = self._state, device.pack_edits(sequence, self.plan.max_num_seqs, self.model.vocab_size)
        s.edits_SE, s.counts_SV, s.in_prompt_SV = self._admits["edits"](s.edits_SE, s.counts_SV, s.in_prompt_SV, *packed)

    def _admit_fixed_masks(self, admitted: Sequence[scheduler.Sequence]) -> None:
        """Masks of newcomers that stay as they are; none for one in the slot of another that had a mask."""
        fixed = {s.slot: s.mask.banned(()) for s in admitted if s.slot is not None and s.mask is not None and not s.mask.changes}
        none = {s.slot: self._unmasked()[0] for s in admitted if s.slot is not None and s.mask is None and s.slot in self._masked}
        if due := fixed | none:
            self._admit_masks(list(due), np.stack(list(due.values())))
        self._masked = (self._masked | fixed.keys()) - none.keys()

    def _admit_changed_masks(self, step: Step) -> None:
        """Masks that depend on the tokens so far, all of which are known by now."""
        rows = [(row.slot, row.sequence) for row in step.rows if row.samples and row.sequence.masked and not row.sequence.finished]
        if rows:
            masks = [(s.mask, s.tokens[s.prompt_len :]) for _, s in rows if s.mask is not None]
            self._admit_masks([slot for slot, _ in rows], mask.banned(masks))
            self._masked.update(slot for slot, _ in rows)

    def _admit_masks(self, slots: list[int], banned_RW: np.ndarray) -> None:
        for start in range(0, max(len(slots), 1), ADMITTED):
            some = slots[start : start + ADMITTED]
            slot_A, banned_AW = np.full(ADMITTED, self.plan.max_num_seqs, np.int32), self._unmasked()
            slot_A[: len(some)], banned_AW[: len(some)] = some, banned_RW[start : start + ADMITTED]
            self._state.banned_SW = self._admits["masks"](self._state.banned_SW, slot_A, banned_AW)

    def _unmasked(self) -> np.ndarray:
        return np.zeros((ADMITTED, self._state.banned_SW.shape[1]), np.int32)

    def _admit_patch(self, slot: int, given: Mapping[str, Any] | None) -> None:
        assert self.patch is not None
        self._patch_S = self._admits["patch"](self._patch_S, np.int32(slot), self.patch.row(given))
        (self._patched.add if given else self._patched.discard)(slot)

    # ------------------------------------------------------------------ other parameters

    def prepare(self, params: Params) -> Prepared:
        """`params` as the compiled steps take them: what the engine fuses is fused on the devices, the rest are the arrays given.

        Any thread may prepare. Raises ConfigError unless they are this model's, in the plan's dtype.
        """
        placed = place(params, abstract(self.model, self._mesh, self.plan.dtype))
        graph, state = nnx.split(Decoder(Given(placed, self._mesh, self._joins), self.model))
        leaves, tree = jax.tree.flatten(state)
        assert (graph, tree) == (self._graph, self._tree), "the parameters make another network"
        return tuple(leaves)

    def use(self, prepared: Prepared) -> None:
        """Steps from here on run with these parameters. Steps under way keep theirs."""
        self._params = prepared
