"""Makes tests/goldens: tiny random models of every family, saved by transformers, with the logits that torch computes.

Run by hand where both are (the tests need neither of them, nor this file):

    python tests/make_family_goldens.py [case ...]

Every parameter is drawn at random, norms and biases too, so that a norm left out or a bias forgotten shows. Weights are kept
in float16 to halve the files, and the logits are computed from those same rounded values in float32.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

GOLDENS = Path(__file__).parent / "goldens"
TOKENS = np.random.default_rng(0).integers(1, 64, size=24)

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FOUR = SMALL | {"num_hidden_layers": 4}
MHA = SMALL | {"num_key_value_heads": 4}
NEOX: dict[str, Any] = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 9.0]}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CASES = {
    "llama": hf.LlamaConfig(**SMALL),
    "llama_bias_tied": hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama31": hf.LlamaConfig(**SMALL, head_dim=16, rope_parameters=LLAMA3),
    "llama_linear": hf.LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "llama_bin": hf.LlamaConfig(**SMALL),
    "llama_sharded": hf.LlamaConfig(**SMALL),
    "llama_sharded_bin": hf.LlamaConfig(**SMALL),
    "yi": hf.LlamaConfig(**SMALL | {"num_key_value_heads": 1}, rope_parameters={"rope_type": "default", "rope_theta": 5e6}),
    "mistral": hf.MistralConfig(**SMALL, sliding_window=5, head_dim=16),
    "qwen2": hf.Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=5),
    "qwen2_window": hf.Qwen2Config(**FOUR, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen2_yarn": hf.Qwen2Config(**SMALL | {"tie_word_embeddings": True}, rope_parameters=YARN),
    "yarn_mscale": hf.LlamaConfig(
        **SMALL,
        head_dim=16,
        rope_parameters=YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
    ),
    "yarn_attention_factor": hf.LlamaConfig(**SMALL, head_dim=16, rope_parameters=YARN | {"attention_factor": 1.3}),
    "qwen3": hf.Qwen3Config(**SMALL, head_dim=16, attention_bias=True),
    "gemma": hf.GemmaConfig(**SMALL, head_dim=16),
    "gemma2": hf.Gemma2Config(**FOUR, head_dim=16, sliding_window=5, query_pre_attn_scalar=24),
    "gemma3": hf.Gemma3TextConfig(
        **FOUR, head_dim=16, sliding_window=5, query_pre_attn_scalar=24, layer_types=[SLIDING, SLIDING, FULL, SLIDING]
    ),
    "gemma3_old": hf.Gemma3TextConfig(
        **FOUR | {"num_hidden_layers": 6},
        head_dim=16,
        sliding_window=5,
        query_pre_attn_scalar=24,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "phi": hf.PhiConfig(**MHA, qk_layernorm=True),
    "phi_plain": hf.PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "phi3": hf.Phi3Config(**SMALL, sliding_window=7),
    "phi3_short": hf.Phi3Config(**SMALL, original_max_position_embeddings=32, rope_parameters=LONG),
    "phi3_long": hf.Phi3Config(**SMALL, original_max_position_embeddings=16, rope_parameters=LONG),
    "olmo2": hf.Olmo2Config(**SMALL),
    "stablelm": hf.StableLmConfig(**MHA, use_qkv_bias=True, partial_rotary_factor=0.5),
    "stablelm_parallel": hf.StableLmConfig(**SMALL, use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.5),
    "gpt_neox": hf.GPTNeoXConfig(**NEOX, rotary_pct=0.5),
    "gpt_neox_serial": hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5),
    "opt": hf.OPTConfig(**{k: v for k, v in NEOX.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": hf.Qwen2MoeConfig(**SMALL, **MOE, shared_expert_intermediate_size=40, norm_topk_prob=False),
    "qwen3_moe": hf.Qwen3MoeConfig(**SMALL, **MOE, head_dim=16, norm_topk_prob=True),
    "qwen3_moe_some": hf.Qwen3MoeConfig(**FOUR, **MOE, head_dim=16, norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[3]),
}


def make(name: str, config: hf.PreTrainedConfig) -> None:
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(sum(map(ord, name)))
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.3).half().float())
        logits = model(torch.tensor(TOKENS)[None]).logits[0].numpy()
    shards = {"max_shard_size": "40KB"} if "sharded" in name else {}
    model.save_pretrained(folder, save_original_format=True, **shards)
    for file in folder.glob("*.safetensors"):
        save_file({key: value.half() for key, value in load_file(file).items()}, file)
    if name.endswith("bin"):
        _as_pytorch_bin(folder)
    config_file = folder / "config.json"
    config_file.write_text(config_file.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))
    if name in OLD_SPELLING:
        _as_transformers_4(config_file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.save(folder / "logits.npy", logits)


def _as_pytorch_bin(folder: Path) -> None:
    """The same shards as torch used to save them."""
    for file in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(file), folder / file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin"))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


OLD_SPELLING = ("llama31", "phi3_long", "gemma3_old", "phi_plain", "qwen2_yarn", "gpt_neox_serial")


def _as_transformers_4(path: Path) -> None:
    """rope_theta, rope_scaling and torch_dtype, where transformers 5 writes rope_parameters and dtype."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    if config["model_type"] == "gemma3_text":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        del config["layer_types"]
        rope = rope["full_attention"]
    partial = rope.pop("partial_rotary_factor", None)
    theta = rope.pop("rope_theta")
    if config["model_type"] == "gpt_neox":
        config |= {"rotary_emb_base": theta, "rotary_pct": partial}
    else:
        config["rope_theta"] = theta
        config |= {"partial_rotary_factor": partial} if partial is not None else {}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    for case in sys.argv[1:] or CASES:
        make(case, CASES[case])
    np.save(GOLDENS / "tokens.npy", TOKENS)
