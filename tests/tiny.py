"""The golden checkpoints (tests/goldens, made by make_family_goldens.py) and our logits for them."""

import contextlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.checkpoint import open_checkpoint
from jaxllm.decoder import Decoder, DenseContext
from jaxllm.parallel import make_mesh
from jaxllm.weights import Weights

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(folder.name for folder in GOLDENS.iterdir() if folder.is_dir())
# One case for each model type, the one that shows most.
ONE_OF_EACH = [
    *("gemma", "gemma2", "gemma3", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "stablelm_parallel"),
]
TOKENS = np.load(GOLDENS / "tokens.npy")

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiling is most of what these tests do


@contextlib.contextmanager
def quickly():
    """As QUICK, for everything that is compiled meanwhile on a CPU, in other threads too."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, before or jax.devices()[0].platform == "cpu")
    try:
        yield
    finally:
        jax.config.update(name, before)


def decoder(name: str, devices: int = 1, dtype=jnp.float32) -> Decoder:
    checkpoint = open_checkpoint(GOLDENS / name)
    config = checkpoint.config.for_context(len(TOKENS))
    return Decoder(Weights(checkpoint.tensors, make_mesh(jax.devices()[:devices]), dtype), config)


def run(model: Decoder, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Logits [T, V] of one sequence, by the route the engine takes: a flat tuple of arrays through one jit."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)

    @partial(jax.jit, compiler_options=QUICK)
    def forward(leaves, tokens_N):
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        hidden_ND, _ = model(tokens_N, jnp.arange(len(tokens_N)), None, DenseContext())
        return model.logits(hidden_ND)

    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(tuple(leaves), jnp.asarray(tokens)))


def error(name: str, model: Decoder) -> float:
    """The largest difference from torch's logits, relative to the largest of them."""
    want = np.load(GOLDENS / name / "logits.npy")
    return float(np.abs(run(model) - want).max() / np.abs(want).max())
