"""Paged attention and the write of its pages, against an oracle in float64 numpy that knows nothing of blocks or online softmax."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import Rows, capability_of, implementation_for, paged_attention, plan_work, write_kv
from pallas_kernels.shapes import CORRECT, SMALL, Case, Heads

Arrays = tuple[jax.Array, jax.Array, jax.Array]  # q, k_pages, v_pages
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.5e-2}  # the output's own rounding, and that of the probabilities


def draw(case: Case, seed: int = 0) -> tuple[Arrays, Rows]:
    """q, pages and rows of a case. Every slot that no row's token is in holds NaN, in pages handed out in random order."""
    random = np.random.default_rng(seed)
    heads, size, count = case.heads, case.page_size, len(case.lengths)
    chunk_lens = case.chunk_lens or (0,) * count
    needed = [-(-length // size) for length in case.lengths]
    pages = sum(needed) + 3
    order = iter(random.permutation(pages).tolist())
    table = np.full((count, max(needed) + 1), pages - 1, np.int32)
    k, v = np.full((2, pages, heads.kv_heads, size, heads.head_dim), np.nan)
    for row, length in enumerate(case.lengths):
        for i in range(needed[row]):
            table[row, i] = page = next(order)
            filled = min(size, length - i * size)
            k[page, :, :filled], v[page, :, :filled] = random.normal(size=(2, heads.kv_heads, filled, heads.head_dim))
    starts = np.cumsum((0, *chunk_lens[:-1]))
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in (table, case.lengths, starts, chunk_lens)))
    q = random.normal(size=(count + case.chunk, heads.heads, heads.head_dim))
    return (jnp.asarray(q, case.dtype), jnp.asarray(k, case.dtype), jnp.asarray(v, case.dtype)), rows


def oracle(q_NQH, k_pages, v_pages, rows: Rows, *, chunk: int, scale: float, window: int | None, softcap: float | None) -> np.ndarray:
    """Attention token by token, from each row's tokens laid out one after another."""
    q, k_pages, v_pages = (np.asarray(x).astype(np.float64) for x in (q_NQH, k_pages, v_pages))
    table, lengths, starts, chunk_lens = (np.asarray(x) for x in (rows.table_MP, rows.length_M, rows.chunk_start_M, rows.chunk_len_M))
    count, page_size, group = len(lengths), k_pages.shape[2], q.shape[1] // k_pages.shape[1]
    assert len(q) == count + chunk
    out = np.zeros_like(q)
    for row, length in enumerate(lengths):
        slots = table[row, np.arange(length) // page_size], slice(None), np.arange(length) % page_size
        k, v = (np.repeat(pages[slots], group, axis=1) for pages in (k_pages, v_pages))  # [length, Q, H]
        owned = [(count + starts[row] + j, length - chunk_lens[row] + j) for j in range(chunk_lens[row])]
        for lane, position in owned or [(row, length - 1)] * bool(length):
            seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
            s = np.einsum("qh,tqh->qt", q[lane], k[seen]) * scale
            s = s if softcap is None else softcap * np.tanh(s / softcap)
            p = np.exp(s - s.max(axis=1, keepdims=True))
            out[lane] = np.einsum("qt,tqh->qh", p / p.sum(axis=1, keepdims=True), v[seen])
    return out


def attend(arrays: Arrays, rows: Rows, *, case: Case, implementation: str | None = None, interpret: bool = False):
    """The public ops, called as an engine calls them."""
    heads = case.heads
    shape: dict[str, Any] = dict(
        page_size=case.page_size, kv_heads=heads.kv_heads, group=heads.group, head_dim=heads.head_dim, dtype=case.dtype
    )
    work = plan_work(rows, **shape, window=case.window, chunk=case.chunk, implementation=implementation, interpret=interpret)
    options = dict(scale=heads.head_dim**-0.5, window=case.window, softcap=case.softcap)
    return paged_attention(*arrays, rows, work, **options, implementation=implementation)


def check(case: Case, implementation: str | None = None, *, interpret: bool = False, seed: int = 0) -> None:
    arrays, rows = draw(case, seed)
    run = jax.jit(partial(attend, case=case, implementation=implementation, interpret=interpret))
    out = np.asarray(run(arrays, rows)).astype(np.float64)
    wanted = oracle(*arrays, rows, chunk=case.chunk, scale=case.heads.head_dim**-0.5, window=case.window, softcap=case.softcap)
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(out, wanted, rtol=tolerance, atol=tolerance)
    assert not out[(wanted == 0).all(axis=(1, 2))].any()  # lanes nobody owns are zeros exactly


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


@pytest.mark.parametrize("name", CORRECT)
def test_reference(name):
    check(CORRECT[name], "reference")


@pytest.mark.parametrize("name", SMALL)
def test_portable_interpreted(name):
    check(SMALL[name], "portable", interpret=True)


@pytest.mark.parametrize("name", ["decode", "decode_group_3_window"])
def test_sm90_interpreted(name):
    check(SMALL[name], "sm90", interpret=True)


HOPPER = [name for name, case in CORRECT.items() if case.heads.head_dim in (64, 128) and case.dtype != "float32"]


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("implementation", ["sm90", "portable"])
def test_gpu(name, implementation):
    case = CORRECT[name]
    if implementation == "sm90" and (capability_of(jax.devices()[0]) != "9.0" or name not in HOPPER):
        pytest.skip(f"sm90 needs a Hopper GPU and head_dim 64 or 128, not {case.heads.head_dim} in {case.dtype}")
    jax.block_until_ready(jnp.full((1 << 28,), jnp.nan))  # freed at once: what a kernel forgets to write is NaN, not an older right answer
    check(case, implementation)


def random_rows(data, *, rows: int, chunk: int, pages: int, table: int, page_size: int) -> Rows:
    """Rows of any kind side by side: empty, decoding, chunks with and without a prefix, pages shared between rows."""
    starts, lengths, chunk_lens, lane = [], [], [], 0
    for _ in range(rows):
        length = data.draw(st.one_of(st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1]), st.integers(0, table * page_size)))
        owned = data.draw(st.integers(0, min(length, chunk - lane))) if data.draw(st.booleans()) else 0
        gap = data.draw(st.integers(0, min(2, chunk - lane - owned)))
        starts.append(lane + gap)
        lane += gap + owned
        lengths.append(length)
        chunk_lens.append(owned)
    pages_MP = data.draw(st.lists(st.lists(st.integers(0, pages - 1), min_size=table, max_size=table), min_size=rows, max_size=rows))
    return Rows(*(jnp.asarray(x, jnp.int32) for x in (pages_MP, lengths, starts, chunk_lens)))


RANDOM = Case(Heads(4, 2, 16), (0,) * 4, page_size=8, dtype="float32", spare=24)


@pytest.mark.parametrize("implementation", ["reference", "portable"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, 3.0), (1, None)])
def test_random_rows(implementation, window, softcap):
    case, random = replace(RANDOM, window=window, softcap=softcap), np.random.default_rng(7)
    q, k, v = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((28, 4, 16), (20, 2, 8, 16), (20, 2, 8, 16)))
    run = jax.jit(partial(attend, case=case, implementation=implementation, interpret=implementation == "portable"))

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def holds(data):
        rows = random_rows(data, rows=4, chunk=case.chunk, pages=20, table=6, page_size=8)
        wanted = oracle(q, k, v, rows, chunk=case.chunk, scale=0.25, window=window, softcap=softcap)
        np.testing.assert_allclose(run((q, k, v), rows), wanted, rtol=1e-4, atol=1e-5)

    holds()


def test_inside_shard_map():
    """Sharded by kv heads, each device sees its own heads, and the plan is the same for all."""
    case = replace(SMALL["mixed"], heads=Heads(6, 2, 16))
    arrays, rows = draw(case)
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, pages, whole = P(None, "tp"), P(None, "tp"), P()
    shape: dict[str, Any] = dict(
        page_size=case.page_size, kv_heads=2, group=3, head_dim=16, dtype=case.dtype, window=case.window, chunk=case.chunk
    )
    work = plan_work(rows, **shape)
    attend = partial(paged_attention, scale=0.25, window=case.window)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(heads, pages, pages, whole, whole), out_specs=heads, check_vma=False)
    wanted = oracle(*arrays, rows, chunk=case.chunk, scale=0.25, window=case.window, softcap=None)
    np.testing.assert_allclose(jax.jit(sharded)(*arrays, rows, work), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "page_size", "name"),
    [
        ("9.0", 128, "bfloat16", 64, "portable"),
        ("9.0", 80, "bfloat16", 64, "portable"),
        ("9.0", 128, "float32", 64, "portable"),
        ("9.0", 128, "bfloat16", 8, "portable"),
        ("8.0", 128, "bfloat16", 64, "portable"),
        ("8.9", 256, "bfloat16", 64, "portable"),
        ("10.0", 128, "bfloat16", 64, "portable"),
        ("7.5", 128, "float16", 64, "reference"),
        ("9.0", 12, "bfloat16", 64, "reference"),
        (None, 128, "bfloat16", 64, "reference"),
    ],
)
def test_implementation_for(capability, head_dim, dtype, page_size, name):
    assert implementation_for(capability, head_dim=head_dim, dtype=dtype, page_size=page_size) == name


PLAN: dict[str, Any] = dict(page_size=8, kv_heads=2, group=2, head_dim=16, dtype="float32", chunk=24)


def test_an_implementation_that_cannot_says_so_with_numbers():
    _, rows = draw(Case(Heads(4, 2, 16), (5, 9), page_size=8))
    with pytest.raises(NotImplementedError, match="cannot take head_dim 16: it takes 64, 128"):
        plan_work(rows, **PLAN, implementation="sm90")
    with pytest.raises(NotImplementedError, match="cannot take head_dim 20: it takes 8 to 256"):
        plan_work(rows, **dict(PLAN, head_dim=20), implementation="portable")
    with pytest.raises(ValueError, match="must be one of portable, sm90, reference, got 'cuda'"):
        plan_work(rows, **PLAN, implementation="cuda")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(q=(28, 4, 32)), r"head_dim differs: q \(28, 4, 32\), k_pages \(20, 2, 8, 16\)"),
        (dict(q=(27, 4, 16)), "q has 27 tokens, but 4 rows and 24 chunk lanes were planned"),
        (dict(q=(28, 5, 16)), "5 query heads are no multiple of 2 kv heads"),
        (dict(q=(28, 8, 16)), r"planned for .* \(8, 2, 2, 16, 'float32'\), the pages and q have \(8, 2, 4, 16, 'float32'\)"),
        (dict(v=(19, 2, 8, 16)), r"k_pages .*20, 2, 8, 16.* and v_pages .*19, 2, 8, 16.* differ"),
        (dict(window=5), "planned for window None, the call has window 5"),
        (dict(softcap=0.0), "softcap must be above 0, got 0.0"),
        (dict(implementation="portable"), "planned for reference, the call names portable"),
    ],
)
def test_a_wrong_call_is_refused_with_both_numbers(change, sentence):
    rows = Rows(jnp.zeros((4, 6), jnp.int32), *(jnp.zeros(4, jnp.int32) for _ in range(3)))
    change = dict(change)
    shapes = [change.pop(name, size) for name, size in (("q", (28, 4, 16)), ("k", (20, 2, 8, 16)), ("v", (20, 2, 8, 16)))]
    work = plan_work(rows, **PLAN, implementation="reference")
    q, k, v = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=sentence):
        paged_attention(q, k, v, rows, work, scale=1.0, **change)


@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_write_kv(implementation):
    random = np.random.default_rng(3)
    pages = random.normal(size=(2, 9, 3, 8, 24)).astype(np.float32)
    new = random.normal(size=(2, 12, 3, 24)).astype(np.float32)
    slot = random.permutation(72)[:12].astype(np.int32)
    wanted = pages.copy()
    for n in range(12):
        wanted[:, slot[n] // 8, :, slot[n] % 8] = new[:, n]
    write = partial(write_kv, implementation=implementation, interpret=not on_gpu())
    out = write(*map(jnp.asarray, (*pages, *new, slot)))
    np.testing.assert_array_equal(np.stack(out), wanted)


def test_write_kv_is_in_place():
    pages = jax.ShapeDtypeStruct((512, 2, 16, 64), jnp.bfloat16)
    new, slot = jax.ShapeDtypeStruct((7, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((7,), jnp.int32)
    write = jax.jit(write_kv, donate_argnums=(0, 1)).lower(pages, pages, new, new, slot).compile()
    size, memory = 2 * 512 * 2 * 16 * 64 * 2, write.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size // 10


def test_write_kv_refuses_shapes_that_do_not_fit():
    pages, new, slot = jnp.zeros((9, 2, 8, 16)), jnp.zeros((5, 2, 16)), jnp.zeros(5, jnp.int32)
    with pytest.raises(ValueError, match=r"k and v must be \(5, 2, 16\) .* got \(4, 2, 16\), \(5, 2, 16\)"):
        write_kv(pages, pages, new[:4], new, slot)
    with pytest.raises(ValueError, match=r"k_pages .*9, 2, 8, 16.* and v_pages .*8, 2, 8, 16.* differ"):
        write_kv(pages, pages[:8], new, new, slot)
