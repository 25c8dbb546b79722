"""Owns the parameters, the KV pages and the row state on the device, and one compiled step for each bucket.

Everything is compiled before the engine says ready; a shape that was not is a KeyError. `run` dispatches and returns at
once; the tokens are on their way to the host and wait in the Handle. A step is one executable that also draws each row's
token; when some row's logits are to be edited first, a second small one draws again over the same logits.

A step's inputs and outputs keep their addresses: what it makes goes to donated ports, what it is told is copied into an
inbox. XLA then launches the step's CUDA graph as it is, where one new address makes it look through every node.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
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
from jax.stages import Lowered

from jaxllm import mask, sample, scheduler
from jaxllm import step as device
from jaxllm.batch import StepResult, pack, packed_size
from jaxllm.cache import Cache, cache_shapes, make_cache
from jaxllm.decoder import Decoder
from jaxllm.executables import Executables
from jaxllm.parallel import sharding
from jaxllm.params import abstract, layout, place
from jaxllm.patch import Patch
from jaxllm.plan import GIB, Bucket, Plan
from jaxllm.request import ConfigError
from jaxllm.scheduler import Step
from jaxllm.weights import Given, Join, Params

log = logging.getLogger("jaxllm")

Prepared = tuple[Array, ...]

ADMITTED = 16  # sequences whose row state one dispatch brings to the device
# XLA's pass thinks that only four fifths of a GPU may be used, finds that the cache alone is more, and recomputes for nothing.
_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
# Prompts' large products are cuBLAS's: compiling and trying Triton's kernels for each of them gained nothing (8B MIX, H200).
_LARGE = {"xla_gpu_enable_triton_gemm": False}
# A step that is repeated stays one CUDA graph: with the usual kinds and its loop (WHILE), the device counts the turns, and the host none.
REPEATED = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": 1,  # of which the loop is one
}
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


@dataclass
class RowState:
    """What the device keeps for each row slot. The last four matter only to rows that sample with edited logits."""

    last_S: Array  # the newest token
    table_SP: Array  # its pages
    floats_SF: Array  # sampling parameters, packed by `sample.Sampling`
    ints_SI: Array
    edits_SE: Array
    counts_SV: Array  # how often each token was produced
    in_prompt_SV: Array
    banned_SW: Array  # what must not be drawn, packed as mask.py says


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
        self._state = self._empty_state()
        self._steps: dict[Bucket, Callable] = {}
        self._loads: dict[Bucket, Callable] = {}
        self._takes: dict[int, Callable] = {}
        self._hiddens: dict[int, Callable] = {}
        self._masked_draws: dict[int, Callable] = {}
        self._edited_draws: dict[int, Callable] = {}
        self._admits: dict[str, Callable] = {}
        self._inboxes: dict[Bucket, Array] = {}
        self._ports: dict[int, device.Ports] = {}
        self._joins: dict[Join, Callable] = {}
        self._patch_S = self._empty_patch()
        self._patched: set[int] = set()  # slots whose last sequence brought data
        self._masked: set[int] = set()  # slots whose last sequence had a mask

    def _empty_state(self) -> RowState:
        slots, vocab = self.plan.max_num_seqs + 1, self.model.vocab_size
        shapes = {
            "last_S": ((slots,), jnp.int32),
            "table_SP": ((slots, self.plan.max_pages), jnp.int32),
            "floats_SF": ((slots, sample.FLOATS), jnp.float32),
            "ints_SI": ((slots, sample.INTS), jnp.int32),
            "edits_SE": ((slots, device.EDITS), jnp.int32),
            "counts_SV": ((slots, vocab), jnp.int16),
            "in_prompt_SV": ((slots, vocab), jnp.bool_),
            "banned_SW": ((slots, mask.words(vocab)), jnp.int32),
        }
        return RowState(**self._zeros({name: jax.ShapeDtypeStruct(*s) for name, s in shapes.items()}))

    def _empty_patch(self) -> dict[str, Array]:
        """For every row slot what the patch takes from one that brings nothing."""
        row, slots = ({} if self.patch is None else self.patch.row(None)), self.plan.max_num_seqs + 1
        return {name: jax.device_put(np.broadcast_to(value, (slots, *value.shape)), self._everywhere) for name, value in row.items()}

    def _zeros(self, shapes: Any) -> Any:
        make = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=self._everywhere)
        return make()

    # ------------------------------------------------------------------ compiling

    def compile(self, kept: Executables | None = None) -> None:
        """Compiles every shape, or takes what an earlier start kept.

        Raises ConfigError if the largest step does not fit into what the plan set aside for it.
        """
        jobs, options = self._jobs(), _OPTIONS | (kept.options if kept else {})
        before = stack_size(_COMPILER_STACK)
        try:
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                restored = [None] * len(jobs) if kept is None else pool.map(kept.get, [job.name for job in jobs])
                # Lowered one after the other: that holds Python's lock, and threads would only fight for it. Compiling lets it go.
                made = [pool.submit(job.lower(options).compile) if done is None else done for job, done in zip(jobs, restored, strict=True)]
        finally:
            stack_size(before)
        compiled = {job.name: m.result() if isinstance(m, Future) else m for job, m in zip(jobs, made, strict=True)}
        for job in jobs:
            job.home[job.key] = compiled[job.name]
        self._check_memory()
        if kept is not None:
            kept.keep(compiled)

    def start(self, decoder: Decoder) -> None:
        """Takes the weights, allocates the cache and runs each shape once on padding, so that nothing is left for the first request.

        Only now, because XLA tries kernels on the device as it compiles, and needs room for it.
        """
        self._params = tuple(jax.tree.leaves(nnx.state(decoder)))
        self._cache = make_cache(self.plan, self.model, self._mesh)
        self._inboxes = self._zeros({b: jax.ShapeDtypeStruct((packed_size(b),), jnp.int32) for b in self._steps})
        self._ports = {m: self._zeros(self._port_shapes(m)) for m in self._takes}
        self._warm_up()

    def _port_shapes(self, rows: int) -> device.Ports:
        return device.Ports.shapes(rows, self.model, self.plan)

    def _jobs(self) -> list["_Job"]:
        s, f = self._state, jax.ShapeDtypeStruct
        jobs, spare = [], device.pack_edits(None, self.plan.max_num_seqs, self.model.vocab_size)
        cache = cache_shapes(self.plan, self.model, self._mesh)
        out = jax.tree.map(lambda a: a.sharding, cache)
        steps = sorted({*self.plan.buckets, self.plan.scored}, reverse=True)  # the slowest to compile first

        def job(name, home, key, f, args, donate, out: Any = self._everywhere, options: dict[str, Any] | None = None):
            abstract = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None) or self._everywhere), args
            )
            jobs.append(_Job(name, home, key, partial(jax.jit, f, donate_argnums=donate, out_shardings=out), abstract, options or {}))

        precision = jax.default_matmul_precision("highest" if self.plan.dtype == "float32" else "default")
        for b in steps:
            ports, inbox = self._port_shapes(b.rows), f((packed_size(b),), jnp.int32)
            args = (self._params, cache, s.last_S, s.table_SP, s.floats_SF, s.ints_SI, inbox, ports, self._patch_S)
            step = precision(partial(self._step, b))
            special = _LARGE if b.chunk else REPEATED if self.plan.decode_steps > 1 else {}
            job(str(b), self._steps, b, step, args, (1, 2, 3, 7), (out, *[self._everywhere] * 4), special)
            job(f"{b}'s inbox", self._loads, b, _load, (inbox, inbox), (0,))
        for m in sorted({b.rows for b in steps}):
            ports = self._port_shapes(m)
            how = (self._mesh, self._implementation)
            job(f"tokens of {m}", self._takes, m, jnp.copy, (ports.tokens_RM,), ())
            job(f"hidden of {m}", self._hiddens, m, partial(jnp.array, dtype=jnp.float32), (ports.hidden_MD,), ())
            args = (s.last_S, s.floats_SF, s.ints_SI, s.banned_SW, ports.head_3M, ports.logits_MV)
            job(f"masked draw of {m}", self._masked_draws, m, partial(device.draw_masked, *how), args, (0, 5))
            args = (s.last_S, s.counts_SV, s.floats_SF, s.ints_SI, s.edits_SE, s.in_prompt_SV, s.banned_SW, ports.head_3M, ports.logits_MV)
            edited = partial(device.draw_edited, *how, count=self.plan.max_logprobs)
            job(f"edited draw of {m}", self._edited_draws, m, edited, args, (0, 1))
        packed = f((ADMITTED, device.row_width(self.plan)), jnp.int32)
        job("admission", self._admits, "rows", device.admit, (s.table_SP, s.floats_SF, s.ints_SI, s.edits_SE, packed), (0, 1, 2, 3))
        job("edits", self._admits, "edits", device.admit_edits, (s.edits_SE, s.counts_SV, s.in_prompt_SV, *spare), (0, 1, 2))
        if self.patch is not None:
            args = (self._patch_S, np.int32(0), self.patch.row(None))
            job("patch data", self._admits, "patch", device.admit_patch, args, (0,))
        for how in layout(self.model, self._mesh).joins:
            job(f"joining {how.shapes} by {how.axes}", self._joins, how, how.__call__, (how.parts(self.plan.dtype),), (), how.sharding)
        masks = f((ADMITTED,), jnp.int32), f((ADMITTED, s.banned_SW.shape[1]), jnp.int32)
        job("masks", self._admits, "masks", device.admit_masks, (s.banned_SW, *masks), (0,))
        return jobs

    def _step(self, bucket: Bucket, params, *arrays):
        """`arrays`: as `model_step` takes them, and what the rows bring for the patch."""
        decoder = nnx.merge(self._graph, jax.tree.unflatten(self._tree, params))
        *arrays, patch_S = arrays
        return device.model_step(decoder, self.plan, self._mesh, self._implementation, bucket, *arrays, self.patch, patch_S)

    def _check_memory(self) -> None:
        """A step must fit beside weights and cache. It is XLA's own figure, not a trial run's."""
        compiled = [*self._steps.values(), *self._edited_draws.values()]
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
        run = self._steps[bucket]
        inbox = self._inboxes[bucket] = self._loads[bucket](self._inboxes[bucket], pack(step, self.plan))
        self._cache, s.last_S, s.table_SP, self._ports[bucket.rows], prompt = run(
            self._params, self._cache, s.last_S, s.table_SP, s.floats_SF, s.ints_SI, inbox, self._ports[bucket.rows], self._patch_S
        )
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


@dataclass(frozen=True)
class _Job:
    """One executable to compile, and where it goes."""

    name: str
    home: dict
    key: Any
    jit: Callable
    args: tuple
    options: dict[str, Any]

    def lower(self, options: dict[str, Any]) -> Lowered:
        # Donated ports are only written, so they must not be dropped as unused.
        return self.jit(keep_unused=True, compiler_options=options | self.options).lower(*self.args)


def _load(inbox: Array, packed: Array) -> Array:
    return inbox.at[:].set(packed)
