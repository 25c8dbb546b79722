"""From a model's name to its parts: checkpoint, plan, weights on the devices, tokenizer, compiled runner. One line a phase."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from converters import orbax
from converters.checkpoint import Checkpoint, tensor_shapes
from converters.model_config import ModelConfig
from jaxllm.config import EngineConfig
from jaxllm.decoder import Decoder
from jaxllm.devices import cache_folder, choose_devices, machine
from jaxllm.executables import Executables
from jaxllm.layers import Source
from jaxllm.lowering import helpers_for
from jaxllm.parallel import make_mesh
from jaxllm.params import abstract, compile_joins, layout
from jaxllm.patch import Patch
from jaxllm.plan import Plan, choose_dtype, dtype_bytes, make_plan
from jaxllm.request import ConfigError
from jaxllm.runner import Runner
from jaxllm.source import as_config_error, default_params, eos_ids, load_tokenizer, open_model, refuse_remote_code
from jaxllm.step import skips_padding, sums_by_mailboxes
from jaxllm.text import Tokenizer
from jaxllm.weights import Once, RandomWeights, Weights, WeightShapes, loading_bar
from pallas_kernels import WIDE_ROWS, capability_of, implementation_for

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


def load_engine_parts(config: EngineConfig, patch: Patch | None = None) -> Loaded:
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
    row_bytes = 0 if patch is None else patch.row_bytes
    plan = make_plan(config, checkpoint.config, checkpoint.dtype, machine(devices, config), weight_bytes, row_bytes)
    model = checkpoint.config.for_context(plan.max_model_len)
    if any(layer.experts for layer in model.layers):
        log.warning("mixture of experts: every expert runs for every token for now, so steps are slow")
    implementation = choose_attention(config, plan, model, devices[0])
    shapes = Decoder(WeightShapes(tensor_shapes(model), mesh, plan.dtype), model)
    plan = replace(plan, mailboxes=sums_by_mailboxes(shapes, plan, mesh, implementation, patch))
    if skips_padding(shapes, plan, mesh, implementation, patch):
        plan = plan.without_padding(WIDE_ROWS)
    log.info("%s on %s (%s attention): %s", config.model or "default model", devices[0].device_kind, implementation, plan)
    runner = Runner(shapes, plan, mesh, implementation, patch)
    # A patch is code that no file's name can tell, nor another process.
    kept = Executables(cache_folder() if patch is None else None, devices, plan, model, implementation)
    with ThreadPoolExecutor(1, "weights") as pool:
        weights = pool.submit(_timed_decoder, config, checkpoint, model, mesh, plan.dtype)
        with phase(f"compiling {len(plan.buckets) + 1} shapes"):
            try:
                runner.compile(kept, 0 if patch else helpers_for(devices))
            except NotImplementedError as error:  # an attention that was asked for by name
                raise ConfigError(f"--attention-backend {implementation}: {error}") from error
        decoder = weights.result()
    with phase("cache and first steps"):
        runner.start(decoder)
    return Loaded(
        name=config.model or "default",
        path=str(folder),
        plan=plan,
        runner=runner,
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        eos_ids=eos_ids(config, checkpoint, tokenizer),
        default_params=default_params(config, checkpoint),
    )


def choose_attention(config: EngineConfig, plan: Plan, model: ModelConfig, device: Any) -> str:
    """The attention that was asked for, or the fastest there is for this device, these heads and these pages."""
    if config.attention_backend != "auto":
        return config.attention_backend
    return implementation_for(
        capability_of(device),
        head_dim=model.head_dim,
        dtype=plan.page_dtype,
        page_size=plan.page_size,
        group=model.num_heads // model.num_kv_heads,
    )


def _timed_decoder(*args: Any) -> Decoder:
    with phase("weights"), as_config_error():
        return load_decoder(*args)


def load_decoder(config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, mesh: Mesh, dtype: str) -> Decoder:
    """The network with its weights on the devices, or with random ones. `model` is the checkpoint's config, its context chosen."""
    with contextlib.ExitStack() as stack:
        source: Source
        if config.load_format == "dummy":
            source = RandomWeights(tensor_shapes(model), mesh, dtype, config.seed, norm_bias=model.norm_bias)
        elif checkpoint.converted:
            source = Once(load_params(checkpoint, model, mesh, dtype), mesh, compile_joins(model, mesh))
        else:
            source = Weights(checkpoint.tensors, mesh, dtype, stack.enter_context(loading_bar(checkpoint.tensors)))
        decoder = Decoder(source, model)
        jax.block_until_ready(nnx.state(decoder))
    return decoder


def load_params(checkpoint: Checkpoint, model: ModelConfig, mesh: Mesh, dtype: str) -> dict[str, jax.Array]:
    """Every tensor by its name, unfused, each device reading its own part."""
    wanted = abstract(model, mesh, dtype)
    if checkpoint.converted:
        return orbax.restore(checkpoint.folder, wanted)
    with loading_bar(checkpoint.tensors) as progress:
        weights, axes = Weights(checkpoint.tensors, mesh, dtype, progress), layout(model, mesh).axes
        return jax.block_until_ready({name: weights(name, w.shape, axes[name]) for name, w in wanted.items()})


def _weight_bytes(config: EngineConfig, checkpoint: Checkpoint) -> int:
    elements = sum(math.prod(shape) for shape in tensor_shapes(checkpoint.config).values())
    return elements * dtype_bytes(choose_dtype(config.dtype, checkpoint.dtype)) // config.tensor_parallel_size


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    log.info("%-24s %6.2f s", what, time.perf_counter() - start)
