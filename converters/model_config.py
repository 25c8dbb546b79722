"""What a network is, in our words: the only thing a decoder is told about a checkpoint, and the tensors it must find there.

Plain data, no JAX. V vocab, D model, F hidden, E experts, Q query heads, K kv heads, H features a head.
"""

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary positions. `inv_freq` is [dim/2]; a head's first `dim` features turn, the rest pass.

    Longrope has a second set of frequencies for contexts beyond what the model first saw:
    `ModelConfig.for_context` chooses one set for good, so that a token's rotation never depends on its neighbours.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0  # multiplies cos and sin (longrope, yarn)
    long_inv_freq: tuple[float, ...] | None = None  # longrope: the set for contexts longer than `long_after`
    long_after: int | None = None  # tokens


@dataclass(frozen=True)
class Experts:
    count: int
    per_token: int
    d_ff: int
    renormalize: bool  # do the chosen experts' weights sum to 1?
    shared_d_ff: int | None = None  # Qwen2-MoE: one always-on expert behind a sigmoid gate


@dataclass(frozen=True)
class Layer:
    """What differs from one layer to the next."""

    rope: Rope | None = None  # None: positions are learned (OPT)
    window: int | None = None  # None: every earlier token is seen
    experts: Experts | None = None  # None: one dense MLP


@dataclass(frozen=True)
class ModelConfig:
    """What is the same in every layer. A default means 'as in Llama'."""

    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    layers: tuple[Layer, ...]
    norm_eps: float
    max_position: int  # longest context the model was made for
    # Our names of the optional tensors this family holds, layer parts without `layers.N.`: "lm_head.weight", "q.bias", "gate.weight", ...
    parts: frozenset[str] = field(default_factory=frozenset)
    qk_norm: Literal["feature", "head", "all"] = "feature"  # its weight: [H] for every head, [heads, H], or [heads * H] over all of them
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: float = 0.0  # Gemma keeps norm weights as w-1
    act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    parallel: bool = False  # Phi, GPT-NeoX: attention and MLP both read the layer's input
    attn_scale: float | None = None  # None: head_dim ** -0.5
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    position_offset: int = 0  # OPT's position table starts two rows late

    def for_context(self, max_len: int) -> "ModelConfig":
        """This network with its rotary frequencies chosen, once, for contexts of up to `max_len` tokens.

        Longrope has two sets. Hugging Face picks by the length of the sequence at hand, so a growing sequence changes
        the rotation of tokens it has already cached; one choice for the whole engine is what the cached keys agree with.
        """
        return replace(self, layers=tuple(replace(layer, rope=_chosen(layer.rope, max_len)) for layer in self.layers))


def _chosen(rope: Rope | None, max_len: int) -> Rope | None:
    if rope is None or rope.long_inv_freq is None or rope.long_after is None:
        return rope
    return Rope(rope.long_inv_freq if max_len > rope.long_after else rope.inv_freq, rope.scale)


REQUIRED = frozenset({"embed.weight", "norm.weight", "q.weight", "k.weight", "v.weight", "o.weight", "up.weight", "down.weight"})


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `config` holds, by our names; it must hold these and no others."""
    held = REQUIRED | config.parts
    shapes = {name: shape for name, shape in _outer_shapes(config).items() if name in held}
    for i, layer in enumerate(config.layers):
        for part, shape in (_attention_shapes(config) | _mlp_shapes(config, layer)).items():
            if part in held or part.startswith(("experts.", "router.", "shared_gate.")):
                shapes[f"layers.{i}.{part}"] = shape
    return shapes


def _outer_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        "embed.weight": (c.vocab_size, c.d_model),
        "positions.weight": (c.max_position + c.position_offset, c.d_model),
        "norm.weight": (c.d_model,),
        "norm.bias": (c.d_model,),
        "lm_head.weight": (c.vocab_size, c.d_model),
        "lm_head.bias": (c.vocab_size,),
    }


def _attention_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    q, k = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for part, out, in_ in (("q", q, c.d_model), ("k", k, c.d_model), ("v", k, c.d_model), ("o", c.d_model, q)):
        shapes |= {f"{part}.weight": (out, in_), f"{part}.bias": (out,)}
    for part, heads in (("q_norm", c.num_heads), ("k_norm", c.num_kv_heads)):
        width = {"feature": (c.head_dim,), "head": (heads, c.head_dim), "all": (heads * c.head_dim,)}[c.qk_norm]
        shapes |= {f"{part}.weight": width, f"{part}.bias": width}
    for part in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
        shapes |= {f"{part}.weight": (c.d_model,), f"{part}.bias": (c.d_model,)}
    return shapes


def _mlp_shapes(c: ModelConfig, layer: Layer) -> dict[str, tuple[int, ...]]:
    e, shapes = layer.experts, {}
    if e is not None:
        shapes = {
            "router.weight": (e.count, c.d_model),
            "experts.gate.weight": (e.count, e.d_ff, c.d_model),
            "experts.up.weight": (e.count, e.d_ff, c.d_model),
            "experts.down.weight": (e.count, c.d_model, e.d_ff),
        }
        if e.shared_d_ff is None:
            return shapes
        shapes["shared_gate.weight"] = (1, c.d_model)
    size = e.shared_d_ff if e is not None and e.shared_d_ff is not None else c.d_ff
    for part, out, in_ in (("gate", size, c.d_model), ("up", size, c.d_model), ("down", c.d_model, size)):
        shapes |= {f"{part}.weight": (out, in_), f"{part}.bias": (out,)}
    return shapes
