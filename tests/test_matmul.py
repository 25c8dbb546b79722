"""The linear layers of steps with few rows: each kernel against float64, then a whole decoder through them against its plain products."""

import json
import math
from dataclasses import astuple, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import on_gpu
from flax import nnx

from bench.workloads import SHAPES
from converters.checkpoint import read_config, tensor_shapes
from jaxllm.cache import PAGE_AXES
from jaxllm.decoder import Decoder
from jaxllm.layers import ACTIVATIONS
from jaxllm.parallel import make_mesh, sharding
from jaxllm.sharded import Mailboxes, ShardedLinears
from jaxllm.step import PagedContext
from jaxllm.weights import RandomWeights
from pallas_kernels import (
    Norm,
    Rows,
    Stream,
    join_devices,
    linears_for,
    matmul,
    matmul_one_row,
    matmul_sm90,
    matmul_sm90_wide,
    plan_work,
    turn_and_write,
)
from pallas_kernels.blocks import file_name
from pallas_kernels.matmul import ManyRows, OneRow, Product, many_rows_tile
from pallas_kernels.matmul_join import join

pytestmark = pytest.mark.usefixtures("compiled_quickly")

RNG = np.random.default_rng(5)
SILU = ACTIVATIONS["silu"]


def draw(*shape: int, scale: float = 1.0, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape) * scale, dtype)


def exact(x, weight, *, norm=None, act=False, residual=None, eps=1e-6, offset=0.0) -> np.ndarray:
    """What the kernels mean, in float64."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    if norm is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (np.asarray(norm, np.float64) + offset)
    y = x @ weight.T
    if act:
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    return y if residual is None else y + np.asarray(residual, np.float64)


def apart(found, wanted) -> float:
    """The error's share: NaN and what was never written are errors too."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape and np.isfinite(found).all()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("inputs", "features", "together", "ahead"), [(512, 32, 4, True), (512, 32, 2, False), (600, 30, 4, False), (600, 30, 2, True)]
)
def test_one_row_is_normed_multiplied_gated_and_added(inputs, features, together, ahead):
    """In one run and in two, of tiles that are whole and of such that are not."""
    one_row = partial(matmul_one_row.linear, tile=matmul_one_row.Tile(4, together, 1, ahead), interpret=True)
    x, norm, weight = draw(1, inputs), draw(inputs), draw(features, inputs, scale=inputs**-0.5)
    assert apart(one_row(x, weight), exact(x, weight)) < 4e-3
    normed = one_row(x, weight, norm_D=norm, eps=1e-6, offset=1.0)
    assert apart(normed, exact(x, weight, norm=norm, offset=1.0)) < 6e-3
    assert apart(normed, exact(x, weight, norm=norm)) > 0.1, "without the offset: a mistake that must show"
    assert apart(one_row(x, weight, act=SILU), exact(x, weight, act=True)) < 8e-3
    residual = draw(1, features)
    assert apart(one_row(x, weight, residual_1F=residual), exact(x, weight, residual=residual)) < 6e-3


@pytest.mark.parametrize("together", [4, 2])
def test_an_early_tile_has_the_next_kernel_launched(together):
    """After the last of a program's weights, and once."""

    def traced(early: bool) -> str:
        tile = matmul_one_row.Tile(4, together, 1, early=early)
        return str(jax.make_jaxpr(partial(matmul_one_row.linear, tile=tile, act=SILU))(draw(1, 512), draw(32, 512)))

    assert traced(True).count("griddepcontrol.launch_dependents") == 1 and "griddepcontrol" not in traced(False)


@pytest.mark.parametrize(
    ("tile", "bias", "pairs", "normed"),
    [
        (matmul_one_row.Tile(4, 2, 1, True), True, 8, False),
        (matmul_one_row.Tile(2, 1, 2), False, 8, False),
        (matmul_one_row.Tile(32, 32, 1), True, 4, False),
        (matmul_one_row.Tile(4, 4, 1), False, 8, True),
    ],
)
def test_one_row_is_turned_and_written_as_by_a_kernel_of_its_own(tile, bias, pairs, normed, monkeypatch):
    """Bit for bit; in that kernel itself where heads are normed, or turned in part."""
    monkeypatch.setattr(matmul, "one_row_tile", lambda kind, product: tile)
    run, heads, kv_heads, head_dim = OneRow("cpu", interpret=True), 6, 2, 16
    x, norm, weight = draw(1, 296), Norm(draw(296), 1e-6, 0.0), draw((heads + 2 * kv_heads) * head_dim, 296, scale=0.1)
    angle, pages, slot = jnp.asarray(RNG.uniform(0, 6, (1, 1, pairs)), jnp.float32), draw(3, kv_heads, 16, head_dim), jnp.array([37])
    options: dict[str, Any] = dict(heads=heads, cos_sin=(jnp.cos(angle), jnp.sin(angle)), bias_F=draw(len(weight)) if bias else None)
    options |= dict(q_norm_H=draw(head_dim), k_norm_H=draw(head_dim), eps=1e-6) if normed else {}
    _, read = run.norm(Stream(x), norm)
    found = run.heads(read, weight, pages, pages + 1, slot, implementation="portable", interpret=True, **options)
    apart = turn_and_write(pages, pages + 1, run.product(read, weight), slot, implementation="portable", interpret=True, **options)
    for ours, other in zip(found, apart, strict=True):
        np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize(("rows", "gated"), [(2, False), (8, True), (32, False), (64, True), (128, False), (256, False), (256, True)])
def test_few_rows_leave_parts_of_their_products(rows, gated):
    x, weight = draw(rows, 256), draw(128, 256, scale=1 / 16)
    tile = matmul_sm90.Tile(32, 64, 1 if gated else 2)
    found = matmul_sm90.linear(x, weight, tile=tile, act=SILU if gated else None, interpret=True)
    assert found.shape == (tile.parts, rows, 64 if gated else 128) and found.dtype == (jnp.bfloat16 if gated else jnp.float32)
    assert apart(np.asarray(found, np.float64).sum(0), exact(x, weight, act=gated)) < (8e-3 if gated else 1e-5)


@pytest.mark.parametrize(
    ("rows", "features", "tile"), [(8, 72, (32, 64)), (256, 72, (32, 64)), (8, 136, (24, 64, 2, 2)), (256, 256, (128, 64, 2))], ids=str
)
def test_tiles_need_not_divide_their_product(rows, features, tile):
    """The last block, or cluster, has features that do not exist: gate's run into up's, and up's past the end. Wide parts are copied out
    in pieces."""
    tile = matmul_sm90.Tile(*tile)
    gated = tile.parts == 1
    x, weight = draw(rows, 256), draw(features * (1 + gated), 256, scale=1 / 16)
    found = matmul_sm90.linear(x, weight, tile=tile, act=SILU if gated else None, interpret=True)
    assert found.shape == (tile.parts, rows, features)
    assert apart(np.asarray(found, np.float64).sum(0), exact(x, weight, act=gated)) < (8e-3 if gated else 1e-5)


def test_a_row_is_the_same_in_whatever_company():
    """Same bucket, same bits: nothing of another row reaches it, not even its NaN."""
    x, weight = draw(8, 128), draw(64, 128)
    run = partial(matmul_sm90.linear, weight_FD=weight, tile=matmul_sm90.Tile(32, 64), interpret=True)
    alone = run(x.at[1:].set(jnp.nan))
    np.testing.assert_array_equal(np.asarray(run(x)[:, :1], np.float32), np.asarray(alone[:, :1], np.float32))


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_sum_is_joined_and_normed(parts):
    h, added, norm = draw(3, 96), draw(parts, 3, 96, dtype=jnp.float32) if parts else None, draw(96)
    sums, normed = join(h, added, norm, eps=1e-5, offset=1.0, interpret=True)
    wanted = np.asarray(h, np.float64) + (0 if added is None else np.asarray(added, np.float64).sum(0))
    assert apart(sums, wanted) < 3e-3
    assert apart(normed, exact(sums, np.eye(96), norm=norm, offset=1.0, eps=1e-5)) < 3e-3


TURNS = {  # query heads, kv heads, features a head, pairs turned, norms, parts
    "qwen2": (14, 2, 64, 32, False, 2),
    "qwen3": (4, 2, 128, 64, True, 1),
    "partial": (3, 3, 80, 16, False, 3),
    "unturned": (8, 1, 32, 0, True, 1),
}


@pytest.mark.parametrize("name", TURNS)
def test_heads_are_turned_and_written(name):
    """The kernel against its meaning in jax.numpy, whose parts are tested elsewhere: norms and turns by the families' goldens."""
    heads, kv_heads, head_dim, pairs, norms, parts = TURNS[name]
    size, angle = (heads + 2 * kv_heads) * head_dim, draw(3, 1, pairs, dtype=jnp.float32)
    args = [
        draw(4, kv_heads, 16, head_dim),
        draw(4, kv_heads, 16, head_dim),
        draw(parts, 3, size, dtype=jnp.float32),
        jnp.array([17, 3, 63]),
    ]
    options: dict[str, Any] = dict(heads=heads, bias_F=draw(size), cos_sin=(jnp.cos(angle), jnp.sin(angle)) if pairs else None)
    if norms:
        options |= dict(q_norm_H=draw(head_dim), k_norm_H=draw(head_dim), eps=1e-6, offset=1.0)
    found = turn_and_write(*args, **options, implementation="portable", interpret=True)
    for ours, meant in zip(found, turn_and_write(*args, **options, implementation="reference"), strict=True):
        assert apart(ours, meant) < 1e-3


def test_heads_of_another_shape_are_refused():
    pages, slots = jnp.zeros((2, 2, 16, 64)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"must be \(3, 512\) .* got \(3, 500\)"):
        turn_and_write(pages, pages, jnp.zeros((1, 3, 500)), slots, heads=4)
    with pytest.raises(ValueError, match="cos_sin turns 128 features, a head has 64"):
        turn_and_write(pages, pages, jnp.zeros((1, 3, 512)), slots, heads=4, cos_sin=(jnp.zeros((3, 1, 64)), jnp.zeros((3, 1, 64))))


# ---------------------------------------------------------------------- which way is taken


def gpu(capability: str) -> Any:
    kind = "NVIDIA H200" if capability == "9.0" else "other"
    return SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=kind, core_count=132)


LLAMA_8B = [Product(6144, 4096), Product(4096, 4096), Product(14336, 4096, True), Product(4096, 14336)]
QWEN_05B = [Product(1152, 896), Product(896, 896), Product(4864, 896, True), Product(896, 4864)]


def test_the_way_is_chosen_by_device_and_rows():
    cpu: Any = SimpleNamespace(platform="cpu")
    assert linears_for(cpu, 1, "bfloat16") is None
    assert isinstance(linears_for(gpu("8.0"), 1, "bfloat16"), OneRow)
    assert linears_for(gpu("8.0"), 8, "bfloat16") is None, "not measured there"
    assert isinstance(linears_for(gpu("9.0"), 64, "bfloat16"), ManyRows)
    assert isinstance(linears_for(gpu("9.0"), 1024, "float16"), ManyRows)
    assert linears_for(gpu("9.0"), 64, "float32") is None
    assert isinstance(linears_for(gpu("9.0"), 9216, "bfloat16"), ManyRows)


def test_a_product_that_xla_is_better_at_is_left_to_it():
    tile = partial(many_rows_tile, "NVIDIA H200", cores=132)
    assert all(tile(rows, product) is not None for rows in (2, 8, 64, 128, 256) for product in QWEN_05B)
    assert all(tile(320, product) is None for product in QWEN_05B), "nobody tried 320 rows, and no step has them"
    assert [tile(256, product) for product in LLAMA_8B] == [None, None, matmul_sm90_wide.Tile(2, 224), None], "bound by arithmetic"
    assert all(tile(64, product) is not None for product in LLAMA_8B)
    assert tile(8, Product(3584, 3584)) is None, "not measured"
    assert many_rows_tile("NVIDIA H100 80GB HBM3", 8, QWEN_05B[0], cores=132) is None, "not measured there"


def test_a_tile_is_for_trials_until_a_gpu_has_compared_it(monkeypatch, tmp_path):
    rows = [dict(rows=8, features=64, inputs=size, gated=False, tile=[64, 64, 1, 1, 1], us=1.0, compared=size == 64) for size in (64, 128)]
    (tmp_path / "tuning" / "linear").mkdir(parents=True)
    (tmp_path / "tuning" / "linear" / file_name("made up")).write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(matmul, "files", lambda package: tmp_path)
    tile = partial(many_rows_tile, "made up", 8, cores=132)
    found = {trial: [tile(Product(64, size), trial=trial) is not None for size in (64, 128)] for trial in (False, True)}
    assert found == {False: [True, False], True: [True, True]}


def test_every_measured_tile_fits():
    """Whole turns of whole eights, at least two turns ahead, in the shared memory and the registers that there are."""
    for (lines, product), tile in matmul._measured("NVIDIA H200", trial=True).items():
        for rows in [rows for rows, tried in matmul.MEASURED.items() if tried == lines]:
            found, halves = many_rows_tile("NVIDIA H200", rows, product, cores=132, trial=True), 1 + product.gated
            assert found is not None and list(astuple(found)) == tile
            if isinstance(found, matmul_sm90_wide.Tile):
                assert matmul_sm90_wide.fits(rows, product.features, product.inputs) and rows >= 256
                assert found.features in matmul_sm90_wide.WIDTHS and found.cluster in (1, 2)
                continue
            assert rows in matmul_sm90.ROWS
            assert found.features % 8 == 0 and found.features * halves <= 256, "what a product of the tensor cores may be wide"
            assert product.inputs % (found.inputs * found.parts) == 0 and (found.parts == 1 or not product.gated)
            depth = matmul_sm90.stages(rows, product.inputs, found, halves=halves, itemsize=2)
            assert depth >= min(2, product.inputs // found.inputs // found.parts)
            turn = (max(64, rows) + halves * found.features) * found.inputs * 2
            out = 64 * matmul_sm90.width(found) * (2 if rows > 64 else 1) * (2 if found.parts == 1 else 4)
            assert found.blocks * (depth * turn + out + 2048) <= 228 * 1024, "a multiprocessor's, of which a block's start takes 1024 bytes"


# ---------------------------------------------------------------------- a whole decoder

SIZES = dict(hidden_size=128, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=64)
MODELS = {
    "qwen2": dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", tie_word_embeddings=True, head_dim=32),
    "qwen3": dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", tie_word_embeddings=False, head_dim=32, attention_bias=False),
}
COMMON = dict(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=64, initializer_range=0.02)


@cache
def decoder_of(name: str, devices: int = 1) -> Decoder:
    """With norms that are not the identity."""
    model = read_config(SIZES | COMMON | MODELS[name])
    return shaken(Decoder(RandomWeights(tensor_shapes(model), decoder_mesh(devices), "bfloat16", 3), model))


def step(decoder: Decoder, linears, rows: int, *, devices: int = 1, implementation="portable", dtype="bfloat16"):
    """Logits and pages after one step of `rows` rows, each with four tokens before it."""
    c, lengths, mesh = decoder.c, jnp.full((rows,), 5, jnp.int32), decoder_mesh(devices)
    zeros = jnp.zeros((rows,), jnp.int32)
    at = Rows(1 + jnp.arange(rows, dtype=jnp.int32)[:, None], lengths, zeros, zeros)
    draws, shape = np.random.default_rng(1), (rows + 1, c.num_kv_heads, 16, c.head_dim)
    cache = [tuple(draws.normal(size=shape).astype(jnp.bfloat16).astype(dtype) for _ in range(2)) for _ in c.layers]
    cache = jax.device_put(cache, sharding(mesh, PAGE_AXES))

    def run(cache):
        work = plan_work(
            at, page_size=16, kv_heads=c.num_kv_heads // devices, group=c.num_heads // c.num_kv_heads, head_dim=c.head_dim, dtype=dtype,
            implementation=implementation, interpret=jax.devices()[0].platform == "cpu",
        )  # fmt: skip
        context = PagedContext(at, (1 + jnp.arange(rows)) * 16 + 4, {"None": work}, mesh, linears)
        hidden_ND, cache = decoder(jnp.arange(rows), lengths - 1, cache, context)
        return decoder.logits(hidden_ND), cache

    return (jax.jit(run) if jax.devices()[0].platform == "cpu" else run)(cache)


@cache
def plain_step(name: str, rows: int):
    """What `step` gives through XLA's products."""
    return step(decoder_of(name), None, rows)


def decoder_mesh(devices: int = 1):
    return make_mesh(jax.devices()[:devices])


def shaken(decoder: Decoder) -> Decoder:
    """With norms that are not the identity."""
    for i, block in enumerate(decoder.blocks):
        for norm in (block.attn_in, block.mlp_in, block.attn.q_norm, block.attn.k_norm):
            if norm is not None:
                norm.weight[...] = (1 + jax.random.normal(jax.random.key(i), norm.weight.shape) / 4).astype(norm.weight.dtype)
    return decoder


def wide_tile(kind: str, rows: int, product: Product, cores: int, trial: bool) -> matmul_sm90.Tile:
    """Few blocks, because an interpreter runs them one after another."""
    return matmul_sm90.Tile(64, 64, 1 if product.gated else product.inputs // 64)


@pytest.mark.parametrize(
    ("name", "rows", "devices"),
    [("qwen2", 1, 1), ("qwen3", 1, 1), ("qwen2", 4, 1), ("qwen2", 3, 1), ("qwen2", 4, 2), ("qwen3", 3, 2), ("qwen2", 1, 2)],
)
def test_a_decoder_is_the_same_through_the_kernels(name, rows, devices, monkeypatch):
    """Logits and every page, to what bfloat16 rounds. Three rows: XLA's products, and so on two devices, because the interpreter of
    Hopper's kernels knows only one."""
    if rows in matmul_sm90.ROWS and devices == 1:
        monkeypatch.setattr(matmul, "many_rows_tile", wide_tile)
    parted = decoder_of(name, devices)
    if devices > 1:
        linears = ShardedLinears(ManyRows("cpu", 2, interpret=True), decoder_mesh(devices))
    else:
        linears = OneRow("cpu", interpret=True) if rows == 1 else ManyRows("cpu", 2, interpret=True)
    assert parted.usual
    plain, plain_cache = plain_step(name, rows)
    found, cache = step(parted, linears, rows, devices=devices)
    assert apart(found, plain) < 2e-2
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(plain_cache), strict=True):
        assert apart(ours, theirs) < 2e-2


@pytest.mark.parametrize(("rows", "devices"), [(1, 1), (3, 1), (3, 2)])
def test_a_norm_that_is_dropped_shows(rows, devices, monkeypatch):
    """The comparison above, with a planted mistake in each of the ways."""
    parted = decoder_of("qwen2", devices)
    linears = OneRow("cpu", interpret=True) if rows == 1 else ManyRows("cpu", 2, interpret=True)
    if devices > 1:
        linears = ShardedLinears(ManyRows("cpu", 2, interpret=True), decoder_mesh(devices))
    monkeypatch.setattr(type(linears), "finish", lambda self, stream, norm: stream.h_ND)
    assert apart(step(parted, linears, rows, devices=devices)[0], plain_step("qwen2", rows)[0]) > 0.1


@cache
def of_shape(model: str, layers: int, devices: int = 1) -> Decoder:
    config = read_config(SHAPES[model] | {"num_hidden_layers": layers, "vocab_size": 4096})
    return shaken(Decoder(RandomWeights(tensor_shapes(config), decoder_mesh(devices), "bfloat16", 3), config))


@cache
def mailboxes(size: int, devices: int) -> Mailboxes:
    return Mailboxes.make(decoder_mesh(devices), size)


def addresses(model: str, rows: int, devices: int):
    size = SHAPES[model]["hidden_size"]
    return mailboxes(size, devices).addresses_WV2 if join_devices.fits(rows, size, "bfloat16") else None


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("rows", [1, 2, 8, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize(("model", "layers"), [("qwen2.5-0.5b", 2), ("llama-3.1-8b", 2)])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_logits_are_no_worse_than_plain_products(model, layers, devices, rows):
    """Against float32, teacher-forced, on as many devices; and the likeliest token is the same wherever it leads by more than the error."""
    decoder = of_shape(model, layers)
    if devices > len(jax.devices()) or decoder.c.num_kv_heads % devices:
        pytest.skip(f"{decoder.c.num_kv_heads} KV heads over {devices} of {len(jax.devices())} GPUs")
    linears = linears_for(jax.devices()[0], rows, "bfloat16", alone=devices == 1)
    if linears is None:
        pytest.skip(f"{jax.devices()[0].device_kind} runs {rows} rows as plain products")
    if isinstance(linears, ManyRows):
        linears = replace(linears, trial=True)
        linears = linears if devices == 1 else ShardedLinears(linears, decoder_mesh(devices), addresses(model, rows, devices))
    (graph, state), (parted_graph, parted) = nnx.split(decoder), nnx.split(of_shape(model, layers, devices))

    def logits(graph, linears, **options):
        return jax.jit(lambda state: step(nnx.merge(graph, state), linears, rows, **options)[0])

    plain, run = logits(parted_graph, None, devices=devices)(parted), logits(parted_graph, linears, devices=devices)
    fused = np.asarray(run(parted))
    np.testing.assert_array_equal(fused, np.asarray(run(parted)), "not the same twice")
    with jax.default_matmul_precision("highest"):
        true = logits(graph, None, implementation="reference", dtype="float32")(jax.tree.map(lambda a: a.astype(jnp.float32), state))
    print(f"{model} rows {rows} on {devices}: plain {apart(plain, true):.5f}, fused {apart(fused, true):.5f}")
    assert apart(fused, true) < 1.05 * apart(plain, true)
    error = float(np.abs(fused - np.asarray(true)).max())
    top = jnp.sort(true, axis=-1)[:, -2:]
    sure = np.asarray(top[:, 1] - top[:, 0] > 2 * error)
    np.testing.assert_array_equal(fused.argmax(-1)[sure], np.asarray(true.argmax(-1))[sure])


@pytest.mark.parametrize(
    "unlike",
    [
        dict(architectures=["Gemma2ForCausalLM"], model_type="gemma2", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=64),
        dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="gelu"),
        dict(architectures=["LlamaForCausalLM"], model_type="llama", mlp_bias=True),
    ],
    ids=["norms behind", "a gate that kernels do not know", "biases"],
)
def test_unusual_blocks_run_as_plain_products(unlike):
    model = read_config(SIZES | COMMON | dict(head_dim=64) | unlike)
    assert Decoder(RandomWeights(tensor_shapes(model), decoder_mesh(), "bfloat16", 3), model).usual is False


def test_the_verbs_mean_the_same_in_both_ways(monkeypatch):
    """One stream through both: product, gate, sum."""
    monkeypatch.setattr(matmul, "many_rows_tile", wide_tile)
    h, norm = draw(1, 128), Norm(draw(128), 1e-6, 0.0)
    weight, gate, down = draw(64, 128, scale=0.1), draw(256, 128, scale=0.1), draw(128, 128, scale=0.1)
    ends = []
    for run in (OneRow("cpu", interpret=True), ManyRows("cpu", 2, interpret=True)):
        rows = 1 if isinstance(run, OneRow) else 2
        stream, normed = run.norm(Stream(jnp.tile(h, (rows, 1))), norm)
        product = run.product(normed, weight).sum(0)
        stream = run.add(stream, run.gated(normed, gate, SILU), down)
        ends.append((product[0], run.finish(stream, norm)[0]))
    for one, few in zip(*ends, strict=True):
        assert apart(one, few) < 2e-2
    assert math.isclose(float(jnp.mean(jnp.square(ends[0][1].astype(jnp.float32) / norm.weight_D.astype(jnp.float32)))), 1, rel_tol=0.05)
