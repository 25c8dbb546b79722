"""stories260K, a golden: its tokenizer splits text as llama2.c does, its folder gives llama2.c's text back, in numpy alone."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from converters.tokenizer import SPACE
from jaxllm.request import SamplingParams
from jaxllm.text import Detokenizer, Tokenizer

FOLDER = Path(__file__).parent / "stories260k"
GOLDENS = Path(__file__).parent / "goldens"
FIRST_LINE, STORY = (GOLDENS / "stories260k.txt").read_text().split("\n", 1)
IDS = [int(i) for i in FIRST_LINE.split()]  # what llama2.c's weights say greedily after token 1, 200 positions
STORY = STORY.removesuffix("\n")
FIRST_MERGED = 259


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FOLDER)


def test_encoding_is_that_of_llama2_c(tokenizer):
    """Goldens by llama2.c's loop over the pieces and scores of its own tok512.bin."""
    for text, ids in json.loads((GOLDENS / "stories260k_encoding.json").read_text()).items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([" ", "t", "h", "e", "a", "n", "d", " the", "\n", "é", "日", "l", "i", "y"]), min_size=1, max_size=30))
def test_merges_go_best_first(tokenizer, parts):
    """llama2.c's loop, on the shipped vocabulary: scores fall with the id, so the best piece is the one with the lowest."""
    text = "".join(parts)
    vocab = tokenizer._backend.get_vocab()
    pieces = {i: piece for piece, i in vocab.items()}
    ids = []
    for character in SPACE + text.replace(" ", SPACE):
        ids += [vocab[character]] if character in vocab else [vocab[f"<0x{byte:02X}>"] for byte in character.encode()]
    while True:
        pairs = [(vocab.get(pieces[a] + pieces[b], 0), at) for at, (a, b) in enumerate(pairwise(ids))]
        best, at = min(((new, at) for new, at in pairs if new >= FIRST_MERGED), default=(0, 0))
        if not best:
            break
        ids[at : at + 2] = [best]
    assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_tokens(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (512, 1, 2)
    assert tokenizer.decode([1, *IDS]) == STORY.removeprefix(" ")
    answer = Detokenizer(tokenizer, [1, *IDS[:4]], SamplingParams())
    assert answer.push(IDS[4:]) + answer.finish() == STORY.removeprefix(" Once upon a time")
    assert tokenizer.encode("Once upon a time") == [1, *IDS[:4]]


def test_chat_begins_a_story(tokenizer):
    messages = [{"role": "user", "content": "A story"}, {"role": "user", "content": "Once upon a time"}]
    assert tokenizer.chat(messages) == tokenizer.encode("A story\nOnce upon a time\n")


def test_the_folder_tells_the_same_story():
    config = json.loads((FOLDER / "config.json").read_text())
    ends = json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]
    weights, cache, ids = load_file(FOLDER / "model.safetensors"), {}, [1]
    while len(ids) <= len(IDS):
        ids.append(int(np.argmax(logits(weights, config, ids[-1], len(ids) - 1, cache))))
        if ids[-1] in ends:
            break
    assert ids[1:] == IDS


def logits(weights: dict, config: dict, token: int, position: int, cache: dict) -> np.ndarray:
    """One position of a Llama in plain numpy: Hugging Face's names and its half-split rope. `cache` grows by this position."""
    heads, kv_heads, size = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def norm(x, name):
        return x / np.sqrt((x * x).mean() + config["rms_norm_eps"]) * weights[name]

    def rotate(x):
        angle = position / config["rope_parameters"]["rope_theta"] ** (np.arange(0, size, 2) / size)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = weights["model.embed_tokens.weight"][token]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (weights[f"{at}self_attn.{n}_proj.weight"] @ h for n in "qkv")
        ks, vs = cache.setdefault(layer, ([], []))
        ks.append(rotate(k.reshape(kv_heads, size)))
        vs.append(v.reshape(kv_heads, size))
        q = rotate(q.reshape(heads, size)).reshape(kv_heads, heads // kv_heads, size)
        scores = np.exp(np.einsum("kgh,tkh->kgt", q, np.stack(ks)) / np.sqrt(size))
        attended = np.einsum("kgt,tkh->kgh", scores / scores.sum(-1, keepdims=True), np.stack(vs))
        x = x + weights[at + "self_attn.o_proj.weight"] @ attended.reshape(-1)
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = weights[at + "mlp.gate_proj.weight"] @ h, weights[at + "mlp.up_proj.weight"] @ h
        x = x + weights[at + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    return weights["model.embed_tokens.weight"] @ norm(x, "model.norm.weight")
