"""From a model's name to its parts: checkpoint, plan, weights on the devices, tokenizer, compiled runner. One line a phase."""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from converters.checkpoint import Checkpoint, open_checkpoint, tensor_shapes
from converters.hub import fetch
from converters.model_config import ModelConfig
from jaxllm.config import EngineConfig
from jaxllm.decoder import Decoder
from jaxllm.devices import choose_devices, machine
from jaxllm.parallel import make_mesh
from jaxllm.plan import Plan, choose_dtype, dtype_bytes, make_plan
from jaxllm.request import ConfigError
from jaxllm.runner import Runner
from jaxllm.text import Tokenizer
from jaxllm.weights import RandomWeights, Weights, loading_bar
from pallas_kernels import capability_of, implementation_for

log = logging.getLogger("jaxllm")


@dataclass(frozen=True)
class Loaded:
    """What an engine is made of."""

    name: str
    path: str
    plan: Plan
    runner: Runner
    tokenizer: Tokenizer | None
    vocab_size: int
    eos_ids: frozenset[int]
    default_params: dict[str, Any]


def default_model() -> Path:
    """The model that ships inside the package."""
    return Path(str(files("jaxllm") / "default_model"))


def load_engine_parts(config: EngineConfig) -> Loaded:
    """Everything loaded and compiled. Raises ConfigError in a sentence if something does not fit."""
    refuse_remote_code(config)
    with phase("devices"):
        devices = choose_devices(config)
        mesh = make_mesh(devices)
    with phase("checkpoint"), as_config_error():
        folder, checkpoint = open_model(config)
    with phase("tokenizer"), as_config_error():
        tokenizer = load_tokenizer(config, folder)
    weight_bytes = _weight_bytes(config, checkpoint)
    plan = make_plan(config, checkpoint.config, checkpoint.dtype, machine(devices, config), weight_bytes)
    model = checkpoint.config.for_context(plan.max_model_len)
    if any(layer.experts for layer in model.layers):
        log.warning("mixture of experts: every expert runs for every token for now, so steps are slow")
    with phase("weights"), as_config_error():
        decoder = load_decoder(config, checkpoint, model, mesh, plan.dtype)
    implementation = implementation_for(
        capability_of(devices[0]),
        head_dim=model.head_dim,
        dtype=plan.page_dtype,
        page_size=plan.page_size,
        group=model.num_heads // model.num_kv_heads,
    )
    runner = Runner(decoder, plan, mesh, implementation)
    log.info("%s on %s (%s attention): %s", config.model or "default model", devices[0].device_kind, implementation, plan)
    with phase(f"compiling {len(plan.buckets) + 1} shapes"):
        runner.compile()
    return Loaded(
        name=config.model or "default",
        path=str(folder),
        plan=plan,
        runner=runner,
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        eos_ids=_eos_ids(config, checkpoint, tokenizer),
        default_params=_default_params(config, checkpoint),
    )


def load(
    path: str | Path, *, dtype: str = "auto", devices: Sequence[Any] | None = None, max_model_len: int | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """The bare module and its tokenizer, for research: `decoder(tokens_N, positions_N, None, DenseContext())` gives hidden states.

    path: a folder or a Hub id. The weights are sharded over `devices`, by default the first one. A longrope model gets the
    frequencies for `max_model_len` tokens, by default the longest context it was made for, as in the engine.
    """
    config = EngineConfig(model=str(path), dtype=dtype)
    folder, checkpoint = open_model(config)
    mesh = make_mesh(devices or jax.devices()[:1])
    model = checkpoint.config.for_context(max_model_len or checkpoint.config.max_position)
    decoder = load_decoder(config, checkpoint, model, mesh, choose_dtype(dtype, checkpoint.dtype))
    return decoder, load_tokenizer(config, folder)


def refuse_remote_code(config: EngineConfig) -> None:
    if config.trust_remote_code:
        raise ConfigError(
            "--trust-remote-code is not supported: jaxllm runs no code from checkpoints; leave it out, and the model loads if its "
            "architecture is one we know"
        )


def open_model(config: EngineConfig) -> tuple[Path, Checkpoint]:
    dummy = config.load_format == "dummy"
    folder = (
        default_model()
        if config.model is None
        else fetch(
            config.model, revision=config.revision, download_dir=config.download_dir, weights=not dummy, load_format=config.load_format
        )
    )
    return folder, open_checkpoint(folder, load_format=config.load_format, hf_overrides=config.hf_overrides)


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(config: EngineConfig, folder: Path) -> Tokenizer | None:
    """The model's tokenizer, or the one that was named. None for random weights without one: such an engine takes token ids only."""
    if config.tokenizer is not None:
        folder = fetch(config.tokenizer, revision=None, download_dir=config.download_dir, weights=False)
    elif config.load_format == "dummy" and not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    return Tokenizer.load(folder, chat_template=config.chat_template)


def load_decoder(config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, mesh: Mesh, dtype: str) -> Decoder:
    """The network with its weights on the devices, or with random ones. `model` is the checkpoint's config, its context chosen."""
    if config.load_format == "dummy":
        return Decoder(RandomWeights(tensor_shapes(model), mesh, dtype, config.seed, norm_bias=model.norm_bias), model)
    with loading_bar(checkpoint.tensors) as progress:
        decoder = Decoder(Weights(checkpoint.tensors, mesh, dtype, progress), model)
        jax.block_until_ready(nnx.state(decoder))
    return decoder


def _weight_bytes(config: EngineConfig, checkpoint: Checkpoint) -> int:
    elements = sum(math.prod(shape) for shape in tensor_shapes(checkpoint.config).values())
    return elements * dtype_bytes(choose_dtype(config.dtype, checkpoint.dtype)) // config.tensor_parallel_size


def _generation(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    if config.generation_config == "auto":
        return checkpoint.generation
    if config.generation_config == "vllm":
        return {}
    folder = Path(config.generation_config)
    try:
        return json.loads((folder / "generation_config.json" if folder.is_dir() else folder).read_text())
    except OSError as error:
        raise ConfigError(f"--generation-config {config.generation_config} cannot be read: {error.strerror}") from error


def _eos_ids(config: EngineConfig, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    named = [_generation(config, checkpoint).get("eos_token_id"), checkpoint.hf.get("eos_token_id"), tokenizer and tokenizer.eos_token_id]
    return frozenset(i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids]))


_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def _default_params(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What generation_config.json says about sampling, under our names."""
    generation = _generation(config, checkpoint)
    return {ours: generation[theirs] for theirs, ours in _DEFAULTS.items() if generation.get(theirs) is not None}


@contextmanager
def phase(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    log.info("%-24s %6.2f s", what, time.perf_counter() - start)


@contextmanager
def as_config_error() -> Iterator[None]:
    """What converters say in their own errors is a ConfigError to the user."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
