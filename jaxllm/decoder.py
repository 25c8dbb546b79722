"""The one decoder. What differs between models is data (ModelConfig) and which tensors the checkpoint has.

N tokens, M rows, Q query heads, K key/value heads, H features a head, D model, V vocab. How attention finds its keys
is the context's business (`ctx.attend`): the engine's writes pages, DenseContext here sees one whole sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx

from converters.model_config import Layer, ModelConfig
from jaxllm import parallel
from jaxllm.layers import ACTIVATIONS, MLP, Fused, Linear, MoE, Norm, Source, rotation, turn
from jaxllm.patch import Patching
from jaxllm.sharded import ShardedLinears
from pallas_kernels import Linears, Product, Stream

GATES = ("silu", "gelu_tanh")  # activations that the compilers of the fused kernels know
KV = Any  # one layer's cache, as its context understands it: a pair of page arrays, or None
ATTENTION = "attention"  # probabilities [Q, N, N] float32, row n over the tokens it saw


class Context(Protocol):
    """How a step's tokens see each other and the past. A pytree."""

    @property
    def linears(self) -> Linears | ShardedLinears | None:
        """How the products of a decode step run. None: as plain products, and so for a decoder that is not `usual`, and where a layer is
        visited."""
        ...

    def attend(
        self, q_NQH: jax.Array, k_NKH: jax.Array, v_NKH: jax.Array, kv: KV, *, scale: float, window: int | None, softcap: float | None
    ) -> tuple[jax.Array, KV]:
        """Writes this step's keys and values, then attends: ([N, Q, H], the layer's cache)."""
        ...

    def visits(self, layer: int, kv: KV) -> bool:
        """Does anybody look at this layer's activations? One that nobody looks at shares its trace with its like."""
        ...

    def visit(self, layer: int, site: str, value_ND: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
        """The activation at one of patch.SITES, as it is to be from here on, and the layer's cache."""
        ...


class ProductContext(Context, Protocol):
    """A context that has `linears`."""

    def attend_product(self, normed: Any, attn: "Attention", kv: KV, cos_sin: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, KV]:
        """`attend` to the product of `attn` with `normed`, which is what `linears.norm` gave."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseContext:
    """One whole sequence and no cache: plain causal attention, and the meaning that paged attention must keep.

    A layer's cache may be a dict: what it names, of patch.SITES and ATTENTION, is kept there.
    """

    linears = None
    patching: Patching | None = None

    def attend(self, q_NQH, k_NKH, v_NKH, kv, *, scale, window, softcap):
        N, Q, H = q_NQH.shape
        q_NKGH = q_NQH.reshape(N, k_NKH.shape[1], -1, H)
        s_KGNS = jnp.einsum("nkgh,skh->kgns", q_NKGH, k_NKH, preferred_element_type=jnp.float32) * scale
        s_KGNS = s_KGNS if softcap is None else jnp.tanh(s_KGNS / softcap) * softcap
        age_NS = jnp.arange(N)[:, None] - jnp.arange(N)
        seen_NS = (age_NS >= 0) & (age_NS < (window or N))
        p_KGNS = jax.nn.softmax(jnp.where(seen_NS, s_KGNS, -jnp.inf), -1)
        kv = _kept(kv, ATTENTION, p_KGNS.reshape(Q, N, N))
        return jnp.einsum("kgns,skh->nkgh", p_KGNS.astype(q_NQH.dtype), v_NKH).reshape(N, Q, H), kv

    def visits(self, layer: int, kv: KV) -> bool:
        return kv is not None or (self.patching is not None and self.patching.patch.visits(layer))

    def visit(self, layer: int, site: str, value_ND: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
        value_ND = value_ND if self.patching is None else self.patching(layer, site, value_ND)
        return value_ND, _kept(kv, site, value_ND)


def _kept(kv: KV, name: str, value: jax.Array) -> KV:
    return kv | {name: value} if kv is not None and name in kv else kv


class Attention(nnx.Module):
    def __init__(self, w: Source, name: str, c: ModelConfig, layer: Layer):
        q, k = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.qkv = Fused(w, [f"{name}.q", f"{name}.k", f"{name}.v"], [q, k, k], c.d_model, "heads")
        self.o = Linear(w, f"{name}.o", c.d_model, q, (None, "heads"))
        self.q_norm = _qk_norm(w, f"{name}.q_norm", c, "heads")
        self.k_norm = _qk_norm(w, f"{name}.k_norm", c, "kv")
        self.head_dim, self.window, self.softcap = c.head_dim, layer.window, c.attn_softcap
        self.scale = c.head_dim**-0.5 if c.attn_scale is None else c.attn_scale

    def __call__(self, x_ND: jax.Array, kv: KV, cos_sin: tuple[jax.Array, jax.Array] | None, ctx: Context) -> tuple[jax.Array, KV]:
        q, k, v = self.qkv(x_ND)
        q_NQH, k_NKH = self._heads(q, self.q_norm), self._heads(k, self.k_norm)
        if cos_sin is not None:
            q_NQH, k_NKH = turn(q_NQH, cos_sin), turn(k_NKH, cos_sin)
        v_NKH = self._heads(v, None)
        o_NQH, kv = ctx.attend(q_NQH, k_NKH, v_NKH, kv, scale=self.scale, window=self.window, softcap=self.softcap)
        return self.o(o_NQH.reshape(len(x_ND), -1)), kv

    def _heads(self, x: jax.Array, norm: Norm | None) -> jax.Array:
        """[N, heads * H] to [N, heads, H], normed on the way: over all heads (one-width weight) or in each."""
        if norm is not None and norm.weight.shape[0] == x.shape[1] and norm.weight.ndim == 1:
            return norm(x).reshape(len(x), -1, self.head_dim)
        x_NQH = x.reshape(len(x), -1, self.head_dim)
        return x_NQH if norm is None else norm(x_NQH)


def _qk_norm(w: Source, name: str, c: ModelConfig, axis: str) -> Norm | None:
    if f"{name}.weight" not in w:
        return None
    axes: parallel.Axes = {"feature": (None,), "head": (axis, None), "all": (axis,)}[c.qk_norm]
    return Norm(w, name, w.shape(f"{name}.weight"), c, axes)


class Block(nnx.Module):
    """x += attention; x += mlp. Each norm is there if the checkpoint has it: before, after, or both."""

    def __init__(self, w: Source, name: str, c: ModelConfig, layer: Layer):
        def norm(part: str) -> Norm | None:
            return Norm(w, f"{name}.{part}", (c.d_model,), c) if f"{name}.{part}.weight" in w else None

        self.attn_in, self.attn_out, self.mlp_in, self.mlp_out = norm("attn_in"), norm("attn_out"), norm("mlp_in"), norm("mlp_out")
        self.attn = Attention(w, name, c, layer)
        self.mlp = MoE(w, name, c, layer.experts) if layer.experts else MLP(w, name, c.d_ff, c)
        self.parallel = c.parallel

    def __call__(
        self, x_ND: jax.Array, kv: KV, cos_sin: tuple[jax.Array, jax.Array] | None, ctx: Context, visited: int | None = None
    ) -> tuple[jax.Array, KV]:
        """visited: this layer's number, if the context looks at its activations."""
        visit = _pass if visited is None else partial(ctx.visit, visited)
        x_ND, kv = visit("resid_pre", x_ND, kv)
        normed_ND = _apply(self.attn_in, x_ND)
        attn_ND, kv = self.attn(normed_ND, kv, cos_sin, ctx)
        attn_ND, kv = visit("attn_out", _apply(self.attn_out, attn_ND), kv)
        h_ND = x_ND + attn_ND
        # In parallel the MLP reads what attention read: through a norm of its own (GPT-NeoX) or the same one (Phi).
        mlp_in_ND = h_ND if not self.parallel else x_ND if self.mlp_in is not None else normed_ND
        mlp_ND, kv = visit("mlp_out", _apply(self.mlp_out, self.mlp(_apply(self.mlp_in, mlp_in_ND))), kv)
        return visit("resid_post", h_ND + mlp_ND, kv)

    def fused(self, x: Stream, kv: KV, cos_sin: tuple[jax.Array, jax.Array] | None, ctx: ProductContext) -> tuple[Stream, KV]:
        """The same of a usual block, through the fused kernels of `ctx.linears`."""
        run, attn, mlp = ctx.linears, self.attn, self.mlp
        assert run is not None and isinstance(mlp, MLP) and self.attn_in is not None and self.mlp_in is not None
        x, normed = run.norm(x, self.attn_in.rms())
        o_NQH, kv = ctx.attend_product(normed, attn, kv, cos_sin)
        x = run.add(x, o_NQH.reshape(len(o_NQH), -1), attn.o.weight[...])
        x, normed = run.norm(x, self.mlp_in.rms())
        hidden_NF = run.gated(normed, mlp.inputs.weight[...], ACTIVATIONS[mlp.act])
        return run.add(x, hidden_NF, mlp.down.weight[...]), kv

    def products(self, devices: int) -> list[Product]:
        """A device's part of the four products of a usual block."""
        attn, mlp = self.attn, self.mlp
        assert isinstance(mlp, MLP)
        (qkv, width), (hidden, _) = attn.qkv.weight.shape, mlp.inputs.weight.shape
        heads, gated = attn.o.weight.shape[1] // devices, hidden // 2 // devices
        return [Product(qkv // devices, width), Product(width, heads), Product(gated, width, True), Product(width, gated)]

    @property
    def usual(self) -> bool:
        """Can it run fused? RMS norms before and none behind, an MLP with a smooth gate, no bias but that of q, k and v."""
        attn, mlp = self.attn, self.mlp
        if self.parallel or self.attn_out is not None or self.mlp_out is not None or not isinstance(mlp, MLP) or not mlp.gated:
            return False
        heads = [norm for norm in (attn.q_norm, attn.k_norm) if norm is not None]
        return (
            mlp.act in GATES
            and all(norm is not None and norm.is_rms for norm in (self.attn_in, self.mlp_in))
            and all(linear.bias is None for linear in (attn.o, mlp.inputs, mlp.down))
            and all(norm.is_rms and norm.weight.shape == (attn.head_dim,) for norm in heads)
        )


def _pass(site: str, value_ND: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
    return value_ND, kv


def _apply(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


@partial(jax.jit, static_argnums=(0, 6))
def run_block(graphdef: nnx.GraphDef, state: nnx.State, x: Any, kv: KV, cos_sin, ctx: Context, visited: int | None) -> tuple[Any, KV]:
    """A jit within the step's jit: layers that differ only in their arrays are traced and lowered once, and called L times."""
    block = nnx.merge(graphdef, state)
    return block(x, kv, cos_sin, ctx, visited) if ctx.linears is None else block.fused(x, kv, cos_sin, cast(ProductContext, ctx))


class Decoder(nnx.Module):
    """Raises ConfigError if the mesh of `w` does not divide the model."""

    def __init__(self, w: Source, c: ModelConfig):
        parallel.check(w.mesh, c)
        self.embed = nnx.Param(w("embed.weight", (c.vocab_size, c.d_model), ("vocab", None)))
        learned = "positions.weight" in w
        self.positions = nnx.Param(w("positions.weight", w.shape("positions.weight"), (None, None))) if learned else None
        self.blocks = nnx.List([Block(w, f"layers.{i}", c, layer) for i, layer in enumerate(c.layers)])
        self.norm = Norm(w, "norm", (c.d_model,), c)
        self.head = Linear(w, "lm_head", c.vocab_size, c.d_model, ("vocab", None)) if "lm_head.weight" in w else None
        self.c = c

    def __call__(self, tokens_N: jax.Array, positions_N: jax.Array, cache: list[KV] | None, ctx: Context) -> tuple[jax.Array, list[KV]]:
        """(hidden [N, D] after the final norm, the cache after this step). `cache` has one entry a layer; None: nothing is kept."""
        # Of a single token XLA would make a slice, and of a slice of a table that lies on several devices a gathering of all of it.
        x_ND = self.embed[...][tokens_N] if len(tokens_N) > 1 else self.embed[...][jnp.repeat(tokens_N, 2)][:1]
        x_ND = x_ND * jnp.asarray(self.c.embed_scale, x_ND.dtype)  # rounded first, as Gemma was trained
        if self.positions is not None:
            x_ND += self.positions[...][positions_N + self.c.position_offset]
        turns = {rope: rotation(positions_N, rope) for layer in self.c.layers if (rope := layer.rope) is not None}
        kept = list(cache) if cache is not None else [None] * len(self.blocks)
        x: Any = x_ND if ctx.linears is None else Stream(x_ND)
        for i, (block, layer) in enumerate(zip(self.blocks, self.c.layers, strict=True)):
            graphdef, state = nnx.split(block)
            cos_sin = None if layer.rope is None else turns[layer.rope]
            x, kept[i] = run_block(graphdef, state, x, kept[i], cos_sin, ctx, i if ctx.visits(i, kept[i]) else None)
        return self.norm(x) if ctx.linears is None else ctx.linears.finish(x, self.norm.rms()), kept

    @property
    def usual(self) -> bool:
        """Can all of its blocks run fused, and its last norm?"""
        return self.norm.is_rms and all(block.usual for block in self.blocks)

    def logits(self, hidden_BD: jax.Array, multiply: Callable[[jax.Array, jax.Array], jax.Array] | None = None) -> jax.Array:
        """[B, V] float32: sampling compares logits whose differences bfloat16 would round away.

        multiply: what multiplies with the head's weights [V, D], in place of a plain product.
        """
        weight_VD = self.embed[...] if self.head is None else self.head.weight[...]
        if multiply is None:
            logits_BV = jnp.einsum("bd,vd->bv", hidden_BD, weight_VD, preferred_element_type=jnp.float32)
        else:
            logits_BV = multiply(hidden_BD, weight_VD)
        if self.head is not None and self.head.bias is not None:
            logits_BV += self.head.bias[...].astype(jnp.float32)
        cap = self.c.logit_softcap
        return logits_BV if cap is None else jnp.tanh(logits_BV / cap) * cap
