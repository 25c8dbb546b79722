"""Paged attention and the write of its pages, against the oracle."""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Inputs, attend, check, draw, on_gpu, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from tiny import QUICK

from pallas_kernels import Rows, attention, capability_of, implementation_for, paged_attention, plan_work, write_kv
from pallas_kernels.attention import IMPLEMENTATIONS, misses
from pallas_kernels.blocks import Decode, blocks
from pallas_kernels.shapes import CORRECT, SMALL, Case, Heads
from pallas_kernels.work import lanes, tiles


@pytest.mark.parametrize("name", CORRECT)
def test_reference(name):
    check(CORRECT[name], "reference")


@pytest.mark.parametrize("name", SMALL)
def test_portable_interpreted(name):
    check(SMALL[name], "portable", interpret=True)


@pytest.mark.parametrize(
    ("head_dim", "group", "kv_heads", "page_size"),
    [(8, 16, 1, 16), (40, 1, 3, 128), (72, 5, 1, 24), (96, 2, 2, 64), (168, 9, 1, 48), (256, 1, 2, 16)],
)
def test_portable_takes_every_head_dim_group_and_page(head_dim, group, kv_heads, page_size):
    case = Case(Heads(group * kv_heads, kv_heads, head_dim), (page_size + 1, 1, 70), (0, 1, 9), page_size=page_size, dtype="float16")
    check(case, "portable", interpret=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # the NaN of slots that nobody wrote, masked afterwards
@pytest.mark.parametrize("name", ["nobody", "only_decodes", "prefill_sm90", "prefill_sm90_window", "prefill_sm90_mha"])
def test_sm90_interpreted(name, capfd):
    """The interpreter also watches barriers, and says on stdout where two threads meet."""
    check(SMALL[name], "sm90", interpret=True)
    assert "RACE DETECTED" not in capfd.readouterr().out


def reaches(implementation: str, case: Case) -> bool:
    heads, reach = case.heads, IMPLEMENTATIONS[implementation]
    return misses(reach, heads.head_dim, case.page_dtype, case.page_size, heads.group, case.sinks, lse=False) is None


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("implementation", ["sm90", "portable"])
def test_gpu(name, implementation):
    case = CORRECT[name]
    if implementation == "sm90" and (capability_of(jax.devices()[0]) != "9.0" or not reaches("sm90", case)):
        pytest.skip(f"sm90 needs a Hopper GPU, and cannot do {case}")
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


def lane_counts(tiles, count: int, chunk: int) -> np.ndarray:
    """How often each of the M + T lanes is in a tile, having checked that tiles are in order and their unused rest is last."""
    begin, size, position = (np.asarray(x) for x in (tiles.begin_I, tiles.size_I, tiles.position_I))
    used = int(tiles.count_1[0])
    assert (size[:used] > 0).all() and not size[used:].any() and (np.diff(position[:used]) <= 0).all()
    counts = np.zeros(count + chunk, int)
    for i in range(used):
        counts[count + begin[i] : count + begin[i] + size[i]] += 1
    return counts


@pytest.mark.parametrize("tile", [1, 7])
def test_tiles_hold_each_lane_once(tile):
    chunk = 24
    cut = {name: jax.jit(partial(tiles, chunk=chunk, tile=tile, **options)) for name, options in TILES.items()}
    place = jax.jit(partial(lanes, chunk=chunk))

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def holds(data):
        rows = random_rows(data, rows=4, chunk=chunk, pages=20, table=6, page_size=8)
        position = np.asarray(place(rows).position_N)[4:]
        cuts = {name: f(rows) for name, f in cut.items()}
        np.testing.assert_array_equal(lane_counts(cuts["owned"], 4, chunk), np.concatenate([np.zeros(4), position >= 0]))
        np.testing.assert_array_equal(lane_counts(cuts["gaps"], 4, chunk), np.repeat([0, 1], [4, chunk]))
        assert (lane_counts(cuts["no decodes"], 4, chunk) == 1).all()
        work = jax.tree.map(np.asarray, cuts["owned"])
        for i in range(work.count_1[0]):
            begin, size = work.begin_I[i], work.size_I[i]
            np.testing.assert_array_equal(position[begin : begin + size], work.position_I[i] + np.arange(size))
            assert work.length_I[i] == rows.length_M[work.row_I[i]]

    holds()


def test_lanes_that_nobody_owns_are_written_if_somebody_reads_them():
    """A row that decodes, one with three chunk lanes of eight, and an empty one."""
    rows = Rows(jnp.zeros((3, 4), jnp.int32), *(jnp.array(x, jnp.int32) for x in ((9, 5, 0), (0, 2, 0), (0, 3, 0))))
    owned, all_ = np.isin(np.arange(11), (5, 6, 7)).astype(int), np.arange(11) >= 3
    plan = partial(plan_work, rows, page_size=64, kv_heads=2, group=2, head_dim=64, dtype="bfloat16", chunk=8)
    for zeros, decodes, wanted in ((True, True, all_), (True, False, np.ones(11)), (False, True, owned), (False, False, owned)):
        tiles = jax.jit(partial(plan, zeros=zeros, decodes=decodes, implementation="sm90", interpret=True), compiler_options=QUICK)().tiles
        np.testing.assert_array_equal(lane_counts(tiles, 3, 8), wanted)


TILES: dict[str, dict[str, Any]] = {"owned": {}, "gaps": dict(gaps=True), "no decodes": dict(gaps=True, decodes=False)}


RANDOM = Case(Heads(4, 2, 16), (0,) * 4, page_size=8, dtype="float32", spare=24)


@pytest.mark.parametrize("implementation", ["reference", "portable"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, 3.0), (1, None)])
def test_random_rows(implementation, window, softcap):
    case, random = replace(RANDOM, window=window, softcap=softcap), np.random.default_rng(7)
    q, k, v = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((28, 4, 16), (20, 2, 8, 16), (20, 2, 8, 16)))
    attended = partial(attend, case=case, implementation=implementation, interpret=implementation == "portable", lse=True)
    run = jax.jit(attended, compiler_options=QUICK)

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def holds(data):
        rows = random_rows(data, rows=4, chunk=case.chunk, pages=20, table=6, page_size=8)
        inputs = Inputs(q, k, v, rows)
        wanted = oracle(inputs, chunk=case.chunk, scale=0.25, window=window, softcap=softcap)
        for got, expected in zip(run(inputs), wanted, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

    holds()


def test_an_early_join_has_the_next_kernel_launched(monkeypatch):
    def traced(early: bool) -> str:
        monkeypatch.setattr(attention, "blocks", lambda op, *shape: replace(sizes, early=early) if op == "decode" else blocks(op, *shape))
        run = partial(attend, case=CORRECT["decode"], implementation="portable")
        return str(jax.make_jaxpr(run)(jax.tree.map(jnp.asarray, draw(CORRECT["decode"]))))

    sizes = Decode(64)
    assert traced(True).count("griddepcontrol.launch_dependents") == 1 and "griddepcontrol" not in traced(False)


def test_inside_shard_map():
    """Sharded by kv heads, each device sees its own heads, and the plan is the same for all."""
    case = replace(SMALL["mixed"], heads=Heads(6, 2, 16))
    inputs = draw(case)
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, pages, whole = P(None, "tp"), P(None, "tp"), P()
    shape: dict[str, Any] = dict(
        page_size=case.page_size, kv_heads=2, group=3, head_dim=16, dtype=case.dtype, window=case.window, chunk=case.chunk
    )
    work = plan_work(inputs.rows, **shape)
    attend = partial(paged_attention, scale=0.25, window=case.window)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(heads, pages, pages, whole, whole), out_specs=heads, check_vma=False)
    out = jax.jit(sharded)(inputs.q, inputs.k_pages, inputs.v_pages, inputs.rows, work)
    np.testing.assert_allclose(out, oracle(inputs, chunk=case.chunk, scale=0.25, window=case.window)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "shape", "name"),
    [
        ("9.0", {}, "sm90"),
        ("9.0", dict(head_dim=64, dtype="float16", page_size=16, group=7), "sm90"),
        ("9.0", dict(page_size=128, group=4), "sm90"),
        ("9.0", dict(page_size=128, group=16), "sm90"),
        ("9.0", dict(group=1), "sm90"),
        ("9.0", dict(group=5), "portable"),
        ("9.0", dict(page_size=48), "portable"),
        ("9.0", dict(page_size=8), "portable"),
        ("9.0", dict(head_dim=256), "portable"),
        ("9.0", dict(dtype="float32"), "portable"),
        ("9.0", dict(dtype="float8_e4m3fn"), "portable"),
        ("9.0", dict(group=17), "portable"),
        ("9.0", dict(lse=True), "portable"),
        ("9.0", dict(head_dim=12), "reference"),
        ("8.0", {}, "portable"),
        ("8.9", dict(head_dim=256), "portable"),
        ("10.0", {}, "portable"),
        ("7.5", dict(dtype="float16"), "reference"),
        (None, {}, "reference"),
    ],
)
def test_implementation_for(capability, shape, name):
    assert implementation_for(capability, **dict(head_dim=128, dtype="bfloat16", page_size=64, group=4) | shape) == name


PLAN: dict[str, Any] = dict(page_size=8, kv_heads=2, group=2, head_dim=16, dtype="float32", chunk=24)


def test_an_implementation_that_cannot_says_so_with_numbers():
    rows = draw(Case(Heads(4, 2, 16), (5, 9), page_size=8)).rows
    with pytest.raises(NotImplementedError, match="cannot take head_dim 16: it takes 64, 128"):
        plan_work(rows, **PLAN, implementation="sm90")
    with pytest.raises(NotImplementedError, match="cannot take head_dim 20: it takes 8 to 256"):
        plan_work(rows, **dict(PLAN, head_dim=20), implementation="portable")
    with pytest.raises(ValueError, match="decodes is False in a step of 0 chunk lanes"):
        plan_work(rows, **dict(PLAN, chunk=0), decodes=False)
    with pytest.raises(ValueError, match="must be one of sm90, portable, reference, got 'cuda'"):
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(sinks_Q=(5,)), r"sinks_Q must be \(4,\), one for each query head, got \(5,\)"),
        (dict(k_scale_K=(2,)), "k_scale_K is for float8_e4m3fn pages, these are float32"),
        (dict(v_scale_K=(2,)), "v_scale_K is for float8_e4m3fn pages, these are float32"),
        (dict(k_scale_K=(4,), pages="float8_e4m3fn"), r"k_scale_K must be \(2,\), one for each kv head, got \(4,\)"),
        (dict(q="float16"), "q must be the pages' dtype, float32, got float16"),
        (dict(q="int32", pages="float8_e4m3fn"), "q must be bfloat16, float16 or float32, got int32"),
    ],
)
def test_wrong_extras_are_refused_with_both_numbers(change, sentence):
    rows = Rows(jnp.zeros((4, 6), jnp.int32), *(jnp.zeros(4, jnp.int32) for _ in range(3)))
    change = dict(change)
    dtype = change.pop("pages", "float32")
    work = plan_work(rows, **dict(PLAN, dtype=dtype), implementation="reference")
    q, pages = jnp.zeros((28, 4, 16), change.pop("q", "float32")), jnp.zeros((20, 2, 8, 16), dtype)
    with pytest.raises(ValueError, match=sentence):
        paged_attention(q, pages, pages, rows, work, scale=1.0, **cast(Any, {name: jnp.ones(size) for name, size in change.items()}))


def test_what_an_implementation_lacks_is_planned_around():
    rows = draw(Case(Heads(4, 2, 64), (5, 9))).rows
    shape: dict[str, Any] = dict(page_size=64, kv_heads=2, group=2, head_dim=64, dtype="bfloat16")
    for what in IMPLEMENTATIONS["sm90"].lacks:
        with pytest.raises(NotImplementedError, match="attention 'sm90' cannot take"):
            plan_work(rows, **shape, **{what: True}, implementation="sm90")
        assert implementation_for("9.0", head_dim=64, dtype="bfloat16", page_size=64, **{what: True}) == "portable"
    if "sinks" in IMPLEMENTATIONS["sm90"].lacks:
        work = plan_work(rows, **shape, implementation="sm90", interpret=True)
        pages = jnp.zeros((9, 2, 64, 64), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match="'sm90' lacks sinks: call plan_work with sinks=True"):
            paged_attention(jnp.zeros((2, 4, 64), jnp.bfloat16), pages, pages, rows, work, scale=1.0, sinks_Q=jnp.zeros(4))


@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_write_kv_stores_fp8_by_its_scales(implementation):
    """Each number is the fp8 number nearest to it / scale; beyond 448 it is 448, not NaN."""
    random = np.random.default_rng(3)
    pages = jnp.asarray(random.normal(size=(2, 9, 3, 8, 24)), "float8_e4m3fn")
    new = random.normal(size=(2, 5, 3, 24)).astype(np.float32) * 10
    new[:, 2] *= 1000
    scales, slot = np.array([[0.5, 1, 2], [0.1, 3, 4]], np.float32), np.array([9, 70, 33, 8, 12], np.int32)
    write = partial(write_kv, implementation=implementation, interpret=not on_gpu())
    out = write(*pages, *map(jnp.asarray, (*new, slot)), k_scale_K=scales[0], v_scale_K=scales[1])
    wanted = np.asarray(pages).astype(np.float32)
    for n in range(5):
        wanted[:, slot[n] // 8, :, slot[n] % 8] = np.clip(new[:, n] / scales[:, :, None], -448, 448).astype("float8_e4m3fn")
    np.testing.assert_array_equal(np.stack(out).astype(np.float32), wanted)
    assert np.abs(wanted).max() == 448
