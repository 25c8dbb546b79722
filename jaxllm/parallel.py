"""Meshes, and the one table that says which logical axis of an array lies on which axis of the mesh.

Everywhere else a shape is written with its logical axes ("heads", "kv", "mlp", "vocab", None); mesh names appear here only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from converters.model_config import ModelConfig
from jaxllm.request import ConfigError

Axes = tuple[str | None, ...]

RULES: dict[str | None, str | None] = {"heads": "tp", "kv": "tp", "mlp": "tp", "vocab": "tp", "devices": "tp", None: None}


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """One axis over `devices` (of jax.devices()). Auto: the compiler places what we do not, and no operation needs to name a sharding."""
    return Mesh(np.array(devices), ("tp",), axis_types=(AxisType.Auto,))


def shards(mesh: Mesh, axis: str | None) -> int:
    """In how many parts `mesh` cuts the logical axis."""
    name = RULES[axis]
    return 1 if name is None else mesh.shape[name]


def sharding(mesh: Mesh, axes: Axes, shape: tuple[int, ...] | None = None) -> Sharding:
    """Where an array of these logical axes lives. With a shape, a vocabulary that the devices do not divide is replicated.

    Raises ConfigError if any other axis of `shape` is not divided evenly.
    """
    if mesh.size == 1:  # the same place, but calls with numpy arguments take half as long as with a mesh of one
        return SingleDeviceSharding(mesh.devices.item())
    if shape is not None:
        axes = tuple(_divided(mesh, axis, size, shape) for axis, size in zip(axes, shape, strict=True))
    return NamedSharding(mesh, spec(axes))


def spec(axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(RULES[axis] for axis in axes))


def _divided(mesh: Mesh, axis: str | None, size: int, shape: tuple[int, ...]) -> str | None:
    if size % shards(mesh, axis) == 0:
        return axis
    if axis == "vocab":
        return None
    raise ConfigError(f"{shards(mesh, axis)} devices do not divide {size}, the {axis!r} axis of a tensor of shape {shape}")


def on_each(mesh: Mesh, local: Callable, given: Any, out: Any) -> Callable:
    """`local` on each device, for its parts of the arrays: kernels know no mesh. given, out: `spec`s. On one device, `local` itself."""
    if mesh.size == 1:
        return local
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)


def check(mesh: Mesh, config: ModelConfig) -> None:
    """Raises ConfigError unless every device gets whole heads and an equal part of each MLP."""
    dense = {config.d_ff for layer in config.layers if layer.experts is None}
    hidden = dense | {size for layer in config.layers if (e := layer.experts) for size in (e.d_ff, e.shared_d_ff) if size}
    parts = [("heads", config.num_heads, "attention heads"), ("kv", config.num_kv_heads, "key/value heads")]
    for axis, count, what in parts + [("mlp", size, "MLP features") for size in sorted(hidden)]:
        if count % (n := shards(mesh, axis)):
            raise ConfigError(f"tensor parallel size {n} does not divide the model's {count} {what}; choose a divisor of {count}")
