"""A network's parameters as their user holds them: a dict of our tensor names, each [out, in] as Hugging Face stores it, nothing fused.

`load` gives them, `Model.forward` takes them, and so does `update_params`. What an engine makes of them is `weights.Given`'s to do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from converters.checkpoint import tensor_shapes
from converters.model_config import ModelConfig
from jaxllm import parallel
from jaxllm.decoder import Decoder
from jaxllm.parallel import Axes
from jaxllm.request import ConfigError
from jaxllm.weights import Join, Params, Shape, WeightShapes


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies, by logical axes, and which ones the network joins."""

    axes: dict[str, Axes]
    joins: frozenset[Join]


@lru_cache
def layout(model: ModelConfig, mesh: Mesh) -> Layout:
    """What the modules themselves say as they are built; nothing is computed."""
    axes: dict[str, Axes] = {}
    joins: set[Join] = set()

    class Asked(WeightShapes):
        def __call__(self, name: str, shape: Shape, where: Axes) -> Any:
            axes[name] = where
            return super().__call__(name, shape, where)

        def fused(self, names: Sequence[str], shapes: Sequence[Shape], where: Axes) -> Any:
            axes.update(dict.fromkeys(names, where))
            if len(names) > 1:
                joins.add(Join(tuple(shapes), where, mesh))
            return super().fused(names, shapes, where)

    Decoder(Asked(tensor_shapes(model), mesh, jnp.float32), model)
    return Layout(axes, frozenset(joins))


def abstract(model: ModelConfig, mesh: Mesh, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Every tensor's shape, type and place on the mesh."""
    axes = layout(model, mesh).axes
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=parallel.sharding(mesh, axes[name], shape))
        for name, shape in tensor_shapes(model).items()
    }


def compile_joins(model: ModelConfig, mesh: Mesh) -> dict[Join, Callable]:
    """Each of the network's joins as a jit."""
    return {how: jax.jit(how.__call__, out_shardings=how.sharding) for how in layout(model, mesh).joins}


def place(params: Params, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """`params` where `wanted` has them; an array that lies there already is taken as it is. Raises ConfigError unless they fit."""
    check(params, wanted)
    return {name: jax.device_put(params[name], w.sharding) for name, w in wanted.items()}


def check(params: Params, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises ConfigError unless names, shapes and types are those of `wanted`."""
    if missing := sorted(wanted.keys() - params.keys()):
        raise ConfigError(f"the parameters lack {missing[0]!r} ({len(missing)} in all); give every tensor that `load` gives")
    if extra := sorted(params.keys() - wanted.keys()):
        raise ConfigError(f"the parameters hold {extra[0]!r} ({len(extra)} such), which the model has no place for")
    for name, w in wanted.items():
        if params[name].shape != w.shape:
            raise ConfigError(f"{name!r} is {params[name].shape} among the parameters, but the model makes it {w.shape}")
        if params[name].dtype != w.dtype:
            raise ConfigError(
                f"{name!r} is {params[name].dtype} among the parameters, but the engine runs in {w.dtype}; cast them first, or start "
                f"the engine with dtype={params[name].dtype.name!r}"
            )
