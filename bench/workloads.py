"""What the benches run and what they measure against: model shapes, workloads, the machine's own limits, vLLM's figures.

A limit is what the hardware allows and no program can beat: for decode the bytes that a step must read (every weight once, the
KV of every running token once) over the measured read bandwidth; for prefill the operations over the measured matrix rate; for
MIX a replay in arrival order whose steps cost exactly that. Plain arithmetic; no JAX.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DECODE_PROMPT = 512  # tokens
DECODE_STEPS = 256  # a decode step is (time for 257 output tokens - time for 1) / 256
DECODE_CONTEXT = "512-768"  # so the context is 640 tokens in the mean
PREFILL_BATCH = 16
PREFILL_PROMPTS = (2048, 8192)  # tokens
MIX_REQUESTS = 1000
MIX_ROWS = 1024  # rows of the replay behind the MIX limit: all requests can run at once
MIX_BUDGET = 4096  # tokens a step of that replay; from 2048 to 16384 it changes the limit by 2%

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


# config.json of each shape that has a name here: what a checkpoint of that model says, weights apart.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA | _sizes(4096, 32, 32, 8, 14336) | {"max_position_embeddings": 131072, "rope_scaling": _LLAMA31_ROPE},
    "llama-3-70b": _LLAMA | _sizes(8192, 80, 64, 8, 28672) | {"max_position_embeddings": 8192},
    "qwen2.5-3b": _QWEN | _sizes(2048, 36, 16, 2, 11008),
    "qwen2.5-0.5b": _QWEN | _sizes(896, 24, 14, 2, 4864),
}


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A path to load and its config.json: of a shape's name, a temporary folder that holds the config alone."""
    if model in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            config = SHAPES[model]
            (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))
            yield folder, config
        return
    path = Path(model) / "config.json"
    if not path.is_file():
        raise SystemExit(f"{model} is neither a folder with a config.json nor a shape; shapes: {', '.join(SHAPES)}")
    yield model, json.loads(path.read_text())


def model_name(model: str) -> str:
    """What rows call a model: a shape's name, or a folder's."""
    return model if model in SHAPES else Path(model).resolve().name


@dataclass(frozen=True)
class Machine:
    """One device's measured limits: bytes read a second, bfloat16 operations a second."""

    read: float
    ops: float


# Measured here: a reduction over 4.3 GB, and an 8192-cubed bfloat16 product.
MACHINES = {"NVIDIA H200": Machine(read=4.36e12, ops=790e12)}


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder that limits depend on. Weights and KV take two bytes a number; biases and norms are left out."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape | None":
        """From a config.json; None for a model whose limits these formulas do not describe."""
        if config.get("model_type") not in ("llama", "qwen2"):
            return None
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
        )

    @property
    def linear(self) -> int:
        """Parameters of the layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Parameters of the output head. A tied one is read here too; an embedding is not, but for a row a token."""
        return self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's K and V over all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def attention_ops(self, pairs: float) -> float:
        """Operations of `pairs` (query token, key token) pairs over all layers and heads: two products, each a multiply and an add."""
        return 4 * pairs * self.heads * self.head_dim * self.layers


def decode_limit(shape: Shape, machine: Machine, batch: int, tp: int = 1) -> float:
    """Seconds a decode step must take: `batch` rows at a mean context of 640 tokens."""
    context = DECODE_PROMPT + DECODE_STEPS // 2
    weights = 2 * (shape.linear + shape.head) / tp
    return (weights + batch * context * shape.kv_bytes / min(tp, shape.kv_heads)) / machine.read


def prefill_limit(shape: Shape, machine: Machine, prompt: int, tp: int = 1) -> float:
    """Prompt tokens a second at most, for prompts of `prompt` tokens; the head runs on the last token only and is left out."""
    ops = 2 * shape.linear + shape.attention_ops(prompt / 2)
    return tp * machine.ops / ops


def long_limits(shape: Shape, machine: Machine, prompt: int, tp: int = 1) -> tuple[float, float]:
    """Seconds that one prompt must take, and each of the DECODE_STEPS steps behind it."""
    ops = 2 * shape.linear * prompt + shape.attention_ops(prompt**2 / 2)
    weights, context = 2 * (shape.linear + shape.head) / tp, prompt + DECODE_STEPS / 2
    return ops / tp / machine.ops, (weights + context * shape.kv_bytes / min(tp, shape.kv_heads)) / machine.read


def mix_limit(shape: Shape, machine: Machine, tp: int = 1) -> float:
    """Seconds that MIX must take: requests in arrival order, decodes first, the rest of each step's budget given to prompts.

    A step costs its matrices (the larger of reading them and computing with them), plus its attention (reading the KV of
    every decoding row; computing the chunks).
    """
    prompts, outputs = mix_lengths()
    running: list[tuple[int, int]] = []  # (context, tokens still to come)
    waiting = list(zip(prompts.tolist(), outputs.tolist(), strict=True))[::-1]
    computed = 0  # tokens of waiting[-1] already computed
    seconds = 0.0
    weights = 2 * (shape.linear + shape.head) / tp / machine.read
    while running or waiting:
        context = sum(length for length, _ in running)
        pairs, tokens, sampled = 0.0, len(running), len(running)
        running = [(length + 1, left - 1) for length, left in running if left > 1]
        while waiting and (room := MIX_BUDGET - tokens) > 0 and sampled < MIX_ROWS:
            prompt, output = waiting[-1]
            chunk = min(room, prompt - computed)
            pairs += chunk * (computed + chunk / 2)
            computed, tokens = computed + chunk, tokens + chunk
            if computed == prompt:
                waiting.pop()
                computed, sampled = 0, sampled + 1
                running += [(prompt + 1, output - 1)] if output > 1 else []
        matrices = 2 * (shape.linear * tokens + shape.head * sampled) / tp / machine.ops
        reading = context * shape.kv_bytes / min(tp, shape.kv_heads) / machine.read
        seconds += max(weights, matrices) + reading + shape.attention_ops(pairs) / tp / machine.ops
    return seconds


def serve_limit(shape: Shape, machine: Machine, clients: int, prompt: int, output: int, tp: int = 1) -> float:
    """Output tokens a second at most, when `clients` at a time send prompts of `prompt` tokens and get `output` each.

    While every client gets one answer there are `output` steps. They read the weights so many times, or compute with them for so
    many tokens, whichever takes longer, and they read the KV of every row, which on the mean holds the prompt and half the answer.
    """
    reading = output * 2 * (shape.linear + shape.head) / machine.read
    computing = clients * 2 * (shape.linear * (prompt + output) + shape.head * output) / machine.ops
    kv = output * clients * (prompt + output / 2) * shape.kv_bytes / min(tp, shape.kv_heads) / machine.read
    return clients * output / (max(reading, computing) / tp + kv)


def mix_lengths() -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths of the 1000 requests of MIX: 298,901 tokens in, 209,177 out."""
    rng = np.random.default_rng(1)
    prompts = np.clip(rng.lognormal(5.3, 1.0, MIX_REQUESTS), 4, 2048).astype(int)
    outputs = np.clip(rng.lognormal(5.0, 0.8, MIX_REQUESTS), 4, 1024).astype(int)
    return prompts, outputs


def random_prompts(rng: np.random.Generator, lengths: list[int], vocab: int) -> list[list[int]]:
    """Prompts of random token ids, so that no two share a prefix and no cache can help."""
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


# vLLM 0.24.0 with its defaults through its offline API, same workloads, one H200 (driver 580.159, CUDA 13.0), bfloat16.
# (model, row name, batch or None, prompt tokens or None): value in the row's unit.
_VLLM_DECODE_MS = {
    "llama-3.1-8b": {1: 4.92, 8: 5.14, 32: 5.87, 64: 6.79, 128: 9.00, 256: 14.56},
    "qwen2.5-3b": {1: 3.00, 64: 3.79, 256: 10.24},
    "qwen2.5-0.5b": {1: 1.36, 8: 1.62, 64: 2.40, 256: 5.40},
}
_VLLM_PREFILL_TOK_S = {
    "llama-3.1-8b": {2048: 42278, 8192: 38148},
    "qwen2.5-3b": {2048: 96655},
    "qwen2.5-0.5b": {2048: 464612},
}
_VLLM_MIX_S = {"llama-3.1-8b": (20.1, 24.0), "qwen2.5-3b": (12.0, 20.3), "qwen2.5-0.5b": (7.9, 11.5)}


# Behind its HTTP server, 1000 requests of 299 tokens in and 209 out: (output tok/s, mean TTFT, p99 ITL) by clients; and seconds from
# process start to /health, nothing cached.
_VLLM_SERVE = {
    "llama-3.1-8b": {1: (205, 18.4, 5.29), 256: (11776, 990, 190)},
    "qwen2.5-0.5b": {1: (565, 13.7, 2.74), 256: (13947, 418, 41)},
}
_SERVE_ROWS = ("serve_tok_s", "serve_ttft_mean_ms", "serve_itl_p99_ms")
_VLLM_START_COLD_S = {"llama-3.1-8b": 100, "qwen2.5-0.5b": 94}


def vllm_figure(device: str, row: dict[str, Any]) -> float | None:
    """vLLM's figure for a result row, if it was measured: on the same device, one GPU, bfloat16."""
    model, name = row["model"], row["name"]
    if device != "NVIDIA H200" or row["tp"] != 1 or row["dtype"] != "bfloat16":
        return None
    if name == "decode_step_ms":
        return _VLLM_DECODE_MS.get(model, {}).get(row["batch"])
    if name == "prefill_tok_s":
        return _VLLM_PREFILL_TOK_S.get(model, {}).get(row["context"]) if row["batch"] == PREFILL_BATCH else None
    if name in _SERVE_ROWS:
        found = _VLLM_SERVE.get(model, {}).get(row["clients"]) if _is_published_load(row) else None
        return found and found[_SERVE_ROWS.index(name)]
    if name == "start_cold_s":
        return _VLLM_START_COLD_S.get(model)
    if name in ("mix_s", "mix_sampled_s"):
        return _VLLM_MIX_S.get(model, (None, None))[name == "mix_sampled_s"]
    return None


def _is_published_load(row: dict[str, Any]) -> bool:
    return (row["lengths"], row.get("input"), row.get("output"), row.get("rate")) == ("fixed", 299, 209, None)


def limit(device: str, shape: Shape | None, row: dict[str, Any]) -> float | None:
    """The device's own limit for a result row, in the row's unit; None if device, model or dtype have no formula here."""
    machine = MACHINES.get(device)
    if machine is None or shape is None or row["dtype"] not in ("bfloat16", "float16"):
        return None
    if row["name"] == "decode_step_ms":
        return 1e3 * decode_limit(shape, machine, row["batch"], row["tp"])
    if row["name"] in ("long_ttft_s", "long_decode_step_ms"):
        first, step = long_limits(shape, machine, row["context"], row["tp"])
        return first if row["unit"] == "s" else 1e3 * step
    if row["name"] == "prefill_tok_s":
        return prefill_limit(shape, machine, row["context"], row["tp"])
    if row["name"] in ("serve_tok_s", "clients_tok_s") and row["clients"] and row["lengths"] == "fixed" and "rate" not in row:
        return serve_limit(shape, machine, row["clients"], row["input"], row["output"], row["tp"])
    return mix_limit(shape, machine, row["tp"]) if row["name"] in ("mix_s", "mix_sampled_s") else None
