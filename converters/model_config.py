"""What a network is, in our words: the only thing a decoder is told about a checkpoint. Plain data, no JAX."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary positions. `inv_freq` is [dim/2]; a head's first `dim` features turn, the rest pass.

    Longrope has a second set of frequencies for contexts beyond what the model first saw:
    `ModelConfig.for_context` chooses one set for good, so that a token's rotation never depends on its neighbours.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0  # multiplies cos and sin (longrope, yarn)


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
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: float = 0.0  # Gemma keeps norm weights as w-1
    act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    parallel: bool = False  # Phi, GPT-NeoX: attention and MLP both read the layer's input
    attn_scale: float | None = None  # None: head_dim ** -0.5
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    position_offset: int = 0  # OPT's position table starts two rows late
