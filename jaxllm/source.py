"""Where a model's files are and what they say beside the weights: folder, tokenizer, end tokens, sampling defaults. No JAX."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.hub import fetch
from jaxllm.config import EngineConfig
from jaxllm.request import ConfigError
from jaxllm.text import Tokenizer


def default_model() -> Path:
    """The model that ships inside the package."""
    return Path(str(files("jaxllm") / "default_model"))


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


def eos_ids(config: EngineConfig, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
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


def default_params(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What generation_config.json says about sampling, under our names."""
    generation = _generation(config, checkpoint)
    return {ours: generation[theirs] for theirs, ours in _DEFAULTS.items() if generation.get(theirs) is not None}


@contextmanager
def as_config_error() -> Iterator[None]:
    """What converters say in their own errors is a ConfigError to the user."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
