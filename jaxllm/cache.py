"""The KV pages on the device: one K and one V array a layer, [pages, kv_heads, page_size, head_dim], sharded over heads.

A (page, head) tile is contiguous, so one TMA copy brings it and heads shard for tensor parallelism. Pages start as
zeros: attention multiplies masked places by zero, and zero times an uninitialised NaN is NaN. Pages of fp8 hold every
number as it is, without a scale: no checkpoint that we load brings scales, and keys and values lie well within e4m3's 448.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from converters.model_config import ModelConfig
from jaxllm.parallel import sharding
from jaxllm.plan import Plan

Cache = list[tuple[jax.Array, jax.Array]]
PAGE_AXES = (None, "kv", None, None)


def cache_shapes(plan: Plan, model: ModelConfig, mesh: Mesh) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """Shapes and shardings of the pages; page 0, the trash page, comes on top of the plan's."""
    shape = (plan.num_pages + 1, model.num_kv_heads, plan.page_size, model.head_dim)
    pages = jax.ShapeDtypeStruct(shape, jnp.dtype(plan.page_dtype), sharding=sharding(mesh, PAGE_AXES))
    return [(pages, pages) for _ in model.layers]


def make_cache(plan: Plan, model: ModelConfig, mesh: Mesh) -> Cache:
    """Zeroed pages of every layer."""
    shapes = cache_shapes(plan, model, mesh)
    pages = shapes[0][0]
    zeros = jax.jit(lambda: jnp.zeros(pages.shape, pages.dtype), out_shardings=pages.sharding)
    return [(zeros(), zeros()) for _ in shapes]
