"""The public attention op: checks what it is given, looks the implementation up in one table, and calls it.

N query tokens of a step (M decode lanes, then T chunk lanes), Q query heads, K kv heads, H features a head, P pages.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

import jax.numpy as jnp
from jax import Array

from pallas_kernels import attention_decode, attention_portable, attention_reference, attention_sm90_prefill
from pallas_kernels.blocks import Decode, Prefill, Shape, blocks, default_device
from pallas_kernels.work import Rows, Shares, Tiles, Work, lanes, shares, tiles

CORES = 132  # of an H200: what is planned for where no GPU says its own number, as in ahead-of-time compilation
INTERPRETED_WORKERS = 5  # few, because an interpreter runs them one after another; odd, so that shares cut rows


@dataclass(frozen=True)
class Reach:
    """What an implementation can do: compute capabilities [oldest, newest), and of which sizes; None is any."""

    oldest: tuple[int, int] | None = None
    newest: tuple[int, int] = (99, 0)
    head_dims: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    page_sizes: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    lacks: tuple[str, ...] = ()  # of sinks and lse
    unasked: tuple[int, ...] | None = None  # the groups for which it is taken without being named, None: all


# The first that reaches is taken. What sm90 has of its own is the prefill: on an H200 it was 1.3 to 1.6 times as fast as portable's with
# 32/8 heads of 128 and 14/2 of 64. Untold it is taken for the groups whose results a GPU has compared with the oracle; the others are taken
# by name. Its decode lanes go through portable's kernel.
IMPLEMENTATIONS = {
    "sm90": Reach(
        (9, 0),
        (10, 0),
        head_dims=(64, 128),
        dtypes=("bfloat16", "float16"),
        page_sizes=(16, 32, 64, 128, 256),
        groups=tuple(range(1, 17)),
        lacks=("sinks", "lse"),
        unasked=(1, 2, 3, 4, 7, 8, 16),
    ),
    "portable": Reach((8, 0), head_dims=tuple(range(8, 257, 8)), dtypes=("bfloat16", "float16", "float32", "float8_e4m3fn")),
    "reference": Reach(),
}


def capability_of(device: Any) -> str | None:
    """The device's CUDA compute capability, like "9.0"; None for a device that is not an NVIDIA GPU."""
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def implementation_for(
    capability: str | None, *, head_dim: int, dtype, page_size: int, group: int = 1, sinks: bool = False, lse: bool = False
) -> str:
    """The name of the fastest implementation for a device of this capability (see `capability_of`), pages of this dtype, and what is
    asked of it: attention sinks, log-sum-exp."""
    for name, reach in IMPLEMENTATIONS.items():
        runs = reach.oldest is None or (capability is not None and reach.oldest <= _version(capability) < reach.newest)
        unasked = reach.unasked is None or group in reach.unasked
        if runs and unasked and misses(reach, head_dim, dtype, page_size, group, sinks, lse) is None:
            return name
    raise AssertionError("the reference takes everything")


def _version(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def misses(reach: Reach, head_dim: int, dtype, page_size: int, group: int, sinks: bool, lse: bool) -> str | None:
    """What an implementation cannot do of this, in words, or None if it can do all."""
    asked = {
        "head_dim": (reach.head_dims, head_dim),
        "dtype": (reach.dtypes, jnp.dtype(dtype).name),
        "page_size": (reach.page_sizes, page_size),
        "query heads a kv head": (reach.groups, group),
    }
    for what, (allowed, got) in asked.items():
        if allowed is not None and got not in allowed:
            listed = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 6 else ", ".join(map(str, allowed))
            return f"{what} {got}: it takes {listed}"
    for what, wanted in (("sinks", sinks), ("lse", lse)):
        if wanted and what in reach.lacks:
            return {"sinks": "attention sinks", "lse": "return_lse"}[what]
    return None


def _refuse(implementation: str, head_dim: int, dtype, page_size: int, group: int, sinks: bool, lse: bool) -> None:
    """Raise unless the named implementation exists, can do this, and runs on the default device if that is a GPU."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    reach, capability = IMPLEMENTATIONS[implementation], capability_of(default_device())
    if missing := misses(reach, head_dim, dtype, page_size, group, sinks, lse):
        raise NotImplementedError(f"attention {implementation!r} cannot take {missing}; leave implementation out to have one chosen")
    if capability is not None and reach.oldest is not None and not reach.oldest <= _version(capability) < reach.newest:
        wanted = f"from {reach.oldest[0]}.{reach.oldest[1]} to below {reach.newest[0]}.{reach.newest[1]}"
        raise NotImplementedError(f"attention {implementation!r} needs compute capability {wanted}, this GPU has {capability}")


def plan_work(
    rows: Rows,
    *,
    page_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype,
    window: int | None = None,
    chunk: int = 0,
    decodes: bool = True,
    zeros: bool = True,
    sinks: bool = False,
    lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Work:
    """The work lists of one step, for all layers of this shape and window.

    kv_heads, group: kv heads on this device and query heads for each of them. dtype: the pages'. window: a token sees itself and the window
    - 1 tokens before it; None sees all. chunk: T, the chunk lanes of the step's bucket. decodes: False promises that no row decodes, and
    leaves out the kernels for those that do. zeros: False allows lanes that no row owns to hold anything. sinks, lse: whether the calls
    will bring sinks and want log-sum-exps. implementation: None takes what `implementation_for` says about the default device. interpret:
    run GPU kernels in their interpreters, slowly, on a CPU. Raises NotImplementedError if the named implementation cannot do this,
    ValueError if the arguments are wrong.
    """
    _check_rows(rows)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if not chunk and not decodes:
        raise ValueError("decodes is False in a step of 0 chunk lanes: there is nothing to attend")
    capability = capability_of(default_device())
    shape: dict[str, Any] = dict(head_dim=head_dim, dtype=dtype, page_size=page_size, group=group, sinks=sinks, lse=lse)
    implementation = implementation or implementation_for(capability, **shape)
    _refuse(implementation, **shape)
    kernel = implementation != "reference"
    sizes = partial(Shape, head_dim, group, page_size, jnp.dtype(dtype).name, length=rows.table_MP.shape[1] * page_size)
    kind = default_device().device_kind
    decode, prefill = blocks("decode", kind, sizes(rows=rows.length_M.shape[0])), blocks("prefill", kind, sizes(rows=chunk))
    assert isinstance(decode, Decode) and isinstance(prefill, Prefill)
    return Work(
        lanes=None if kernel else lanes(rows, chunk),
        shares=_shares(rows, kv_heads, page_size, decode, window, interpret) if kernel and decodes else None,
        tiles=_tiles(rows, implementation, group, prefill, chunk, decodes, zeros) if kernel and chunk else None,
        implementation=implementation,
        page_size=page_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype).name,
        window=window,
        chunk=chunk,
        interpret=interpret,
        blocks=(decode, prefill),
    )


def _shares(rows: Rows, kv_heads: int, page_size: int, decode: Decode, window: int | None, interpret: bool) -> Shares:
    workers = INTERPRETED_WORKERS if interpret else decode.workers_per_core * _cores()
    return shares(rows, kv_heads=kv_heads, page_size=page_size, kv_block=decode.kv_block, window=window, workers=workers)


def _tiles(rows: Rows, implementation: str, group: int, prefill: Prefill, chunk: int, decodes: bool, zeros: bool) -> Tiles:
    if implementation == "sm90":
        return tiles(rows, chunk=chunk, tile=attention_sm90_prefill.tile_tokens(group), gaps=zeros, decodes=decodes)
    return tiles(rows, chunk=chunk, tile=attention_portable.tile_tokens(group, prefill))


def _cores() -> int:
    return getattr(default_device(), "core_count", CORES)


@overload
def paged_attention(*args: Any, return_lse: Literal[True], **options: Any) -> tuple[Array, Array]: ...


@overload
def paged_attention(*args: Any, **options: Any) -> Array: ...


def paged_attention(
    q_NQH: Array,
    k_pages: Array,
    v_pages: Array,
    rows: Rows,
    work: Work,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_Q: Array | None = None,
    k_scale_K: Array | None = None,
    v_scale_K: Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of each query token to its own row's tokens, up to itself -> [N, Q, H] in q's dtype.

    q_NQH: token i < M is row i's decode token, token M + j is chunk token j (see `Rows`); in the pages' dtype, or any floating dtype for
    float8_e4m3fn pages. k_pages, v_pages: [P, K, page_size, H], with this step's K and V already written. The score of a query and a key is
    softcap * tanh(scale * q.k / softcap), or scale * q.k without a softcap. Lanes that no row owns give zeros, unless the plan was made
    without.

    sinks_Q: a score for each query head that joins its softmax as one more key would, whose value is zero (gpt-oss's learned sinks).
    k_scale_K, v_scale_K: float32, what the numbers in float8_e4m3fn pages are multiplied by, for each kv head; None is 1 (see `write_kv`).
    return_lse: also the natural logarithm of each softmax's denominator, sinks included -> [N, Q] float32; -inf in lanes nobody owns.
    work: from `plan_work` for the same rows, shapes, window and implementation; another shape, window or implementation is a ValueError
    with both numbers. A decode kernel counts in it, and sets the counters back: calls that share a plan must not run at the same time.
    Raises NotImplementedError if the planned implementation lacks sinks or log-sum-exp: plan with sinks=True or lse=True.
    """
    _check_call(q_NQH, k_pages, v_pages, rows, work, window, softcap, implementation)
    _check_extras(q_NQH, k_pages, work, sinks_Q, k_scale_K, v_scale_K, return_lse)
    options: dict[str, Any] = dict(scale=scale, window=window, softcap=softcap)
    extras: dict[str, Any] = dict(sinks_Q=sinks_Q, k_scale_K=k_scale_K, v_scale_K=v_scale_K)
    if work.implementation == "reference":
        assert work.lanes is not None
        out: Any = attention_reference.attend(q_NQH, k_pages, v_pages, rows, work.lanes, **options, **extras)
    else:
        out = _kernels(q_NQH, k_pages, v_pages, rows, work, return_lse, options, extras)
    return out if return_lse else out[0]


def _kernels(q_NQH, k_pages, v_pages, rows, work, lse, options, extras) -> tuple[Array, ...]:
    """The decode lanes through the decode kernel, the chunk lanes through the prefill kernel, both into one array."""
    options["interpret"] = work.interpret
    chunk = None
    if work.tiles is not None and work.implementation == "sm90":
        workers = INTERPRETED_WORKERS if work.interpret else _cores()
        chunk = (attention_sm90_prefill.prefill(q_NQH, k_pages, v_pages, rows, work.tiles, workers=workers, **options),)
    elif work.tiles is not None:
        chunk = attention_portable.prefill(q_NQH, k_pages, v_pages, rows, work.tiles, work.blocks[1], lse=lse, **options, **extras)
    if work.shares is None:
        assert chunk is not None
        return chunk
    decode = attention_decode.decode
    return decode(q_NQH, k_pages, v_pages, rows, work.shares, work.blocks[0], chunk, lse=lse, **options, **extras)


def _check_rows(rows: Rows) -> None:
    if rows.table_MP.ndim != 2:
        raise ValueError(f"table_MP must be [rows, pages], got {rows.table_MP.shape}")
    wanted = rows.table_MP.shape[:1]
    for name in ("length_M", "chunk_start_M", "chunk_len_M"):
        if (got := getattr(rows, name).shape) != wanted:
            raise ValueError(f"{name} must be {wanted} for a table of {rows.table_MP.shape}, got {got}")
    for name in ("table_MP", "length_M", "chunk_start_M", "chunk_len_M"):
        if (got := getattr(rows, name).dtype) != jnp.int32:
            raise ValueError(f"{name} must be int32, got {got}")


def _check_call(q_NQH, k_pages, v_pages, rows, work, window, softcap, implementation) -> None:
    _check_rows(rows)
    if q_NQH.ndim != 3 or k_pages.ndim != 4:
        wanted = "q must be [tokens, heads, head_dim] and k_pages [pages, kv_heads, page_size, head_dim]"
        raise ValueError(f"{wanted}, got {q_NQH.shape} and {k_pages.shape}")
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(f"k_pages {k_pages.dtype}{k_pages.shape} and v_pages {v_pages.dtype}{v_pages.shape} differ")
    if q_NQH.shape[2] != k_pages.shape[3]:
        raise ValueError(f"head_dim differs: q {q_NQH.shape}, k_pages {k_pages.shape}")
    if q_NQH.shape[1] % k_pages.shape[1]:
        raise ValueError(f"{q_NQH.shape[1]} query heads are no multiple of {k_pages.shape[1]} kv heads")
    if q_NQH.shape[0] != rows.length_M.shape[0] + work.chunk:
        raise ValueError(f"q has {q_NQH.shape[0]} tokens, but {rows.length_M.shape[0]} rows and {work.chunk} chunk lanes were planned")
    planned = (work.page_size, work.kv_heads, work.group, work.head_dim, work.dtype)
    given = (k_pages.shape[2], k_pages.shape[1], q_NQH.shape[1] // k_pages.shape[1], k_pages.shape[3], k_pages.dtype.name)
    if planned != given:
        raise ValueError(f"work was planned for (page_size, kv_heads, group, head_dim, dtype) {planned}, the pages and q have {given}")
    if window != work.window:
        raise ValueError(f"work was planned for window {work.window}, the call has window {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if implementation not in (None, work.implementation):
        raise ValueError(f"work was planned for {work.implementation}, the call names {implementation}")


def _check_extras(q_NQH, k_pages, work, sinks_Q, k_scale_K, v_scale_K, lse) -> None:
    fp8 = k_pages.dtype == jnp.float8_e4m3fn
    if sinks_Q is not None and sinks_Q.shape != q_NQH.shape[1:2]:
        raise ValueError(f"sinks_Q must be {q_NQH.shape[1:2]}, one for each query head, got {sinks_Q.shape}")
    for name, scale_K in (("k_scale_K", k_scale_K), ("v_scale_K", v_scale_K)):
        if scale_K is not None and not fp8:
            raise ValueError(f"{name} is for float8_e4m3fn pages, these are {k_pages.dtype}")
        if scale_K is not None and scale_K.shape != k_pages.shape[1:2]:
            raise ValueError(f"{name} must be {k_pages.shape[1:2]}, one for each kv head, got {scale_K.shape}")
    if q_NQH.dtype != k_pages.dtype and not (fp8 and q_NQH.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)):
        wanted = "bfloat16, float16 or float32" if fp8 else f"the pages' dtype, {k_pages.dtype}"
        raise ValueError(f"q must be {wanted}, got {q_NQH.dtype}")
    lacks = IMPLEMENTATIONS[work.implementation].lacks
    for what, wanted in (("sinks", sinks_Q is not None), ("lse", lse)):
        if wanted and what in lacks:
            raise NotImplementedError(
                f"attention {work.implementation!r} lacks {what}: call plan_work with {what}=True to have another chosen"
            )
