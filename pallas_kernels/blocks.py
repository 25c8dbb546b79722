"""Block sizes of the portable kernels: what was measured on this kind of device, else a default.

`tuning/<device kind>.json` holds measurements, written by `python -m bench.kernels --tune` on the device itself: one row a shape, with the
sizes that were fastest there. A shape that was not measured takes the nearest one of the same head_dim and dtype; one that is far from
all of them, or a device that nobody measured, takes the default, which was chosen on an H200 so that nothing spills registers and an L4's
shared memory suffices.

A plan knows how many lanes it has, but of the rows' lengths only the longest that could be. Decode sizes are therefore chosen by the number
of rows, and a row of the file is the best over several lengths; for prefill the longest length counts as well.
"""

import json
import math
import re
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Decode:
    """A decode program: tokens in its KV block, what Triton makes of it, and how many of it run on a multiprocessor at a time.

    early: from Hopper on, the next kernel may be launched before the parts are joined.
    """

    kv_block: int
    num_warps: int = 4
    num_stages: int = 2
    workers_per_core: int = 3
    early: bool = False


@dataclass(frozen=True)
class Prefill:
    """A prefill program: query tokens * heads of a group in its tile, tokens in its KV block, and what Triton makes of it."""

    lines: int
    kv_block: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Shape:
    """What block sizes are chosen by. rows: decode lanes, or chunk lanes of a prefill. length: tokens a row's pages hold at most."""

    head_dim: int
    group: int
    page_size: int
    dtype: str
    rows: int
    length: int

    def apart(self, row: dict) -> float:
        """How far a measured shape is from this one, in doublings of what its row names."""
        names = [name for name in ("group", "page_size", "rows", "length") if name in row]
        return sum(abs(math.log2(max(getattr(self, name), 1) / row[name])) for name in names)


NEAR = {"decode": 4.0, "prefill": 2.0}  # doublings: what was measured farther away says nothing
KINDS = {"decode": Decode, "prefill": Prefill}


def features(head_dim: int) -> int:
    """head_dim padded to what a Triton dot takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def blocks(op: str, device_kind: str, shape: Shape) -> Decode | Prefill:
    """The block sizes for "decode" or "prefill" of this shape on this kind of device, as JAX names it."""
    rows = [
        r
        for r in measured(device_kind)
        if (r["op"], r["dtype"]) == (op, shape.dtype) and features(r["head_dim"]) == features(shape.head_dim)
    ]
    rows = [row for row in rows if shape.apart(row) <= NEAR[op]]
    if not rows:
        return default(op, shape)
    nearest = min(rows, key=shape.apart)
    return KINDS[op](**{field.name: nearest[field.name] for field in fields(KINDS[op])})


def default(op: str, shape: Shape) -> Decode | Prefill:
    """Sizes for a shape that is far from all that were measured."""
    if op == "decode":
        return default_decode(shape.head_dim, shape.dtype, shape.rows)
    return default_prefill(shape.head_dim, shape.dtype)


def default_decode(head_dim: int, dtype, rows: int) -> Decode:
    """A KV block of at most 16 kB, so that K and V fit twice in the shared memory of the smallest card (99 kB).

    Few rows want few workers: a row that fewer share is joined from fewer parts.
    """
    size = jnp.dtype(dtype).itemsize
    kv_block = max(16, min(64, 16384 // (features(head_dim) * size)))
    if rows <= 8:
        return Decode(kv_block, num_stages=2, workers_per_core=2)
    return Decode(kv_block, 2, 3, 4) if size == 1 else Decode(kv_block)


def default_prefill(head_dim: int, dtype) -> Prefill:
    """For 16-bit pages and heads of 64 and 128, of ten tried on an H200 the best over 2048 and 8192 tokens together."""
    width, size = features(head_dim), jnp.dtype(dtype).itemsize
    if size == 4:
        return Prefill(32, 16, 8, 2) if width > 128 else Prefill(64, 32, 8, 2)
    if size == 2 and width in (64, 128):
        return {64: Prefill(128, 64, 8, 5), 128: Prefill(64, 32, 4, 4)}[width]
    return Prefill(128, 64, 8, 3) if width <= 128 else Prefill(64, 32, 8, 3)


def default_device() -> Any:
    """What runs what nobody sends elsewhere, and what is compiled for where nobody says otherwise."""
    given = jax.config.jax_default_device  # a device, the name of a platform, or None
    return jax.devices(given)[0] if given is None or isinstance(given, str) else given


def file_name(device_kind: str) -> str:
    """The file of a device's measurements: NVIDIA H200 -> nvidia-h200.json."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


@cache
def measured(device_kind: str) -> list[dict]:
    """The rows of a device's file; none if nobody measured it."""
    path = files("pallas_kernels") / "tuning" / file_name(device_kind)
    return json.loads(path.read_text())["rows"] if path.is_file() else []
