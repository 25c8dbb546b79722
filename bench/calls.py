"""One product of a layer, with random numbers: drawn, told in float64, compiled and timed.

Weights are cold: each call reads another copy, and all of them together are more than the second-level cache holds. A time is the median
of a kernel's runs as JAX's profiler saw them.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.profile import spans
from bench.workloads import SHAPES, Shape
from jaxllm.engine import profile as trace
from jaxllm.plan import Bucket
from jaxllm.programs import product_options
from pallas_kernels.matmul import Product
from pallas_kernels.matmul_one_row import Tile, linear
from pallas_kernels.matmul_sm90 import Tile as ManyTile
from pallas_kernels.matmul_sm90 import linear as many_rows_linear
from pallas_kernels.matmul_sm90_wide import Tile as WideTile
from pallas_kernels.matmul_sm90_wide import linear as wide_linear

COLD = 200e6  # bytes of weights between two reads of the same one
RIGHT = 1e-2  # share of an error that rounding to bfloat16 explains
AnyTile = Tile | ManyTile | WideTile


def products(model: str, devices: int = 1) -> dict[str, Product]:
    """A device's part of the four products of a layer: QKV, o, gate and up, down. Raises SystemExit if the devices do not divide it."""
    shape = Shape.of(SHAPES[model])
    assert shape is not None
    if shape.kv_heads % devices or shape.intermediate % devices:
        raise SystemExit(f"{devices} devices do not divide {model}: {shape.kv_heads} KV heads, {shape.intermediate} MLP features")
    heads, hidden = shape.heads * shape.head_dim // devices, shape.intermediate // devices
    return {
        "qkv": Product(heads + 2 * shape.kv_heads * shape.head_dim // devices, shape.hidden),
        "o": Product(shape.hidden, heads),
        "gate_up": Product(hidden, shape.hidden, True),
        "down": Product(shape.hidden, hidden),
    }


def with_head(model: str, rows: int, devices: int = 1) -> dict[str, Product]:
    """`products`, and for one row on one device the head's, which a kernel of ours makes as well."""
    shape = Shape.of(SHAPES[model])
    assert shape is not None
    return products(model, devices) | ({"head": Product(shape.vocab, shape.hidden)} if (rows, devices) == (1, 1) else {})


@dataclass(frozen=True)
class Call:
    """One product with what stands around it in a layer, and what it means in float64."""

    product: Product
    weights: list[jax.Array]
    x: jax.Array
    around: dict[str, jax.Array]  # a norm before, or a residual behind; of more than one row, `work.live`

    @classmethod
    def draw(cls, product: Product, name: str, rows: int) -> "Call":
        key, size = jax.random.key(1), (product.features * (1 + product.gated), product.inputs)
        copies = max(2, min(48, int(COLD / cls.bytes(product)) + 1))
        weights = [jax.random.normal(jax.random.fold_in(key, i), size, jnp.bfloat16) * product.inputs**-0.5 for i in range(copies)]
        x = jax.random.normal(jax.random.fold_in(key, 100), (rows, product.inputs), jnp.bfloat16)
        if rows > 1:
            return cls(product, weights, x, {"live_3": jnp.full(3, rows, jnp.int32)})
        if name in ("qkv", "gate_up"):
            return cls(product, weights, x, {"norm_D": 1 + jax.random.normal(key, (product.inputs,), jnp.bfloat16) / 8})
        if name == "head":
            return cls(product, weights, x, {})
        return cls(product, weights, x, {"residual_1F": jax.random.normal(key, (1, product.features), jnp.bfloat16)})

    def meant(self) -> np.ndarray:
        x, weight = np.asarray(self.x, np.float64), np.asarray(self.weights[0], np.float64)
        if "norm_D" in self.around:
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(self.around["norm_D"], np.float64)
        y = x @ weight.T
        if self.product.gated:
            gate, up = np.split(y, 2, axis=1)
            y = gate / (1 + np.exp(-gate)) * up
        return y + np.asarray(self.around.get("residual_1F", 0.0), np.float64)

    @property
    def act(self) -> Callable[[jax.Array], jax.Array] | None:
        return jax.nn.silu if self.product.gated else None

    @staticmethod
    def bytes(product: Product) -> int:
        return 2 * product.features * (1 + product.gated) * product.inputs


def ours(tile: AnyTile, act, x, weight, around):
    """The product by the kernel that the tile is of."""
    if isinstance(tile, Tile):
        return linear(x, weight, tile=tile, act=act, eps=1e-6, **around)
    if isinstance(tile, WideTile):
        return wide_linear(x, weight, around["live_3"], tile=tile, act=act, workers=jax.devices()[0].core_count)
    return many_rows_linear(x, weight, tile=tile, act=act)


def apart(found: Any, meant: np.ndarray) -> float:
    """How far, as a share of what is meant."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - meant) / np.linalg.norm(meant))


def check(call: Call, run: Callable, what: str) -> None:
    """Raises SystemExit if the product that `run` makes, or the sum of its parts, is not what the call means."""
    made = np.asarray(run(call.x, call.weights[0], call.around), np.float64)
    if not (error := apart(made.sum(0) if made.ndim == 3 else made, call.meant())) < RIGHT:
        raise SystemExit(f"{what} computes something else, {error:.2g} of it")


def timed(calls: Sequence[Callable], call: Call) -> list[float]:
    """Microseconds of each of `calls` on cold weights: the kernels of a run together, in the median of its runs."""
    marks, rounds = [], 2
    with tempfile.TemporaryDirectory() as folder:
        trace(folder)
        for _ in range(rounds):
            for i, run in enumerate(calls):
                for weight in call.weights:
                    out = run(call.x, weight, call.around)
                    marks.append(i)
            jax.block_until_ready(out)
        trace(None)
        kernels = sorted(
            (s for s in spans(Path(folder)) if s.plane.startswith("/device:GPU") and "Stream" in s.line), key=lambda s: s.start
        )
    per_run = len(kernels) / len(marks)
    if per_run != int(per_run):
        raise SystemExit(f"{len(kernels)} kernels ran in {len(marks)} runs: give each call the same number of kernels")
    found = defaultdict(list)
    for place, i in enumerate(marks):
        found[i].append(sum(s.duration for s in kernels[place * int(per_run) : (place + 1) * int(per_run)]))
    return [median(found[i]) for i in range(len(calls))]


def compiled(call: Call, run: Callable) -> Callable:
    """With the options of a step of so many rows: XLA's kernel for a product is then the one that it takes there."""
    options = product_options(Bucket(0, len(call.x)), jax.devices()[0], ours=False)
    return jax.jit(run, compiler_options=options).lower(call.x, call.weights[0], call.around).compile()
