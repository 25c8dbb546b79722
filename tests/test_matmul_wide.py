"""Products of hundreds of rows and more, whose empty lanes are left out; and one row's logits."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import on_gpu
from engines import make_plan
from test_matmul import LLAMA_8B, QWEN_05B, SILU, apart, decoder_mesh, decoder_of, draw, exact, gpu, plain_step, step

from bench.calls import products
from jaxllm.parallel import on_each, spec
from jaxllm.plan import Bucket
from jaxllm.programs import step_options
from pallas_kernels import Rows, head_for, linears_for, matmul, matmul_one_row, matmul_sm90_wide, turn_and_write, work
from pallas_kernels.matmul import ManyRows, Product, many_rows_tile
from pallas_kernels.matmul_join import join
from pallas_kernels.matmul_sm90_wide import Tile, clocks, tile_for
from pallas_kernels.work import lanes, live, live_rows

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def kept(rows: int, filled: tuple[int, int, int] | None) -> np.ndarray:
    return np.arange(rows) if filled is None else np.r_[0 : filled[0], filled[1] : filled[2]]


CASES = {  # rows, features, gated, the filled lanes, blocks, blocks in a cluster, features of a tile if not the most
    "every block has as much": (256, 256, False, None, 2, 1),
    "two are left, cut in four": (256, 256, False, None, 8, 1),
    "one is left, cut in two": (128, 256, False, None, 3, 1),
    "gated, the last one ragged": (256, 320, True, None, 3, 1),
    "neither rows nor features are whole": (300, 192, True, None, 4, 1),
    "few rows, a prompt in the middle": (512, 256, False, (40, 256, 300), 4, 1),
    "rows and prompt share a tile": (384, 128, True, (40, 64, 300), 4, 1),
    "a prompt alone": (384, 256, False, (0, 64, 65), 7, 1),
    "no prompt": (384, 256, False, (200, 384, 384), 7, 1),
    "all is filled": (384, 256, False, (300, 300, 384), 3, 1),
    "nothing is filled": (256, 256, False, (0, 64, 64), 2, 1),
    "a cluster": (256, 256, False, None, 2, 2),
    "clusters, nothing whole": (300, 192, True, None, 4, 2),
    "clusters, a prompt alone": (512, 256, False, (0, 64, 65), 6, 2),
    "clusters, rows and prompt": (512, 256, True, (1, 300, 512), 4, 2),
    "clusters that cut": (512, 256, False, (300, 300, 512), 8, 2),
    "64 wide, more turns than the ring holds": (384, 256, False, None, 2, 1, 64),
    "96 wide, clusters, the last one ragged": (512, 320, False, (300, 300, 512), 4, 2, 96),
    "128 wide, clusters, two are left and cut in two": (512, 320, False, (40, 300, 512), 8, 2, 128),
    "160 wide, nothing whole": (300, 384, False, None, 2, 1, 160),
    "192 wide, one is left and cut in three": (256, 384, False, None, 3, 1, 192),
    "224 wide, clusters": (300, 448, False, None, 2, 2, 224),
    "gated, 96 of each": (256, 320, True, None, 3, 1, 192),
    "gated, 96 of each, clusters, a prompt alone": (512, 192, True, (0, 64, 65), 4, 2, 192),
    "gated, 112 of each, clusters, copied by sixteen": (256, 448, True, None, 4, 2, 224),
    "gated, 112 of each, the last one ragged": (256, 192, True, None, 4, 1, 224),
    "gated, 64 of each, too narrow to be cut": (300, 192, True, None, 8, 2, 128),
    "gated, 32 of each": (300, 64, True, None, 4, 1, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_filled_lanes_are_multiplied(name, capfd):
    rows, features, gated, filled, workers, *tile = CASES[name]
    x, weight = draw(rows, 128), draw(features * (1 + gated), 128, scale=128**-0.5)
    live_3 = jnp.array(filled or (rows, rows, rows), jnp.int32)
    options: dict[str, Any] = dict(tile=Tile(*tile), workers=workers, act=SILU if gated else None, interpret=True)
    found = matmul_sm90_wide.linear(x, weight, live_3, **options)
    assert found.shape == (rows, features) and "RACE DETECTED" not in capfd.readouterr().out
    if len(here := kept(rows, filled)):
        assert apart(found[here], exact(x, weight, act=gated)[here]) < 6e-3


def test_tiles_without_a_filled_lane_are_left_out():
    """Of five tiles of rows the first, a part of which is filled, and the two that hold the prompt are computed."""
    x, weight = draw(640, 128), draw(256, 128, scale=128**-0.5)
    found = matmul_sm90_wide.linear(x, weight, jnp.array([7, 256, 400]), tile=Tile(1), workers=2, interpret=True)
    right = [bool(np.allclose(np.asarray(found[i : i + 128], float), exact(x[i : i + 128], weight), atol=0.05)) for i in range(0, 640, 128)]
    assert right == [True, False, True, True, False]


@pytest.mark.parametrize("width", [256, 160])
def test_a_lane_is_the_same_in_whatever_company(width):
    """Same lane, same bits, whatever the others hold and however the tiles are cut: not even their NaN reaches it."""
    x, weight = draw(256, 128), draw(256, 128)
    run = partial(matmul_sm90_wide.linear, weight_FD=weight, interpret=True)
    found = run(x, live_3=jnp.array([256, 256, 256]), tile=Tile(1), workers=2)
    alone = run(x.at[1:].set(jnp.nan), live_3=jnp.array([1, 256, 256]), tile=Tile(1, width), workers=4)
    np.testing.assert_array_equal(np.asarray(found[0], np.float32), np.asarray(alone[0], np.float32))


@pytest.mark.parametrize("width", [256, 224, 192])
def test_float32_comes_out_where_it_is_wanted(width, capfd):
    """Logits of rows with a token, in twice as many copies; a border that is no copy's; and what rounding would have cost."""
    hidden, weight = draw(300, 128), draw(320, 128, scale=128**-0.5)
    options: dict[str, Any] = dict(workers=4, dtype=jnp.float32, interpret=True)
    found = matmul_sm90_wide.linear(hidden, weight, jnp.array([200, 300, 300]), tile=Tile(2, width), **options)
    assert found.dtype == jnp.float32 and "RACE DETECTED" not in capfd.readouterr().out
    assert apart(found[:200], exact(hidden, weight)[:200]) < 1e-6 < apart(found[:200].astype(jnp.bfloat16), exact(hidden, weight)[:200])


@pytest.mark.parametrize("parts", [None, 2])
def test_a_norm_leaves_padding_out(parts, monkeypatch):
    """Lanes that hold a token are summed and normed as ever, to the bit, several by each program; of the others nothing is written."""
    monkeypatch.setattr(work, "PROGRAMS", 2)
    h, norm = draw(12, 96), draw(1, 96)[0]
    given = None if parts is None else jnp.stack([draw(12, 96).astype(jnp.float32)] * parts)
    run = partial(join, h, given, norm, eps=1e-6, interpret=True)
    for whole, some in zip(run(), run(live_3=jnp.array([3, 5, 7])), strict=True):
        here = kept(12, (3, 5, 7))
        np.testing.assert_array_equal(np.asarray(some[here], np.float32), np.asarray(whole[here], np.float32))
    assert not np.array_equal(np.asarray(run(live_3=jnp.array([3, 5, 7]))[1][3:5], float), np.asarray(run()[1][3:5], float))


def test_a_turn_and_write_leaves_padding_out(monkeypatch):
    monkeypatch.setattr(work, "PROGRAMS", 2)
    pages, qkv, slot = jnp.zeros((9, 2, 16, 64), jnp.bfloat16), draw(8, 10 * 64)[None], 16 + 16 * jnp.arange(8)
    run = partial(turn_and_write, pages, pages, qkv, slot, heads=6, implementation="portable", interpret=True)
    here, whole, some = kept(8, (2, 5, 6)), run(), run(live_3=jnp.array([2, 5, 6]))
    np.testing.assert_array_equal(np.asarray(some[0][here], float), np.asarray(whole[0][here], float))
    for found, meant in zip(some[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(found[1 + here], float), np.asarray(meant[1 + here], float))
        assert not np.asarray(found[3:6], float).any() and np.asarray(meant[3:6], float).any()


@pytest.mark.parametrize("seed", range(20))
def test_live_lanes_are_those_that_some_row_owns(seed):
    """None that a row owns is left out, and the borders are as tight as they can be."""
    random = np.random.default_rng(seed)
    count, chunk = 8, 40
    length, taken = random.integers(0, 2, count) * random.integers(1, 30, count), np.zeros(count, int)
    for row in random.permutation(count)[: random.integers(0, 4)]:
        length[row] = max(length[row], 1)
        taken[row] = random.integers(1, min(length[row], 9) + 1)
    start = np.where(taken > 0, np.cumsum(taken) - taken, 0)
    rows = Rows(jnp.zeros((count, 1), jnp.int32), *(jnp.asarray(a, jnp.int32) for a in (length, start, taken)))
    owned = np.flatnonzero(np.asarray(lanes(rows, chunk).position_N) >= 0)
    first, begin, end = np.asarray(live(rows)).tolist()
    assert np.asarray(live_rows(rows)).tolist() == [max([i + 1 for i in range(count) if length[i]], default=0), count, count]
    decodes, chunks = owned[owned < count], owned[owned >= count]
    assert begin == count
    assert first == (decodes.max() + 1 if len(decodes) else 0) and end == (chunks.max() + 1 if len(chunks) else count)


def test_hundreds_of_rows_are_multiplied_so_on_hopper():
    """Whatever the product, if the copies' rows are as long as the kernel wants them."""
    rows = Rows(jnp.zeros((1024, 1), jnp.int32), *(jnp.zeros(1024, jnp.int32) for _ in range(3)))
    for lanes_, wide in ((704, False), (9216, True)):
        run = linears_for(gpu("9.0"), lanes_, "bfloat16", owners=rows)
        assert isinstance(run, ManyRows) and (run.live_3 is not None) is wide
        tile = partial(many_rows_tile, run.kind, cores=132)
        assert all(isinstance(tile(lanes_, product), Tile) is wide for product in [*LLAMA_8B, *QWEN_05B, Product(3584, 3584)])
    assert tile(8193, LLAMA_8B[0]) is None, "one row beside 8,192 tokens: copies go by eight"
    assert tile(9216, Product(3584, 96)) is None and tile(9216, Product(136, 128)) is None, "and by 64 features and inputs"
    assert linears_for(gpu("10.0"), 9216, "bfloat16", owners=rows) is None


WIDTHS = {  # lanes: QKV, o, gate and up, down
    "qwen2.5-3b": {1024: (160, 128, 224, 128), 2304: (256, 160, 256, 160), 9216: (256, 256, 256, 256)},
    "qwen2.5-0.5b": {1024: (96, 128, 256, 128), 2304: (192, 128, 224, 128), 9216: (128, 128, 256, 128)},
    "llama-3.1-8b": {768: (160, 192, 224, 192), 1024: (256, 256, 256, 256), 2304: (256, 192, 256, 192), 9216: (256, 256, 256, 256)},
}


@pytest.mark.parametrize(("model", "rows"), [(model, rows) for model in WIDTHS for rows in WIDTHS[model]])
def test_tiles_are_as_wide_as_fills_the_device(model, rows):
    """On an H200's 132 multiprocessors."""
    found = [tile_for(rows, product.features, product.gated, 132).features for product in products(model).values()]
    assert tuple(found) == WIDTHS[model][rows]


def test_the_clocks_of_a_product_are_those_of_its_waves():
    """Of 1,024 rows, four clusters high, on 66 of them: tiles by their tensor cores or their shared memory, and what is left cut."""
    count = partial(clocks, 1024, workers=132)
    assert count(256 * 33, gated=False, tile=Tile()) == 2 * 5 * 256
    assert count(160 * 16, gated=False, tile=Tile(features=160)) == 5 * 160
    assert count(96 * 16, gated=False, tile=Tile(features=96)) == 3 * 96 + 256
    assert count(256 * 17, gated=False, tile=Tile()) == 5 * 256 + 3 * 64 + 256, "2 left, cut in four"
    assert count(192 * 18, gated=False, tile=Tile(features=192)) == 5 * 192 + 3 * 64 + 256, "6 left, cut in three"
    assert count(128 * 20, gated=True, tile=Tile()) == 5 * 256 + 5 * 128, "14 left, and a gated tile is cut in two"
    assert count(256 * 4, gated=False, tile=Tile()) == 2000 / 3, "all cut in four: the weights of three turns are on their way"


def test_a_decoder_is_the_same_through_them(monkeypatch):
    """Five rows, of which three are filled: the logits of those, to what bfloat16 rounds; of the others there are none."""
    monkeypatch.setattr(matmul, "many_rows_tile", lambda *args, cores, trial: Tile(1))
    plain, _ = plain_step("qwen2", 5)
    found, _ = step(decoder_of("qwen2"), ManyRows("cpu", 2, interpret=True, live_3=jnp.array([3, 5, 5], jnp.int32)), 5)
    assert apart(found[:3], plain[:3]) < 2e-2
    assert not np.allclose(found[3:], plain[3:], atol=0.05), "lanes without a token were computed"


# ---------------------------------------------------------------------- what XLA is to try kernels for


def test_a_block_names_its_products():
    """As its weights are, and as a device has them."""
    qkv, hidden = 128 + 2 * 64, 128
    block = decoder_of("qwen2").blocks[0]
    assert block.products(1) == [Product(qkv, 128), Product(128, 128), Product(hidden, 128, True), Product(128, hidden)]
    assert block.products(2) == [Product(qkv // 2, 128), Product(128, 64), Product(hidden // 2, 128, True), Product(128, hidden // 2)]


@pytest.mark.parametrize(
    ("rows", "products", "covered"),
    [
        *[(64, LLAMA_8B, True), (256, LLAMA_8B, False), (512, LLAMA_8B, False), (9216, LLAMA_8B, True), (256, QWEN_05B, True)],
        *[(64, [*LLAMA_8B, Product(3584, 3584)], False), (9216, QWEN_05B, True), (64, [Product(3072, 4096)], True)],
        (9216, [*LLAMA_8B, Product(4096, 96)], False),
    ],
)
def test_a_step_is_ours_if_all_its_products_are(rows, products, covered):
    assert ManyRows("NVIDIA H200", 132).covers(rows, products) is covered


def test_nothing_is_tried_for_products_that_are_ours_or_cublas_is_good_at():
    plan = make_plan(decode_steps=1)
    cases = {  # device, rows, prompt tokens, ours: is Triton left out, is nothing tried?
        ("9.0", 64, 0, True): (True, True),
        ("9.0", 64, 0, False): (False, False),
        ("9.0", 256, 0, False): (True, True),
        ("9.0", 1, 448, False): (True, True),
        ("8.0", 1, 0, True): (True, True),
        ("8.0", 256, 0, False): (False, False),
        ("8.0", 64, 448, False): (True, False),
    }
    for (capability, rows, chunk, ours), wanted in cases.items():
        options = step_options(Bucket(chunk, rows), plan, gpu(capability), ours)
        assert ("xla_gpu_enable_triton_gemm" in options, "xla_gpu_autotune_level" in options) == wanted, (capability, rows, chunk, ours)
        assert not options.get("xla_gpu_enable_triton_gemm") and not options.get("xla_gpu_autotune_level")


# ---------------------------------------------------------------------- one row's logits


def test_one_row_s_logits_keep_float32():
    hidden, weight = draw(1, 128), draw(1000, 128)
    found = matmul_one_row.linear(hidden, weight, tile=matmul_one_row.Tile(16, 8, 1), dtype=jnp.float32, interpret=True)
    assert found.dtype == jnp.float32 and apart(found, exact(hidden, weight)) < 1e-6
    assert apart(found.astype(jnp.bfloat16), exact(hidden, weight)) > 1e-4, "what rounding would have cost"


def test_one_row_of_16_bits_has_a_head_of_its_own():
    cpu: Any = SimpleNamespace(platform="cpu")
    assert callable(head_for(gpu("9.0"), 1, "bfloat16")) and callable(head_for(gpu("8.0"), 1, "float16"))
    for device, rows, dtype in ((gpu("9.0"), 2, "bfloat16"), (gpu("7.5"), 1, "float16"), (gpu("9.0"), 1, "float32"), (cpu, 1, "bfloat16")):
        assert head_for(device, rows, dtype) is None


def test_many_rows_of_which_some_have_a_token_have_one_too():
    rows = Rows(jnp.zeros((1024, 1), jnp.int32), *(jnp.zeros(1024, jnp.int32) for _ in range(3)))
    assert callable(head_for(gpu("9.0"), 1024, "bfloat16", rows))
    assert head_for(gpu("9.0"), 1024, "bfloat16") is None and head_for(gpu("9.0"), 512, "bfloat16", rows) is None
    assert head_for(gpu("8.0"), 1024, "bfloat16", rows) is None


def test_every_device_makes_its_part_of_one_row_s_logits():
    mesh, hidden, weight = decoder_mesh(2), draw(1, 128), draw(256, 128)
    head = partial(matmul_one_row.linear, tile=matmul_one_row.Tile(16, 8, 1), dtype=jnp.float32, interpret=True)
    found = on_each(mesh, head, (spec(()), spec(("vocab", None))), spec((None, "vocab")))(hidden, weight)
    assert apart(found, exact(hidden, weight)) < 1e-6


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("filled", [None, (700, 1024, 1500)], ids=["full", "padded"])
@pytest.mark.parametrize("product", [*LLAMA_8B, *QWEN_05B], ids=str)
def test_wide_products_on_a_gpu(product, filled):
    """Against float32, and the same twice; the stale lanes of a run before must not show."""
    device, rows = jax.devices()[0], 2304
    if getattr(device, "compute_capability", None) != "9.0":
        pytest.skip(f"{device.device_kind} is no Hopper")
    x, weight = draw(rows, product.inputs), draw(product.features * (1 + product.gated), product.inputs, scale=product.inputs**-0.5)
    run = partial(matmul_sm90_wide.linear, workers=device.core_count, act=SILU if product.gated else None)
    meant = np.asarray(jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest"))
    if product.gated:
        gate, up = np.split(meant, 2, axis=1)
        meant = gate / (1 + np.exp(-gate)) * up
    here, live_3 = kept(rows, filled), jnp.array(filled or (rows, rows, rows), jnp.int32)
    for tile in (Tile(1), *(Tile(2, width) for width in matmul_sm90_wide.WIDTHS)):
        found = [np.asarray(run(x, weight, live_3, tile=tile)[here], np.float32) for _ in range(2)]
        assert apart(found[0], meant[here]) < 6e-3
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("rows", [1, 1024])
@pytest.mark.parametrize(("vocabulary", "inputs"), [(128256, 4096), (151936, 896)])
def test_logits_on_a_gpu(vocabulary, inputs, rows):
    """One row's, and those of 700 rows of 1,024 that have a token."""
    count = min(rows, 700)
    length_M = (jnp.arange(rows) < count).astype(jnp.int32)
    head = head_for(jax.devices()[0], rows, "bfloat16", Rows(length_M[:, None], length_M, length_M, 0 * length_M))
    assert head is not None
    hidden, weight = draw(rows, inputs), draw(vocabulary, inputs, scale=inputs**-0.5)
    meant = jnp.matmul(hidden.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest")
    assert apart(jax.jit(head)(hidden, weight)[:count], meant[:count]) < 1e-5
