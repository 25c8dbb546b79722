"""Rotary frequencies from a config, in either spelling: `rope_theta` with `rope_scaling` (old), `rope_parameters` (new).

Formulas as in transformers' modeling_rope_utils.py, in double precision; angles are float32 in the decoder.
"""

import math
from typing import Any

from .hf_config import Read
from .model_config import Rope


def rope(c: Read, head_dim: int, *, theta: float = 1e4, partial: float = 1.0, kind: str | None = None) -> Rope:
    """The rotation of layers of `kind` ("full_attention", "sliding_attention"; None: the config has one for all).

    theta and partial are what the family takes when the config is silent. Raises ValueError for a kind of scaling,
    or a parameter of one, that we do not know.
    """
    return from_parameters(parameters(c, theta, partial, kind), head_dim, c["max_position_embeddings"])


def parameters(c: Read, theta: float, partial: float, kind: str | None) -> dict[str, Any]:
    """The parameters of one kind of layer as one flat dict, whichever spelling they came in; where both are there the old one wins."""
    new, old = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    if kind is not None and kind in new:
        new = new[kind] or {}
    if kind == "sliding_attention":
        old = {}  # Gemma 3 scales its full layers only
    p = {**new, **old}
    if named := old.get("rope_type") or old.get("type"):
        p["rope_type"] = named
    p.setdefault("rope_theta", c.get("rope_theta") or theta)
    p.setdefault("partial_rotary_factor", c.get("partial_rotary_factor", partial))
    if original := c.get("original_max_position_embeddings"):  # beside the dict it wins over the one inside (Phi-3)
        p["original_max_position_embeddings"] = original
    return p


def context_length(c: Read) -> int:
    """The longest context, in tokens. Beside YaRN and linear scaling the config keeps the unscaled number, so it is multiplied here."""
    longest, p = c["max_position_embeddings"], parameters(c, 1e4, 1.0, None)
    match p.get("rope_type"):
        case "linear":
            return int(longest * p.get("factor", 1))
        case "yarn":
            return max(longest, int(p.get("original_max_position_embeddings", longest) * (p.get("factor") or 1)))
    return longest


def from_parameters(p: dict[str, Any], head_dim: int, max_position: int) -> Rope:
    """Raises ValueError for a scaling we do not know."""
    r = Read({"original_max_position_embeddings": max_position} | p, "rope scaling")
    dim = int(head_dim * r["partial_rotary_factor"])
    freqs = [r["rope_theta"] ** (-i / dim) for i in range(0, dim, 2)]
    kind = r.get("rope_type") or r.get("type") or "default"
    r.get("type")  # the old name of rope_type, often there beside it
    if (scaling := _SCALINGS.get(kind)) is None:
        raise ValueError(f"rope scaling {kind!r} is not supported; we know {sorted(_SCALINGS)}")
    rotation = scaling(r, freqs, dim, max_position)
    r.refuse_unread(p, harmless=frozenset({"original_max_position_embeddings", "finetuned"}))
    return rotation


def _default(r: Read, freqs: list[float], dim: int, max_position: int) -> Rope:
    return Rope(tuple(freqs))


def _linear(r: Read, freqs: list[float], dim: int, max_position: int) -> Rope:
    return Rope(tuple(f / r["factor"] for f in freqs))


def _llama3(r: Read, freqs: list[float], dim: int, max_position: int) -> Rope:
    """Low frequencies are slowed by `factor`, high ones kept, those between mixed."""
    low, high, original = r["low_freq_factor"], r["high_freq_factor"], r["original_max_position_embeddings"]
    kept = [_clip((original * f / (2 * math.pi) - low) / (high - low)) for f in freqs]
    return Rope(tuple(f * (m + (1 - m) / r["factor"]) for f, m in zip(freqs, kept, strict=True)))


def _yarn(r: Read, freqs: list[float], dim: int, max_position: int) -> Rope:
    """YaRN (arxiv.org/abs/2309.00071): as llama3, but the mix is a ramp over feature numbers."""
    original = r["original_max_position_embeddings"]
    factor = r.get("factor") or max_position / original

    def feature(turns: float) -> float:
        """The feature that turns `turns` times within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(r["rope_theta"]))

    low, high = feature(r.get("beta_fast") or 32), feature(r.get("beta_slow") or 1)
    if r.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0  # a ramp of no width would divide by zero
    slowed = [_clip((i - low) / (high - low)) for i in range(len(freqs))]
    scale = r.get("attention_factor")
    mscale, mscale_all = r.get("mscale"), r.get("mscale_all_dim")
    if scale is None:
        scale = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all) if mscale and mscale_all else _yarn_scale(factor, 1)
    return Rope(tuple(f * (1 - s + s / factor) for f, s in zip(freqs, slowed, strict=True)), scale)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(r: Read, freqs: list[float], dim: int, max_position: int) -> Rope:
    """LongRoPE (arxiv.org/abs/2402.13753): each feature has its own slowdown, one set for short contexts, one for long."""
    original = r["original_max_position_embeddings"]
    factor = r.get("factor") or max_position / original
    scale = r.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (_divided(freqs, r[name], name) for name in ("short_factor", "long_factor"))
    return Rope(short, scale, long_inv_freq=long, long_after=original)


def _divided(freqs: list[float], factors: list[float], name: str) -> tuple[float, ...]:
    if len(factors) != len(freqs):
        raise ValueError(f"rope scaling has {len(factors)} numbers in {name}, but a head turns {len(freqs)} pairs of features")
    return tuple(f / by for f, by in zip(freqs, factors, strict=True))


def _clip(x: float) -> float:
    return min(max(x, 0.0), 1.0)


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
