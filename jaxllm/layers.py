"""The pieces a decoder layer is made of: projections, norms, rotary positions, MLP, mixture of experts.

Weights stay [out, in] as Hugging Face stores them; a bias, a gate or a shared expert is there if the checkpoint has it.
N tokens, D model, F hidden, E experts, Q query heads, K kv heads, H features a head.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
from converters.model_config import Experts, ModelConfig, Rope
from jaxllm import parallel
from jaxllm.weights import Given, Weights, WeightShapes

Source = Weights | WeightShapes | Given  # RandomWeights too

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Linear(nnx.Module):
    """y = x @ weight.T + bias."""

    def __init__(self, w: Source, name: str, out: int, in_: int, axes: parallel.Axes):
        self.weight = nnx.Param(w(f"{name}.weight", (out, in_), axes))
        self.bias = nnx.Param(w(f"{name}.bias", (out,), axes[:1])) if f"{name}.bias" in w else None

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        y_NF = jnp.einsum("nd,fd->nf", x_ND, self.weight[...])
        return y_NF if self.bias is None else y_NF + self.bias[...]


class Fused(nnx.Module):
    """Projections of one input as one matmul; `axis` is the logical axis that all of their outputs lie on.

    Rows go device by device (see Weights.fused): [N, devices, mine] splits along `mine`, so each device keeps to its own part.
    """

    def __init__(self, w: Source, names: Sequence[str], outs: Sequence[int], in_: int, axis: str):
        self.weight = nnx.Param(w.fused([f"{n}.weight" for n in names], [(out, in_) for out in outs], (axis, None)))
        biases = [f"{n}.bias" for n in names]
        self.bias = nnx.Param(w.fused(biases, [(out,) for out in outs], (axis,))) if biases[0] in w else None
        self.devices = parallel.shards(w.mesh, axis)
        self.outs = tuple(outs)

    def __call__(self, x_ND: jax.Array) -> list[jax.Array]:
        y_NF = jnp.einsum("nd,fd->nf", x_ND, self.weight[...])
        y_NF = y_NF if self.bias is None else y_NF + self.bias[...]
        y_NSF = y_NF.reshape(len(x_ND), self.devices, -1)
        ends = [sum(self.outs[: i + 1]) // self.devices for i in range(len(self.outs) - 1)]
        return [part.reshape(len(x_ND), -1) for part in jnp.split(y_NSF, ends, axis=2)]


class Norm(nnx.Module):
    """RMS or layer norm over the last axis, in float32: the sum of squares overflows float16 and is coarse in bfloat16."""

    def __init__(self, w: Source, name: str, shape: tuple[int, ...], c: ModelConfig, axes: parallel.Axes | None = None):
        axes = axes or (None,) * len(shape)
        self.weight = nnx.Param(w(f"{name}.weight", shape, axes))
        self.bias = nnx.Param(w(f"{name}.bias", shape, axes)) if f"{name}.bias" in w else None
        self.eps, self.offset, self.center = c.norm_eps, c.norm_bias, c.norm == "layer"

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True) if self.center else y
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        y = y * (self.weight[...].astype(jnp.float32) + self.offset)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    @property
    def is_rms(self) -> bool:
        """An RMS norm without bias."""
        return not self.center and self.bias is None

    def rms(self) -> pallas_kernels.Norm:
        """An RMS norm without bias, as the fused kernels take it."""
        return pallas_kernels.Norm(self.weight[...], self.eps, self.offset)


def rotation(positions_N: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [N, 1, turned pairs] float32: at position 100,000 bfloat16 could not tell neighbours apart."""
    angle_N1H = positions_N[:, None, None].astype(jnp.float32) * jnp.array(rope.inv_freq, jnp.float32)
    return jnp.cos(angle_N1H) * rope.scale, jnp.sin(angle_N1H) * rope.scale


def turn(x_NQH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates feature i of each head with feature i + pairs, for the first 2 * pairs features; the rest pass."""
    cos, sin = cos_sin
    pairs = cos.shape[-1]
    a, b, rest = x_NQH[..., :pairs], x_NQH[..., pairs : 2 * pairs], x_NQH[..., 2 * pairs :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x_NQH.dtype)


class MLP(nnx.Module):
    """Gated if the checkpoint has a gate."""

    def __init__(self, w: Source, name: str, size: int, c: ModelConfig):
        gated = f"{name}.gate.weight" in w
        inputs = [f"{name}.gate", f"{name}.up"] if gated else [f"{name}.up"]
        self.inputs = Fused(w, inputs, [size] * len(inputs), c.d_model, "mlp")
        self.down = Linear(w, f"{name}.down", c.d_model, size, (None, "mlp"))
        self.act, self.gated = c.act, gated

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.act]
        if not self.gated:
            return self.down(act(self.inputs(x_ND)[0]))
        gate_NF, up_NF = self.inputs(x_ND)
        return self.down(act(gate_NF) * up_NF)


class MoE(nnx.Module):
    """A mixture of experts. Every expert sees every token, one expert after the other: right, and slow until it has a kernel."""

    def __init__(self, w: Source, name: str, c: ModelConfig, e: Experts):
        self.router = Linear(w, f"{name}.router", e.count, c.d_model, (None, None))
        self.gate = nnx.Param(w(f"{name}.experts.gate.weight", (e.count, e.d_ff, c.d_model), (None, "mlp", None)))
        self.up = nnx.Param(w(f"{name}.experts.up.weight", (e.count, e.d_ff, c.d_model), (None, "mlp", None)))
        self.down = nnx.Param(w(f"{name}.experts.down.weight", (e.count, c.d_model, e.d_ff), (None, None, "mlp")))
        self.shared = MLP(w, name, e.shared_d_ff, c) if e.shared_d_ff else None
        self.shared_gate = Linear(w, f"{name}.shared_gate", 1, c.d_model, (None, None)) if e.shared_d_ff else None
        self.act, self.experts = c.act, e

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        share_NE = self.shares(x_ND)
        act = ACTIVATIONS[self.act]

        def add_expert(e: jax.Array, y_ND: jax.Array) -> jax.Array:
            gate_NF = jnp.einsum("nd,fd->nf", x_ND, self.gate[...][e])
            up_NF = jnp.einsum("nd,fd->nf", x_ND, self.up[...][e])
            out_ND = jnp.einsum("nf,df->nd", act(gate_NF) * up_NF, self.down[...][e])
            return y_ND + out_ND * share_NE[:, e, None]

        y_ND = jax.lax.fori_loop(0, self.experts.count, add_expert, jnp.zeros(x_ND.shape, jnp.float32)).astype(x_ND.dtype)
        if self.shared is not None and self.shared_gate is not None:
            y_ND += jax.nn.sigmoid(self.shared_gate(x_ND)) * self.shared(x_ND)
        return y_ND

    def shares(self, x_ND: jax.Array) -> jax.Array:
        """[N, E] float32: each token's weight for each expert, zero for those it was not sent to."""
        p_NE = jax.nn.softmax(self.router(x_ND).astype(jnp.float32), -1)
        top, which = jax.lax.top_k(p_NE, self.experts.per_token)
        top = top / top.sum(-1, keepdims=True) if self.experts.renormalize else top
        return jnp.zeros_like(p_NE).at[jnp.arange(len(x_ND))[:, None], which].set(top)
