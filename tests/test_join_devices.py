"""What stands between two products on several GPUs. Its kernel writes to addresses on other devices, which no interpreter has: what it
computes is tested on GPUs alone, beside the compiling ahead of time in test_aot.py."""

from collections import defaultdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import on_gpu
from engines import make_plan
from jax import lax
from test_matmul import COMMON, MODELS, SIZES, decoder_mesh

from converters.checkpoint import read_config, tensor_shapes
from jaxllm import step
from jaxllm.config import EngineConfig
from jaxllm.decoder import Decoder
from jaxllm.devices import machine
from jaxllm.parallel import on_each, sharding
from jaxllm.patch import Patch
from jaxllm.plan import Bucket
from jaxllm.request import ConfigError
from jaxllm.sharded import OWN, WHOLE, Mailboxes
from jaxllm.weights import WeightShapes
from pallas_kernels import ManyRows, join_devices

several = pytest.mark.skipif(not on_gpu() or len(jax.devices()) < 2, reason="no two NVIDIA GPUs here")


@pytest.mark.parametrize(
    ("rows", "size", "dtype", "fit"),
    [
        (64, 4096, "bfloat16", True), (256, 3584, "float16", True), (257, 4096, "bfloat16", False), (8, 896, "bfloat16", False),
        (8, 256, "bfloat16", False), (8, 4096, "float32", False), (128, 8192, "bfloat16", True), (256, 8192, "bfloat16", False),
        (8, 16384, "bfloat16", False),
    ],
)  # fmt: skip
def test_which_sums_mailboxes_are_for(rows, size, dtype, fit):
    assert join_devices.fits(rows, size, dtype) is fit
    if not fit:
        with pytest.raises(ValueError, match=rf"devices sum up to 256 rows .*, not {dtype}\({rows}, {size}\)"):
            join_devices.join(
                *(jnp.zeros(s, dtype) for s in ((rows, size), (1, rows, size), (size,))), jnp.zeros((3, 2), jnp.int32), eps=1.0
            )


@pytest.mark.parametrize("devices", [2, 4])
def test_every_device_is_told_all_addresses_and_its_own_number(devices):
    mail = Mailboxes.make(decoder_mesh(devices), 512)
    told = np.asarray(mail.addresses_WV2).view(np.uint32).astype(np.uint64)
    whole = told[..., 0] | told[..., 1] << 32
    own = {shard.device: shard.data.unsafe_buffer_pointer() for shard in mail.memory_WX.addressable_shards}
    assert whole.tolist() == [[*(own[d] for d in jax.devices()[:devices]), rank] for rank in range(devices)]
    assert not np.asarray(mail.memory_WX).any() and mail.addresses_WV2.sharding.shard_shape(told.shape) == (1, devices + 1, 2)


def test_a_machine_without_peers_has_no_mailboxes():
    assert not machine(jax.devices("cpu")[:2], EngineConfig(model="any", tensor_parallel_size=2)).peers


OTHERWISE: dict[str, dict[str, Any]] = {
    "another size": dict(model=dict(hidden_size=384, head_dim=96)),
    "a vocabulary that two do not divide": dict(model=dict(vocab_size=63)),
    "32 bits": dict(plan=dict(dtype="float32")),
    "fp8 pages": dict(plan=dict(kv_dtype="float8_e4m3fn")),
    "not allowed": dict(plan=dict(mailboxes=False)),
    "many rows alone": dict(plan=dict(buckets=(Bucket(0, 512),))),
    "another GPU": dict(linears=None),
    "the reference": dict(implementation="reference"),
    "a patch": dict(patch=Patch(lambda layer, site, value_D, data: value_D, {}, [(0, "resid_post")])),
}


@pytest.mark.parametrize("name", ["", *OTHERWISE])
def test_which_plans_have_mailboxes(name, monkeypatch):
    """Those whose steps use them: nobody else makes any, nor tries them at a start."""
    changed = OTHERWISE.get(name, {})
    sizes = dict(hidden_size=512, head_dim=128) | changed.get("model", {})
    model = read_config(SIZES | COMMON | MODELS["qwen2"] | sizes)
    plan = make_plan(**(dict(dtype="bfloat16", buckets=(Bucket(0, 8),), tensor_parallel_size=2, mailboxes=True) | changed.get("plan", {})))
    monkeypatch.setattr(step, "linears_for", lambda *args, **how: changed.get("linears", ManyRows("made up", 132)))
    decoder = Decoder(WeightShapes(tensor_shapes(model), decoder_mesh(2), plan.dtype), model)
    found = step.sums_by_mailboxes(decoder, plan, decoder_mesh(2), changed.get("implementation", "sm90"), changed.get("patch"))
    assert found is (not name)


@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_devices_that_lose_what_is_written_are_found_out(lost, monkeypatch):
    """Before any step runs: here by sums of XLA's, of which the last device loses a number."""

    def join(h, parts, norm, addresses, *, eps):
        here = (lax.axis_index("tp") == 1) & (jnp.arange(h.size) == 7)
        return h + lax.psum(parts[0], "tp") - jnp.where(here, lost, 0.0).reshape(h.shape).astype(h.dtype), h

    monkeypatch.setattr(join_devices, "join", join)
    mesh, mail = decoder_mesh(2), Mailboxes.make(decoder_mesh(2), 512)
    if lost:
        with pytest.raises(ConfigError, match="2 GPUs that should write into each other's memory do not find there what they wrote; start"):
            mail.check(mesh, 512, "bfloat16")
    else:
        mail.check(mesh, 512, "bfloat16")


class Devices:
    """What the kernel does with mailboxes, a step of one block at a time: blocks of a kernel in any order, kernels of a device one after
    another, devices in any order."""

    def __init__(self, devices: int, calls: list[int], places: int):
        self.calls, self.places = calls, places
        self.seen = [defaultdict(int) for _ in range(devices)]  # by row and device: the time that it has come to
        self.read = [defaultdict(int) for _ in range(devices)]
        self.numbers = [{} for _ in range(devices)]  # by place, device and row

    def block(self, rank: int, call: int, row: int):
        time, devices = self.read[rank][row] + 1, range(len(self.seen))
        for device in devices:
            self.numbers[device][time % self.places, rank, row] = (call, rank)
            yield True
        for device in devices:
            self.seen[device][row, rank] = time
            yield True
        while any(self.seen[rank][row, device] < time for device in devices):
            yield False
        for device in devices:
            assert self.numbers[rank][time % self.places, device, row] == (call, device), "another call's number"
            yield True
        self.read[rank][row] = time

    def run(self, random: np.random.Generator) -> None:
        """Every device's calls, of some rows each. Raises AssertionError if a number is read that is not the one that was meant."""
        due = [list(enumerate(self.calls)) for _ in self.seen]
        blocks: list[list] = [[] for _ in self.seen]
        while any(due) or any(blocks):
            rank = int(random.choice([r for r in range(len(due)) if due[r] or blocks[r]]))
            if not blocks[rank]:
                call, rows = due[rank].pop(0)
                blocks[rank] = [self.block(rank, call, row) for row in range(rows)]
            for _ in range(random.integers(1, 30)):  # one device may be far ahead of another
                if blocks[rank] and next(block := blocks[rank][random.integers(len(blocks[rank]))], None) is None:
                    blocks[rank].remove(block)


@pytest.mark.parametrize(("devices", "places"), [(2, 2), (3, 2), (2, 1)])
def test_two_places_are_enough_and_one_is_not(devices, places):
    """Whatever order blocks and devices run in, and however many rows a call has."""
    failed = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        try:
            Devices(devices, random.integers(1, 4, 8).tolist(), places).run(random)
        except AssertionError:
            failed += 1
    assert (failed > 0) is (places == 1), f"{failed} of 200 orders"


def drawn(rows: int, size: int, parts: int, devices: int, seed: int):
    """The stream, all devices' parts one after the other, the norm."""
    key, dtype = jax.random.split(jax.random.key(seed), 3), jnp.bfloat16 if parts == 1 else jnp.float32
    h, norm = jax.random.normal(key[0], (rows, size), jnp.bfloat16), jax.random.normal(key[1], (size,), jnp.bfloat16)
    return h, jax.random.normal(key[2], (devices * parts, rows, size), dtype), norm


def check(found, h, parts, norm, devices: int) -> None:
    """Against float64, but for the roundings that the kernel says it makes."""
    own = np.asarray(parts, np.float64).reshape(devices, -1, *h.shape).sum(1)
    sent = np.asarray(jnp.asarray(own, jnp.float32).astype(h.dtype), np.float64)
    total = np.asarray(jnp.asarray(np.asarray(h, np.float64) + sent.sum(0), jnp.float32).astype(h.dtype), np.float64)
    normed = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * (np.asarray(norm, np.float64) + 0.5)
    summed, found = (np.asarray(x, np.float64) for x in found)
    assert np.abs(summed - total).max() <= 2**-7 * np.abs(total).max() and np.mean(summed != total) < 1e-3
    assert np.linalg.norm(found - normed) < 4e-3 * np.linalg.norm(normed)


LAST = np.iinfo(np.int32).max  # after which times begin with the smallest number
SHAPES = [(4096, 1), (4096, 2), (8192, 3), (3584, 2), (512, 1)]  # of the model, and parts
JOIN = partial(join_devices.join, eps=1e-5, offset=0.5)


def time(count: int) -> int:
    return (count + 2**31) % 2**32 - 2**31


def lines(memory: np.ndarray) -> np.ndarray:
    """What a mailbox says of each row."""
    return memory[: join_devices.ROWS * join_devices.LINE // 4].reshape(join_devices.ROWS, -1)


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize(("size", "parts"), SHAPES)
def test_one_device_plays_two(size, parts):
    """The second one is made to believe that the first has come, and writes into both mailboxes; then the first one finds it there."""
    first = np.zeros(join_devices.words(size, 2), np.int32)
    lines(first)[:] = LAST - 3
    first = jax.device_put(first)
    for turn in range(5):
        second, (h, parts_PND, norm) = np.zeros(first.shape, np.int32), drawn(64, size, parts, 2, turn)
        lines(second)[:] = time(LAST - 3 + turn)
        lines(second)[:, 0] = time(LAST - 2 + turn)
        second = jax.device_put(second)
        told = join_devices.told([mailbox.unsafe_buffer_pointer() for mailbox in (first, second)])
        jax.block_until_ready(JOIN(h, parts_PND[parts:], norm, told[1]))
        check(JOIN(h, parts_PND[:parts], norm, told[0]), h, parts_PND, norm, 2)


@pytest.mark.gpu
@several
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize(("size", "parts"), SHAPES)
def test_devices_sum_and_norm_alike(size, parts, devices):
    """Whatever rows came before, also when the count of times passes the largest number there is, all devices have the same bits."""
    if devices > len(jax.devices()):
        pytest.skip(f"{len(jax.devices())} GPUs")
    mesh, memory = decoder_mesh(devices), np.zeros((devices, join_devices.words(size, devices)), np.int32)
    for each in memory:
        lines(each)[:] = LAST - 3
    memory = jax.device_put(memory, sharding(mesh, ("devices",)))
    told = jax.device_put(join_devices.addresses(memory), sharding(mesh, ("devices",)))

    def local(h, parts, norm, told):
        return *JOIN(h, parts, norm, told[0]), lax.psum(h[:1, 0], "tp")  # by which XLA has all devices load the kernel before one waits

    run = jax.jit(on_each(mesh, local, (WHOLE, OWN, WHOLE, OWN), OWN))
    many = min(join_devices.ROWS, join_devices.MOST // size)
    for seed, rows in enumerate([64, 1, many, 64, 64, 8, 64, many, 1]):
        args = drawn(rows, size, parts, devices, seed)
        summed, normed = (np.asarray(x, np.float64).reshape(devices, rows, size) for x in run(*args, told)[:2])
        assert (summed == summed[0]).all() and (normed == normed[0]).all()
        check((summed[0], normed[0]), *args, devices)
