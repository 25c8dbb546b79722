"""The model families: one row each, made of a config reader, the tensor names, and what the config means when it is silent.

A new family touches this file only (CONTRIBUTING shows how). Names are per family, never global: the same stored name is
Llama's MLP norm and Gemma 2's attention-out norm. The defaults are those of transformers' configuration classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .hf_config import Read
from .model_config import Experts, Layer, ModelConfig, Rope
from .rename import Interleaved, Rules, Split, Stack
from .rope import context_length, rope


@dataclass(frozen=True)
class Family:
    config: Callable[[Read], ModelConfig]
    names: Rules
    defaults: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- names
_L = r"(?:model\.)?layers\.(\d+)\."

LLAMA: Rules = {
    r"(?:model\.)?embed_tokens\.": "embed.",
    r"(?:model\.)?norm\.": "norm.",
    r"lm_head\.": "lm_head.",
    _L + r"self_attn\.([qkvo])_proj\.": r"layers.\1.\2.",
    _L + r"self_attn\.([qk])_norm\.": r"layers.\1.\2_norm.",
    _L + r"mlp\.(gate|up|down)_proj\.": r"layers.\1.\2.",
    _L + r"input_layernorm\.": r"layers.\1.attn_in.",
    _L + r"post_attention_layernorm\.": r"layers.\1.mlp_in.",
    r".*rotary_emb\.inv_freq$": None,
}
GEMMA2 = LLAMA | {
    _L + r"post_attention_layernorm\.": r"layers.\1.attn_out.",
    _L + r"pre_feedforward_layernorm\.": r"layers.\1.mlp_in.",
    _L + r"post_feedforward_layernorm\.": r"layers.\1.mlp_out.",
}
OLMO2 = {pattern: rule for pattern, rule in LLAMA.items() if "layernorm" not in pattern} | {
    _L + r"post_attention_layernorm\.": r"layers.\1.attn_out.",
    _L + r"post_feedforward_layernorm\.": r"layers.\1.mlp_out.",
}
PHI3 = LLAMA | {
    _L + r"self_attn\.qkv_proj\.": Split(
        (r"layers.\1.q.", r"layers.\1.k.", r"layers.\1.v."),
        lambda c: tuple(_head_dim(c) * heads for heads in (c["num_attention_heads"], _kv_heads(c), _kv_heads(c))),
    ),
    _L + r"mlp\.gate_up_proj\.": Split((r"layers.\1.gate.", r"layers.\1.up."), lambda c: (c["intermediate_size"],) * 2),
}
PHI = LLAMA | {
    _L + r"self_attn\.([qk])_layernorm\.": r"layers.\1.\2_norm.",
    _L + r"self_attn\.dense\.": r"layers.\1.o.",
    _L + r"mlp\.fc1\.": r"layers.\1.up.",
    _L + r"mlp\.fc2\.": r"layers.\1.down.",
    r"model\.final_layernorm\.": "norm.",
}
STABLELM = LLAMA | {
    _L + r"self_attn\.q_layernorm\.norms\.(\d+)\.": Stack(r"layers.\1.q_norm."),
    _L + r"self_attn\.k_layernorm\.norms\.(\d+)\.": Stack(r"layers.\1.k_norm."),
}
_X = r"(?:gpt_neox\.)?layers\.(\d+)\."
GPT_NEOX: Rules = {
    r"(?:gpt_neox\.)?embed_in\.": "embed.",
    r"(?:gpt_neox\.)?final_layer_norm\.": "norm.",
    r"embed_out\.": "lm_head.",
    _X + r"attention\.query_key_value\.": Interleaved(
        (r"layers.\1.q.", r"layers.\1.k.", r"layers.\1.v."), lambda c: c["num_attention_heads"]
    ),
    _X + r"attention\.dense\.": r"layers.\1.o.",
    _X + r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$": None,  # the causal mask and its fill value, kept as buffers
    _X + r"mlp\.dense_h_to_4h\.": r"layers.\1.up.",
    _X + r"mlp\.dense_4h_to_h\.": r"layers.\1.down.",
    _X + r"input_layernorm\.": r"layers.\1.attn_in.",
    _X + r"post_attention_layernorm\.": r"layers.\1.mlp_in.",
}
_O = r"(?:model\.)?decoder\.layers\.(\d+)\."
OPT: Rules = {
    r"(?:model\.)?decoder\.embed_tokens\.": "embed.",
    r"(?:model\.)?decoder\.embed_positions\.": "positions.",
    r"(?:model\.)?decoder\.final_layer_norm\.": "norm.",
    r"lm_head\.": "lm_head.",
    _O + r"self_attn\.([qkv])_proj\.": r"layers.\1.\2.",
    _O + r"self_attn\.out_proj\.": r"layers.\1.o.",
    _O + r"self_attn_layer_norm\.": r"layers.\1.attn_in.",
    _O + r"final_layer_norm\.": r"layers.\1.mlp_in.",
    _O + r"fc1\.": r"layers.\1.up.",
    _O + r"fc2\.": r"layers.\1.down.",
}
MIXTRAL = LLAMA | {
    _L + r"block_sparse_moe\.gate\.": r"layers.\1.router.",
    _L + r"block_sparse_moe\.experts\.(\d+)\.w1\.": Stack(r"layers.\1.experts.gate."),
    _L + r"block_sparse_moe\.experts\.(\d+)\.w2\.": Stack(r"layers.\1.experts.down."),
    _L + r"block_sparse_moe\.experts\.(\d+)\.w3\.": Stack(r"layers.\1.experts.up."),
}
QWEN_MOE = LLAMA | {
    _L + r"mlp\.gate\.": r"layers.\1.router.",
    _L + r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.": Stack(r"layers.\1.experts.\3."),
    _L + r"mlp\.shared_expert\.(gate|up|down)_proj\.": r"layers.\1.\2.",
    _L + r"mlp\.shared_expert_gate\.": r"layers.\1.shared_gate.",
}

# ---------------------------------------------------------------- parts: the optional tensors a family holds
GATED = {"gate.weight", "attn_in.weight", "mlp_in.weight"}
PLAIN = {"attn_in.weight", "attn_in.bias", "norm.bias", "up.bias", "down.bias"}
QKV_BIAS = {"q.bias", "k.bias", "v.bias"}
QKVO_BIAS = QKV_BIAS | {"o.bias"}
QK_NORM = {"q_norm.weight", "k_norm.weight"}
FOUR_NORMS = {"gate.weight", "attn_in.weight", "attn_out.weight", "mlp_in.weight", "mlp_out.weight"}


def _if(flag: Any, parts: set[str]) -> set[str]:
    return parts if flag else set()


def _attention_bias(c: Read) -> set[str]:
    return _if(c["attention_bias"], QKVO_BIAS)


# ---------------------------------------------------------------- configs
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"} | {
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def _kv_heads(c: Mapping[str, Any]) -> int:
    return c.get("num_key_value_heads") or c["num_attention_heads"]


def _head_dim(c: Mapping[str, Any]) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; we know {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _kinds(c: Read, slides: Callable[[int], bool]) -> list[str]:
    """Each layer's kind: what `layer_types` says, else sliding where `slides(i)`. Raises ValueError for a kind we do not know."""
    count = c["num_hidden_layers"]
    kinds = c.get("layer_types") or [SLIDING if slides(i) else FULL for i in range(count)]
    if len(kinds) != count or set(kinds) - {FULL, SLIDING}:
        raise ValueError(f"layer_types must name one of {[FULL, SLIDING]} for each of {count} layers, but it is {kinds}")
    return kinds


def _one_kind(c: Read, slides: bool) -> list[str]:
    """For families whose layers are all alike, where Hugging Face does not look at `layer_types`."""
    kind = SLIDING if slides else FULL
    if set(kinds := _kinds(c, lambda i: slides)) != {kind}:
        raise ValueError(f"in model type {c['model_type']!r} every layer is {kind}, but layer_types says {sorted(set(kinds))}")
    return kinds


def _config(
    c: Read,
    parts: set[str],
    *,
    kinds: list[str] | None = None,
    ropes: Mapping[str, Rope | None] | None = None,
    experts: Callable[[int], Experts | None] = lambda i: None,
    **differences: Any,
) -> ModelConfig:
    """What the families share; `differences` are ModelConfig's fields that this one sets itself."""
    kinds = kinds or _one_kind(c, slides=False)
    ropes = ropes or dict.fromkeys((FULL, SLIDING), rope(c, _head_dim(c)))
    windows = {FULL: None, SLIDING: c["sliding_window"] if SLIDING in kinds else None}
    if SLIDING in kinds and not windows[SLIDING]:
        raise ValueError("layers are to slide, but the config has no sliding_window")
    layers = tuple(Layer(ropes[kind], windows[kind], experts(i)) for i, kind in enumerate(kinds))
    shared = {
        "vocab_size": c["vocab_size"],
        "d_model": c["hidden_size"],
        "num_heads": c["num_attention_heads"],
        "num_kv_heads": _kv_heads(c),
        "head_dim": _head_dim(c),
        "d_ff": c.get("intermediate_size") or 0,
        "layers": layers,
        "max_position": context_length(c),
        "parts": frozenset(parts | _if(not c["tie_word_embeddings"], {"lm_head.weight"})),
    }
    if "norm_eps" not in differences:
        shared["norm_eps"] = c["rms_norm_eps"]
    if "act" not in differences:
        shared["act"] = _activation(c["hidden_act"])
    return ModelConfig(**shared | differences)


def llama(c: Read) -> ModelConfig:
    mlp_bias = _if(c["mlp_bias"], {"gate.bias", "up.bias", "down.bias"})
    return _config(c, GATED | _attention_bias(c) | mlp_bias)


def mistral(c: Read) -> ModelConfig:
    return _config(c, GATED, kinds=_one_kind(c, slides=bool(c["sliding_window"])))


def _uses_window(c: Read) -> bool:
    """Qwen 2.5 names a window that use_sliding_window then turns off; both keys are read in any case."""
    window, used = c["sliding_window"], c["use_sliding_window"]
    return bool(window and used)


def _upper_layers_slide(c: Read) -> list[str]:
    """Qwen: from layer max_window_layers up, if at all."""
    used, first = _uses_window(c), c["max_window_layers"]
    kinds = _kinds(c, lambda i: used and i >= first)
    if SLIDING in kinds and not used:
        raise ValueError("layer_types has sliding layers, but use_sliding_window is false or sliding_window is not set")
    return kinds


def qwen2(c: Read) -> ModelConfig:
    return _config(c, GATED | QKV_BIAS, kinds=_upper_layers_slide(c))


def qwen3(c: Read) -> ModelConfig:
    return _config(c, GATED | QK_NORM | _attention_bias(c), kinds=_upper_layers_slide(c))


def olmo2(c: Read) -> ModelConfig:
    parts = {"gate.weight", "attn_out.weight", "mlp_out.weight"} | QK_NORM | _attention_bias(c)
    return _config(c, parts, qk_norm="all")


def _gemma(c: Read, parts: set[str], **differences: Any) -> ModelConfig:
    """Gemma keeps norm weights as w - 1 and scales its embeddings."""
    differences = {"norm_bias": 1.0, "embed_scale": c["hidden_size"] ** 0.5} | differences
    return _config(c, parts | _attention_bias(c), **differences)


def gemma(c: Read) -> ModelConfig:
    c.get("hidden_activation")  # the first uploads say gelu, by either key, and mean the tanh form
    if (act := c["hidden_act"]) not in ("gelu", "gelu_pytorch_tanh"):
        raise ValueError(f"Gemma's activation is gelu_pytorch_tanh, but the config says {act!r}")
    return _gemma(c, GATED, act="gelu_tanh")


def gemma2(c: Read) -> ModelConfig:
    c.get("hidden_act")  # hidden_activation is the one that counts
    c.get("sliding_window")  # set even where layer_types lets no layer slide
    return _gemma(
        c,
        FOUR_NORMS,
        kinds=_kinds(c, lambda i: i % 2 == 0),
        act=_activation(c["hidden_activation"]),
        attn_scale=c["query_pre_attn_scalar"] ** -0.5,
        attn_softcap=c.get("attn_logit_softcapping"),
        logit_softcap=c.get("final_logit_softcapping"),
    )


def gemma3(c: Read) -> ModelConfig:
    """Gemma 3's text model: sliding layers turn by a rope of their own."""
    c.get("hidden_act")
    c.get("sliding_window")  # both as in Gemma 2
    pattern = c.get("sliding_window_pattern", 6)
    dim = _head_dim(c)
    if nested := c.get("rope_parameters"):
        if not {FULL, SLIDING} >= nested.keys():
            raise ValueError(f"Gemma 3's rope_parameters are one dict for each of {[FULL, SLIDING]}, but they are {sorted(nested)}")
        local = rope(c, dim, theta=1e4, kind=SLIDING)
    else:
        local = rope(
            Read({"max_position_embeddings": c["max_position_embeddings"]}, "config"), dim, theta=c.get("rope_local_base_freq", 1e4)
        )
    return _gemma(
        c,
        FOUR_NORMS | QK_NORM,
        kinds=_kinds(c, lambda i: (i + 1) % pattern != 0),
        ropes={FULL: rope(c, dim, theta=1e6, kind=FULL), SLIDING: local},
        max_position=c["max_position_embeddings"],  # says the scaled one, unlike other families' linear scaling
        act=_activation(c["hidden_activation"]),
        attn_scale=c["query_pre_attn_scalar"] ** -0.5,
        attn_softcap=c.get("attn_logit_softcapping"),
        logit_softcap=c.get("final_logit_softcapping"),
    )


def phi(c: Read) -> ModelConfig:
    qk_norm = _if(c["qk_layernorm"], QK_NORM | {"q_norm.bias", "k_norm.bias"})
    return _config(
        c,
        PLAIN | QKVO_BIAS | qk_norm | {"lm_head.bias"},
        ropes=dict.fromkeys((FULL, SLIDING), rope(c, _head_dim(c), partial=0.5)),
        norm="layer",
        norm_eps=c["layer_norm_eps"],
        parallel=True,
    )


def phi3(c: Read) -> ModelConfig:
    for key in ("rope_scaling", "rope_parameters"):
        scaling = c.get(key) or {}
        if (scaling.get("rope_type") or scaling.get("type")) in ("su", "yarn"):  # longrope's first names, in Phi-3 only
            c[key] = scaling | {"rope_type": "longrope"}
    for key in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini names them; 1 is "as ever"
        if c.get(key, 1) != 1:
            raise ValueError(f"config.json sets {key} to {c[key]}; only 1 is supported")
    return _config(c, GATED, kinds=_one_kind(c, slides=bool(c["sliding_window"])))


def stablelm(c: Read) -> ModelConfig:
    parallel = c["use_parallel_residual"]
    parts = {"gate.weight", "attn_in.weight", "attn_in.bias", "norm.bias"} | _if(c["use_qkv_bias"], QKV_BIAS)
    return _config(
        c,
        parts | _if(not parallel, {"mlp_in.weight", "mlp_in.bias"}) | _if(c["qk_layernorm"], QK_NORM),
        ropes=dict.fromkeys((FULL, SLIDING), rope(c, _head_dim(c), partial=0.25)),
        norm="layer",
        norm_eps=c["layer_norm_eps"],
        parallel=parallel,
        qk_norm="head",
    )


def gpt_neox(c: Read) -> ModelConfig:
    rotation = rope(c, _head_dim(c), theta=c.get("rotary_emb_base", 1e4), partial=c.get("rotary_pct", 0.25))
    return _config(
        c,
        PLAIN | {"mlp_in.weight", "mlp_in.bias"} | _attention_bias(c),
        ropes=dict.fromkeys((FULL, SLIDING), rotation),
        norm="layer",
        norm_eps=c["layer_norm_eps"],
        parallel=c["use_parallel_residual"],
    )


def opt(c: Read) -> ModelConfig:
    """OPT: learned positions, no rope, layer norms before each half."""
    if (c.get("word_embed_proj_dim") or c["hidden_size"]) != c["hidden_size"] or not c["do_layer_norm_before"]:
        raise ValueError("OPT-350m's projected embeddings and norms after each half are not supported; the other OPT sizes are")
    if c.get("_remove_final_layer_norm") or not c["layer_norm_elementwise_affine"]:
        raise ValueError("OPT without a final norm, or with norms without weights, is not supported")
    biases = _if(c["enable_bias"], QKVO_BIAS | {"up.bias", "down.bias"})
    norms = {f"{norm}.{kind}" for norm in ("attn_in", "mlp_in") for kind in ("weight", "bias")} | {"norm.bias"}
    return _config(
        c,
        norms | biases | {"positions.weight"},
        ropes={FULL: None},  # positions are learned
        d_ff=c["ffn_dim"],
        norm="layer",
        norm_eps=1e-5,
        act=_activation(c["activation_function"]),
        position_offset=2,
    )


def mixtral(c: Read) -> ModelConfig:
    experts = Experts(c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"], renormalize=True)
    return _config(c, GATED, kinds=_one_kind(c, slides=bool(c["sliding_window"])), experts=lambda i: experts)


def _some_layers(c: Read, experts: Experts) -> Callable[[int], Experts | None]:
    """Qwen MoE: every decoder_sparse_step-th layer has experts, except those in mlp_only_layers."""
    dense, step = c.get("mlp_only_layers") or (), c["decoder_sparse_step"]
    return lambda i: experts if i not in dense and (i + 1) % step == 0 else None


def qwen2_moe(c: Read) -> ModelConfig:
    experts = Experts(
        c["num_experts"],
        c["num_experts_per_tok"],
        c["moe_intermediate_size"],
        c["norm_topk_prob"],
        shared_d_ff=c["shared_expert_intermediate_size"],
    )
    used, last = _uses_window(c), c["max_window_layers"]
    kinds = _kinds(c, lambda i: used and i % 2 == 0 and i < last)
    return _config(c, GATED | _if(c["qkv_bias"], QKV_BIAS), kinds=kinds, experts=_some_layers(c, experts))


def qwen3_moe(c: Read) -> ModelConfig:
    count = c.get("num_experts") or c["num_local_experts"]
    experts = Experts(count, c["num_experts_per_tok"], c["moe_intermediate_size"], c["norm_topk_prob"])
    c.get("max_window_layers")  # Hugging Face's model does not look at it: all layers slide or none
    kinds = _one_kind(c, slides=_uses_window(c))
    return _config(c, GATED | QK_NORM | _attention_bias(c), kinds=kinds, experts=_some_layers(c, experts))


# ---------------------------------------------------------------- the table
_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
_QWEN = _LLAMA | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "head_dim": None}
_QWEN_MOE = _QWEN | {"decoder_sparse_step": 1, "norm_topk_prob": False, "qkv_bias": True}
_GEMMA = _LLAMA | {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
}
_GEMMA2 = _GEMMA | {"query_pre_attn_scalar": 256, "sliding_window": 4096}
_LAYERNORM = {"layer_norm_eps": 1e-5, "tie_word_embeddings": False, "qk_layernorm": False, "attention_bias": True}

FAMILIES = {
    "llama": Family(llama, LLAMA, _LLAMA),
    "mistral": Family(mistral, LLAMA, _LLAMA | {"sliding_window": 4096}),
    "qwen2": Family(qwen2, LLAMA, _QWEN),
    "qwen3": Family(qwen3, LLAMA, _QWEN | {"head_dim": 128}),
    "olmo2": Family(olmo2, OLMO2, _LLAMA | {"rms_norm_eps": 1e-5}),
    "gemma": Family(gemma, LLAMA, _GEMMA),
    "gemma2": Family(gemma2, GEMMA2, _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma3_text": Family(gemma3, GEMMA2, _GEMMA2),
    "phi": Family(phi, PHI, _LAYERNORM | {"hidden_act": "gelu_new"}),
    "phi3": Family(phi3, PHI3, _LLAMA | {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096}),
    "stablelm": Family(stablelm, STABLELM, _LAYERNORM | {"hidden_act": "silu", "use_qkv_bias": False, "use_parallel_residual": False}),
    "gpt_neox": Family(gpt_neox, GPT_NEOX, _LAYERNORM | {"hidden_act": "gelu", "use_parallel_residual": True}),
    "opt": Family(
        opt,
        OPT,
        {"tie_word_embeddings": True, "enable_bias": True, "layer_norm_elementwise_affine": True, "do_layer_norm_before": True}
        | {"activation_function": "relu"},
    ),
    "mixtral": Family(mixtral, MIXTRAL, _LLAMA | {"rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1e6}),
    "qwen2_moe": Family(qwen2_moe, QWEN_MOE, _QWEN_MOE),
    "qwen3_moe": Family(qwen3_moe, QWEN_MOE, _QWEN_MOE),
}
