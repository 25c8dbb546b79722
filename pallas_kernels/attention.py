"""The public attention op: checks what it is given, looks the implementation up in one table, and calls it.

N query tokens of a step (M decode lanes, then T chunk lanes), Q query heads, K kv heads, H features a head, P pages.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import attention_reference
from pallas_kernels.work import Rows, Work, lanes

FLOATS16 = ("bfloat16", "float16")


@dataclass(frozen=True)
class Reach:
    """What an implementation can do: compute capabilities [oldest, newest), head_dims, dtypes, page sizes; None is any."""

    oldest: tuple[int, int] | None = None
    newest: tuple[int, int] = (99, 0)
    head_dims: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    page_sizes: tuple[int, ...] | None = None


# The first that reaches is taken.
IMPLEMENTATIONS = {
    "reference": Reach(),
}


def capability_of(device: jax.Device) -> str | None:
    """The device's CUDA compute capability, like "9.0"; None for a device that is not an NVIDIA GPU."""
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def implementation_for(capability: str | None, *, head_dim: int, dtype, page_size: int) -> str:
    """The name of the fastest implementation for a device of this capability (see `capability_of`) and these pages."""
    for name, reach in IMPLEMENTATIONS.items():
        if _misses(reach, capability, head_dim, jnp.dtype(dtype).name, page_size) is None:
            return name
    raise AssertionError("the reference takes everything")


def _misses(reach: Reach, capability: str | None, head_dim: int, dtype: str, page_size: int) -> str | None:
    """Why an implementation cannot do this, in words, or None if it can."""
    if reach.oldest is not None:
        version = tuple(int(part) for part in capability.split(".")) if capability else None
        if version is None or not reach.oldest <= version < reach.newest:
            return f"compute capability {reach.oldest} to below {reach.newest}, got {version}"
    asked = (("head_dim", reach.head_dims, head_dim), ("dtype", reach.dtypes, dtype), ("page_size", reach.page_sizes, page_size))
    for what, allowed, got in asked:
        if allowed is not None and got not in allowed:
            return f"{what} in {allowed}, got {got}"
    return None


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
    implementation: str | None = None,
) -> Work:
    """The work lists of one step, for all layers of this shape and window.

    kv_heads, group: kv heads on this device and query heads for each of them. window: a token sees itself and the window - 1 tokens
    before it; None sees all. chunk: T, the chunk lanes of the step's bucket. implementation: None takes what `implementation_for` says
    about the default device. Raises NotImplementedError if the named implementation cannot do this, ValueError if the arguments are wrong.
    """
    _check_rows(rows)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    name = jnp.dtype(dtype).name
    capability = capability_of(jax.devices()[0])
    implementation = implementation or implementation_for(capability, head_dim=head_dim, dtype=dtype, page_size=page_size)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return Work(
        lanes=lanes(rows, chunk),
        shares=None,
        tiles=None,
        implementation=implementation,
        page_size=page_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=name,
        window=window,
        chunk=chunk,
        interpret=False,
    )


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
    implementation: str | None = None,
) -> Array:
    """Attention of each query token to its own row's tokens, up to itself -> [N, Q, H] in q's dtype.

    q_NQH: token i < M is row i's decode token, token M + j is chunk token j (see `Rows`). k_pages, v_pages: [P, K, page_size, H], with
    this step's K and V already written. The score of a query and a key is softcap * tanh(scale * q.k / softcap), or scale * q.k without
    a softcap. Lanes that no row owns give zeros. work: from `plan_work` with the same shapes, window and implementation; anything else
    is a ValueError with both numbers.
    """
    _check_call(q_NQH, k_pages, v_pages, rows, work, window, softcap, implementation)
    options = dict(scale=scale, window=window, softcap=softcap)
    return attention_reference.attend(q_NQH, k_pages, v_pages, rows, work.lanes, **options)


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
