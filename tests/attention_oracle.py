"""What the attention tests share: arrays for a named case, an oracle in float64 numpy that knows nothing of blocks or online softmax, and
the comparison of the two.

M rows, T chunk tokens, N = M + T, Q query heads, K kv heads, H features, S tokens of a row.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import quickly

from pallas_kernels import Rows, paged_attention, plan_work
from pallas_kernels.attention import IMPLEMENTATIONS
from pallas_kernels.shapes import FP8, Case

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.5e-2}  # the output's own rounding, and that of the probabilities
FP8_TOLERANCE = {"float32": 2e-3, "float16": 3e-3, "bfloat16": 1.5e-2}  # kernels multiply fp8 pages as float16


@partial(jax.tree_util.register_dataclass, data_fields=["q", "k_pages", "v_pages", "rows", "extras"], meta_fields=[])
@dataclass(frozen=True)
class Inputs:
    """One call's arrays. extras: sinks_Q, k_scale_K, v_scale_K, as the case has them."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    rows: Rows
    extras: dict[str, jax.Array] = field(default_factory=dict)


def draw(case: Case, seed: int = 0) -> Inputs:
    """Every slot that no row's token is in holds NaN, in pages handed out in random order."""
    random = np.random.default_rng(seed)
    heads, size, count = case.heads, case.page_size, len(case.lengths)
    chunk_lens = case.chunk_lens or (0,) * count
    needed = [-(-length // size) for length in case.lengths]
    pages = sum(needed) + 3
    order = iter(random.permutation(pages).tolist())
    table = np.full((count, max(needed) + 1), pages - 1, np.int32)
    k, v = np.full((2, pages, heads.kv_heads, size, heads.head_dim), np.nan, np.float32)
    for row, length in enumerate(case.lengths):
        for i in range(needed[row]):
            if row and i < case.shared:
                table[row, i] = table[0, i]
                continue
            table[row, i] = page = next(order)
            filled = min(size, length - i * size)
            k[page, :, :filled], v[page, :, :filled] = random.standard_normal((2, heads.kv_heads, filled, heads.head_dim), np.float32)
    starts = np.cumsum((0, *chunk_lens[:-1]))
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in (table, case.lengths, starts, chunk_lens)))
    q = random.normal(size=(count + case.chunk, heads.heads, heads.head_dim))
    extras = {}
    if case.sinks:
        extras["sinks_Q"] = jnp.asarray(random.normal(size=heads.heads) * 2, jnp.float32)
    if case.pages == FP8:
        for name, x in (("k_scale_K", k), ("v_scale_K", v)):
            scale_K = random.uniform(0.02, 0.1, heads.kv_heads).astype(np.float32)
            x /= scale_K[:, None, None]
            extras[name] = jnp.asarray(scale_K)
    return Inputs(jnp.asarray(q, case.dtype), jnp.asarray(k, case.page_dtype), jnp.asarray(v, case.page_dtype), rows, extras)


def oracle(
    inputs: Inputs, *, chunk: int, scale: float, window: int | None = None, softcap: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(o [N, Q, H], log-sum-exp [N, Q]), token by token, from each row's tokens laid out one after another."""
    rows, extras = inputs.rows, {name: np.asarray(x, np.float64) for name, x in inputs.extras.items()}
    q, k_pages, v_pages = (np.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages))
    table, lengths, starts, chunk_lens = (np.asarray(x) for x in (rows.table_MP, rows.length_M, rows.chunk_start_M, rows.chunk_len_M))
    count, page_size, kv_heads = len(lengths), k_pages.shape[2], k_pages.shape[1]
    assert len(q) == count + chunk
    q_NKGH = q.astype(np.float64).reshape(len(q), kv_heads, -1, q.shape[2])
    sinks_KG = extras["sinks_Q"].reshape(kv_heads, -1) if "sinks_Q" in extras else np.full(q_NKGH.shape[1:3], -np.inf)
    out, lse = np.zeros_like(q_NKGH), np.full(q_NKGH.shape[:3], -np.inf)
    for row, length in enumerate(lengths):
        slots = table[row, np.arange(length) // page_size], slice(None), np.arange(length) % page_size
        k_KSH, v_KSH = (
            pages[slots].astype(np.float64).swapaxes(0, 1) * extras.get(name, np.ones(kv_heads))[:, None, None]
            for pages, name in ((k_pages, "k_scale_K"), (v_pages, "v_scale_K"))
        )
        owned = [(count + starts[row] + j, length - chunk_lens[row] + j) for j in range(chunk_lens[row])]
        for lane, position in owned or [(row, length - 1)] * bool(length):
            seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
            s_KGS = q_NKGH[lane] @ k_KSH[:, seen].swapaxes(1, 2) * scale
            s_KGS = s_KGS if softcap is None else softcap * np.tanh(s_KGS / softcap)
            peak_KG = np.maximum(s_KGS.max(axis=2), sinks_KG)
            p_KGS = np.exp(s_KGS - peak_KG[..., None])
            total_KG = p_KGS.sum(axis=2) + np.exp(sinks_KG - peak_KG)
            out[lane] = p_KGS @ v_KSH[:, seen] / total_KG[..., None]
            lse[lane] = peak_KG + np.log(total_KG)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def attend(inputs: Inputs, *, case: Case, implementation: str | None = None, interpret: bool = False, lse: bool = False):
    """The public ops, called as an engine calls them."""
    heads = case.heads
    shape: dict[str, Any] = dict(
        page_size=case.page_size, kv_heads=heads.kv_heads, group=heads.group, head_dim=heads.head_dim, dtype=case.page_dtype
    )
    asked: dict[str, Any] = dict(window=case.window, chunk=case.chunk, decodes=case.decodes, sinks=case.sinks, lse=lse)
    work = plan_work(inputs.rows, **shape, **asked, implementation=implementation, interpret=interpret)
    options: dict[str, Any] = dict(scale=heads.head_dim**-0.5, window=case.window, softcap=case.softcap, return_lse=lse)
    arrays = inputs.q, inputs.k_pages, inputs.v_pages
    return paged_attention(*arrays, inputs.rows, work, **options, **inputs.extras, implementation=implementation)


def check(case: Case, implementation: str, *, interpret: bool = False, seed: int = 0) -> None:
    """Run a case and compare with the oracle; the log-sum-exp too, where the implementation has it."""
    inputs, lse = draw(case, seed), "lse" not in IMPLEMENTATIONS[implementation].lacks
    run = jax.jit(partial(attend, case=case, implementation=implementation, interpret=interpret, lse=lse))
    with quickly() if interpret else nullcontext():  # the reference takes large cases, for which optimizing pays
        out = jax.block_until_ready(run(inputs))  # some of it is compiled as it runs
    compare(case, inputs, out if lse else (out,))


def compare(case: Case, inputs: Inputs, out: tuple[jax.Array, ...]) -> None:
    """out: (o,) or (o, log-sum-exp). Lanes that nobody owns must be zeros exactly, and -inf."""
    got = [np.asarray(x).astype(np.float64) for x in out]
    wanted = oracle(inputs, chunk=case.chunk, scale=case.heads.head_dim**-0.5, window=case.window, softcap=case.softcap)
    tolerance = (FP8_TOLERANCE if case.pages == FP8 else TOLERANCE)[case.dtype]
    np.testing.assert_allclose(got[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert not got[0][np.isneginf(wanted[1]).all(axis=1)].any()
    if len(got) > 1:
        np.testing.assert_allclose(got[1], wanted[1], rtol=tolerance / 4, atol=tolerance / 4)


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"
