"""The network as training sees it: a Llama over whole rows, in Hugging Face's names and layout, so that what is trained is what ships.

The engine's decoder computes the same numbers; this one takes a batch of rows, and cuDNN's attention with its gradient on a GPU.
B rows, T tokens, D model, H features a head, Q query heads, K key/value heads, F hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Size:
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int = 4096
    head_dim: int = 64
    context: int = 2048
    theta: float = 10000.0
    eps: float = 1e-5

    def hf_config(self, bos: int, ends: list[int], pad: int) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.d_model,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "rope_theta": self.theta,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": bos,
            "eos_token_id": ends,
            "pad_token_id": pad,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }


SIZES = {
    "default": Size(layers=8, d_model=512, heads=8, kv_heads=2, hidden=1024),
    "draft": Size(layers=3, d_model=192, heads=3, kv_heads=1, hidden=512),
    "smoke": Size(layers=2, d_model=64, heads=2, kv_heads=1, hidden=96, head_dim=32),
}


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    D, F, q, k = size.d_model, size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
    layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (k, D),
        "self_attn.v_proj": (k, D),
        "self_attn.o_proj": (D, q),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    named = {f"model.layers.{i}.{name}.weight": shape for i in range(size.layers) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (size.vocab, D), **named, "model.norm.weight": (D,)}


def init(size: Size, seed: int) -> Params:
    """float32 parameters. What writes to the residual stream begins smaller, by the depth (GPT-2's way)."""
    random = np.random.default_rng(seed)

    def one(name: str, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            return jnp.ones(shape, jnp.float32)
        scale = 0.02 / (2 * size.layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        return jnp.asarray(random.normal(0, scale, shape), jnp.float32)

    return {name: one(name, shape) for name, shape in shapes(size).items()}


def logits(params: Params, tokens_BT: jax.Array, size: Size, attention: str = "xla") -> jax.Array:
    """[B, T, V] in float32; everything before the logits in the parameters' own type."""
    x = params["model.embed_tokens.weight"][tokens_BT]
    turn = rotation(tokens_BT.shape[1], size)
    for i in range(size.layers):
        x = block({name.split(f"layers.{i}.")[1]: p for name, p in params.items() if f"layers.{i}." in name}, x, turn, size, attention)
    x = norm(x, params["model.norm.weight"], size.eps)
    return jnp.einsum("btd,vd->btv", x, params["model.embed_tokens.weight"], preferred_element_type=jnp.float32)


def block(p: Params, x: jax.Array, turn, size: Size, attention: str) -> jax.Array:
    B, T, _ = x.shape
    h = norm(x, p["input_layernorm.weight"], size.eps)
    q, k, v = ((h @ p[f"self_attn.{n}_proj.weight"].T).reshape(B, T, -1, size.head_dim) for n in "qkv")
    a = jax.nn.dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True, implementation=attention)  # type: ignore[arg-type]
    x = x + a.reshape(B, T, -1) @ p["self_attn.o_proj.weight"].T
    h = norm(x, p["post_attention_layernorm.weight"], size.eps)
    return x + (jax.nn.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """In float32, because a bfloat16 sum of squares over D loses half its digits."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)).astype(x.dtype) * weight


def rotation(T: int, size: Size) -> tuple[jax.Array, jax.Array]:
    angle = jnp.arange(T)[:, None] / size.theta ** (jnp.arange(0, size.head_dim, 2) / size.head_dim)
    return jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Hugging Face's rope: the first half of a head's features turns against the second."""
    cos, sin = turn
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
