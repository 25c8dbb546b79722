"""Embeddings as plain numbers: made of length 1, cut short, compared. No JAX."""

import math
from collections.abc import Iterable, Sequence

from jaxllm.request import RequestError


def unit(vector: Iterable[float]) -> tuple[float, ...]:
    """The vector of length 1 in the same direction; a zero stays one."""
    values = tuple(vector)
    length = math.sqrt(sum(v * v for v in values)) or 1.0
    return tuple(v / length for v in values)


def shortened(vector: Sequence[float], dimensions: int) -> tuple[float, ...]:
    """The first `dimensions` numbers, of length 1 again (arxiv.org/abs/2205.13147). Raises RequestError if there are fewer."""
    if dimensions > len(vector):
        raise RequestError(f"dimensions is {dimensions}, but this model's vectors have {len(vector)}", "dimensions")
    return unit(vector[:dimensions])


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two vectors of length 1: their product."""
    return sum(x * y for x, y in zip(a, b, strict=True))
