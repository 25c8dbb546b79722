"""Everything that a runner runs on the device, as programs to be compiled: what each does, the shapes it takes, what is donated.

Arrays are not needed for that, nor weights, nor a device: shapes with their places are enough.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, Sharding
from jax.stages import Lowered, Wrapped

from converters.model_config import ModelConfig
from jaxllm import mask, sample
from jaxllm import step as device
from jaxllm.batch import packed_size
from jaxllm.cache import cache_shapes
from jaxllm.decoder import Decoder
from jaxllm.parallel import sharding
from jaxllm.params import layout
from jaxllm.patch import Patch
from jaxllm.plan import Bucket, Plan
from jaxllm.sharded import Mailboxes

ADMITTED = 16  # sequences whose row state one dispatch brings to the device
# XLA's pass thinks that only four fifths of a GPU may be used, finds that the cache alone is more, and recomputes for nothing. Nor does it
# try several kernels for what stands between products: ours are the long ones.
OPTIONS = {"xla_disable_hlo_passes": "rematerialization", "xla_gpu_experimental_enable_fusion_autotuner": False}
# Prompts' large products are cuBLAS's: compiling and trying Triton's kernels for each of them gained nothing (8B MIX, H200).
LARGE = {"xla_gpu_enable_triton_gemm": False}
# Nor does trying cuBLAS's own gain anything, on Hopper from so many rows on (8B and 0.5B, H200), and where a step's layers are all ours.
# Then every start takes the same kernels, and has them at once.
UNTRIED = LARGE | {"xla_gpu_autotune_level": 0}
UNTRIED_ROWS = 256
# What XLA may put into a CUDA graph: its usual kinds, and the loop of a repeated step, whose turns the device then counts, the host none.
GRAPH = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
REPEATED = {"xla_gpu_enable_command_buffer": GRAPH, "xla_gpu_graph_min_graph_size": 1}  # of which the loop is one
# Sums over devices are NCCL's, which go into the graph too. XLA's own kernels for them are as fast, but stay outside and cut it in pieces,
# two a layer: 5.06 instead of 4.33 ms for 64 rows of the 8B on two H200.
SHARDED = {"xla_gpu_enable_command_buffer": f"{GRAPH},COLLECTIVES", "xla_gpu_experimental_use_collective_kernels": ""}


@dataclass(frozen=True)
class Program:
    """One executable to be. kind, key: where the runner looks for it. args: a tree of shapes. out: where its results lie."""

    name: str
    kind: str
    key: Any
    run: Callable
    args: tuple
    donated: tuple[int, ...]
    out: Any
    options: dict[str, Any]

    def lower(self, options: dict[str, Any]) -> Lowered:
        return self.jit(self.run, options).lower(*self.args)

    def jit(self, run: Callable, options: dict[str, Any]) -> Wrapped:
        # Donated ports are only written, so they must not be dropped as unused.
        how: dict[str, Any] = dict(donate_argnums=self.donated, out_shardings=self.out, keep_unused=True)
        return jax.jit(run, compiler_options=options | self.options, **how)


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

    @classmethod
    def shapes(cls, plan: Plan, model: ModelConfig) -> "RowState":
        """Shapes and types in place of arrays."""
        slots, vocab, f = plan.max_num_seqs + 1, model.vocab_size, jax.ShapeDtypeStruct
        made: dict[str, Any] = {
            "last_S": f((slots,), jnp.int32),
            "table_SP": f((slots, plan.max_pages), jnp.int32),
            "floats_SF": f((slots, sample.FLOATS), jnp.float32),
            "ints_SI": f((slots, sample.INTS), jnp.int32),
            "edits_SE": f((slots, device.EDITS), jnp.int32),
            "counts_SV": f((slots, vocab), jnp.int16),
            "in_prompt_SV": f((slots, vocab), jnp.bool_),
            "banned_SW": f((slots, mask.words(vocab)), jnp.int32),
        }
        return cls(**made)


def step_options(bucket: Bucket, plan: Plan, device: Any, ours: bool) -> dict[str, Any]:
    """XLA's options for a step on such devices, beside those for everything. ours: see `step.ours`."""
    products = product_options(bucket, device, ours)
    if bucket.chunk:
        return products
    return products | (REPEATED if plan.decode_steps > 1 else {}) | (SHARDED if plan.tensor_parallel_size > 1 else {})


def product_options(bucket: Bucket, device: Any, ours: bool) -> dict[str, Any]:
    """How XLA is to come by the kernels of such a step's products. ours: see `step.ours`."""
    many = bucket.rows + bucket.chunk >= UNTRIED_ROWS and getattr(device, "compute_capability", None) == "9.0"
    return UNTRIED if ours or many else LARGE if bucket.chunk else {}


def programs(decoder: Decoder, plan: Plan, mesh: Mesh, implementation: str, patch: Patch | None = None) -> list[Program]:
    """All that a runner of `decoder`, of arrays or of what stands for them, wants compiled: the slowest to lower and to compile first."""
    return _Programs(decoder, plan, mesh, implementation, patch).all()


class _Programs:
    def __init__(self, decoder: Decoder, plan: Plan, mesh: Mesh, implementation: str, patch: Patch | None):
        self.plan, self.model, self.patch = plan, decoder.c, patch
        self.mesh, self.implementation = mesh, implementation
        self.decoder = decoder
        self.graph, state = nnx.split(decoder)
        leaves, self.tree = jax.tree.flatten(state)
        self.params = tuple(leaves)
        self.everywhere: Sharding = sharding(mesh, ())
        self.rows = RowState.shapes(plan, decoder.c)

    def all(self) -> list[Program]:
        shapes = sorted({*self.plan.buckets, self.plan.scored}, reverse=True)
        made = [program for bucket in shapes for program in self.step(bucket)]
        return made + [program for rows in sorted({b.rows for b in shapes}) for program in self.draws(rows)] + self.rest()

    def program(self, name: str, kind: str, key: Any, run: Callable, args: tuple, donated: tuple[int, ...] = (), **how: Any) -> Program:
        """`how`: options, or out where the results lie elsewhere than everywhere."""
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._place(a)), args)
        return Program(name, kind, key, run, placed, donated, **({"out": self.everywhere, "options": {}} | how))

    def _place(self, given: Any) -> Sharding:
        return getattr(given, "sharding", None) or self.everywhere

    def step(self, bucket: Bucket) -> list[Program]:
        rows, ports = self.rows, device.Ports.shapes(bucket.rows, self.model, self.plan)
        inbox, cache = jax.ShapeDtypeStruct((packed_size(bucket),), jnp.int32), cache_shapes(self.plan, self.model, self.mesh)
        state = rows.last_S, rows.table_SP, rows.floats_SF, rows.ints_SI
        addresses = Mailboxes.addresses_shape(self.mesh) if self.plan.mailboxes else None
        args = (self.params, cache, *state, inbox, ports, addresses, self.patch_shapes())
        out = jax.tree.map(lambda a: a.sharding, cache), *[self.everywhere] * 4
        ours = device.ours(self.decoder, self.plan, self.mesh, self.implementation, bucket, self.patch)
        options = step_options(bucket, self.plan, self.mesh.devices.item(0), ours)
        precision = jax.default_matmul_precision("highest" if self.plan.dtype == "float32" else "default")
        run = precision(partial(self.run_step, bucket))
        return [
            self.program(str(bucket), "step", bucket, run, args, (1, 2, 3, 7), out=out, options=options),
            self.program(f"{bucket}'s inbox", "load", bucket, _load, (inbox, inbox), (0,)),
        ]

    def run_step(self, bucket: Bucket, params, *arrays):
        """`arrays`: as `model_step` takes them, and what the rows bring for the patch."""
        decoder = nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))
        *arrays, patch_S = arrays
        return device.model_step(decoder, self.plan, self.mesh, self.implementation, bucket, *arrays, self.patch, patch_S)

    def patch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        row, slots = ({} if self.patch is None else self.patch.row(None)), self.plan.max_num_seqs + 1
        return {name: jax.ShapeDtypeStruct((slots, *value.shape), value.dtype) for name, value in row.items()}

    def draws(self, rows: int) -> list[Program]:
        """What chooses the tokens of a step of so many rows, or fetches what it chose."""
        s, ports, how = self.rows, device.Ports.shapes(rows, self.model, self.plan), (self.mesh, self.implementation)
        masked = (s.last_S, s.floats_SF, s.ints_SI, s.banned_SW, ports.head_3M, ports.logits_MV)
        edited = (s.last_S, s.counts_SV, s.floats_SF, s.ints_SI, s.edits_SE, s.in_prompt_SV, s.banned_SW, ports.head_3M, ports.logits_MV)
        run_edited = partial(device.draw_edited, *how, count=self.plan.max_logprobs)
        return [
            self.program(f"tokens of {rows}", "take", rows, jnp.copy, (ports.tokens_RM,)),
            self.program(f"hidden of {rows}", "hidden", rows, partial(jnp.array, dtype=jnp.float32), (ports.hidden_MD,)),
            self.program(f"masked draw of {rows}", "masked draw", rows, partial(device.draw_masked, *how), masked, (0, 5)),
            self.program(f"edited draw of {rows}", "edited draw", rows, run_edited, edited, (0, 1)),
        ]

    def rest(self) -> list[Program]:
        """The admission of rows, and the joining of parameters."""
        s, f = self.rows, jax.ShapeDtypeStruct
        packed = f((ADMITTED, device.row_width(self.plan)), jnp.int32)
        spare = device.pack_edits(None, self.plan.max_num_seqs, self.model.vocab_size)
        masks = f((ADMITTED,), jnp.int32), f((ADMITTED, s.banned_SW.shape[1]), jnp.int32)
        rows = (s.table_SP, s.floats_SF, s.ints_SI, s.edits_SE, packed)
        made = [
            self.program("admission", "admit", "rows", device.admit, rows, (0, 1, 2, 3)),
            self.program("edits", "admit", "edits", device.admit_edits, (s.edits_SE, s.counts_SV, s.in_prompt_SV, *spare), (0, 1, 2)),
            self.program("masks", "admit", "masks", device.admit_masks, (s.banned_SW, *masks), (0,)),
        ]
        if self.patch is not None:
            args = (self.patch_shapes(), np.int32(0), self.patch.row(None))
            made.append(self.program("patch data", "admit", "patch", device.admit_patch, args, (0,)))
        for how in layout(self.model, self.mesh).joins:
            name, parts = f"joining {how.shapes} by {how.axes}", (how.parts(self.plan.dtype),)
            made.append(self.program(name, "join", how, how.__call__, parts, out=how.sharding))
        return made


def _load(inbox: Array, packed: Array) -> Array:
    return inbox.at[:].set(packed)
