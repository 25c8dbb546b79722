"""Converts llama2.c's stories260K, which the tests keep as a golden, to a Hugging Face folder.

    python examples/convert_stories260k.py stories260K.bin tok512.bin FOLDER

Both files come from huggingface.co/karpathy/tinyllamas/tree/main/stories260K. Their layout is that of llama2.c's run.c
(github.com/karpathy/llama2.c): seven int32, then float32 tensors in a fixed order; and a score, a length and the bytes of
each piece. Letters: L layers, D model width, F hidden width, V vocabulary.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, processors

from converters.tokenizer import SPACE, byte_fallback_bpe

BOS, EOS = 1, 2
FIRST_MERGED = 259  # after <unk>, <s>, </s> and 256 bytes
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}\n{% endfor %}"


def main(model: Path, pieces: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = read_model(model.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write(folder / "config.json", config)
    # llama2.c ends at either, and samples like this unless told otherwise.
    chosen = {"do_sample": True, "temperature": 1.0, "top_p": 0.9}
    write(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": [EOS, BOS], **chosen})
    tokenizer(*read_pieces(pieces.read_bytes(), config["vocab_size"])).save(str(folder / "tokenizer.json"))
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **ends, "chat_template": TEMPLATE})


def read_model(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and the tensors under Hugging Face's names."""
    width, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data)
    head_dim = width // heads
    floats, at = np.frombuffer(data, np.float32, offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += (size := int(np.prod(shape)))
        return floats[at - size : at].reshape(shape)

    tensors = {"model.embed_tokens.weight": take(vocab, width)}
    per_layer = {  # in the file's order: all layers of one kind, then the next
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": np.stack([half_split(w, heads) for w in take(layers, width, width)]),
        "self_attn.k_proj": np.stack([half_split(w, kv_heads) for w in take(layers, kv_heads * head_dim, width)]),
        "self_attn.v_proj": take(layers, kv_heads * head_dim, width),
        "self_attn.o_proj": take(layers, width, width),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, hidden, width),
        "mlp.down_proj": take(layers, width, hidden),
        "mlp.up_proj": take(layers, hidden, width),
    }
    for name, stacked in per_layer.items():
        for layer in range(layers):
            tensors[f"model.layers.{layer}.{name}.weight"] = stacked[layer]
    tensors["model.norm.weight"] = take(width)
    take(2, context, head_dim // 2)  # rope's cosines and sines, which anyone can compute
    assert at == len(floats), f"{len(floats) - at} numbers left: the output head is not tied"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return config, {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection reordered: llama2.c rotates features 2i and 2i + 1 together, Hugging Face i and i + half."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def read_pieces(data: bytes, count: int) -> tuple[list[str], list[float | None]]:
    """Pieces in sentencepiece's spelling and their scores; None for those that merging does not make."""
    pieces, scores, at = [], [], 4  # the first int is the longest piece's length
    for i in range(count):
        score, length = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + length].decode()
        at += 8 + length
        pieces.append(text.replace(" ", SPACE) if i >= FIRST_MERGED else text.strip())
        scores.append(score if i >= FIRST_MERGED else None)
    return pieces, scores


def tokenizer(pieces: list[str], scores: list[float | None]):
    made = byte_fallback_bpe(pieces, scores, unk="<unk>", prefix_space=True)
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in pieces[: EOS + 1]])
    made.post_processor = processors.TemplateProcessing(single=f"{pieces[BOS]} $A", special_tokens=[(pieces[BOS], BOS)])
    return made


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
