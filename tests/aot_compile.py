"""Compiles for a GPU that is not there, as a program: one process an architecture, because Mosaic's passes are set up once.

    JAX_PLATFORMS=cpu python tests/aot_compile.py h200 JOB...

It prints a JSON object: for each job its error, or what the compiler made of it. Jobs are an implementation's named case ("sm90:prefill"),
a product of a decode step by its rows, features and inputs ("linear:256:4864:896:gated"), a sum over devices by their number, its size and
its parts ("join:4:8192:2"), a whole step with an implementation, a dtype of
pages and chunk lanes ("step:sm90:bfloat16:256"; without lanes it only decodes), one of a row ("row:portable"), one that is repeated
("again:portable"), a step of the 8B's shape by its devices, rows and chunk lanes ("8b:2:64:0"), of devices that do not reach each other
("8b:2:64:0:alone"), and two planted mistakes: "kept:portable", a step that may not write where its cache lies, and "spill", a kernel with
too many numbers for its registers. `ptxas`: what Mosaic's assembler says of registers and spills; XLA's is told to fail if there are any.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from attention_oracle import attend, draw
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from bench.workloads import SHAPES
from converters.checkpoint import read_config, tensor_shapes
from jaxllm.batch import packed_size
from jaxllm.cache import cache_shapes
from jaxllm.decoder import Decoder
from jaxllm.lowering import Recipe
from jaxllm.parallel import make_mesh
from jaxllm.plan import Bucket, Plan
from jaxllm.programs import OPTIONS, step_options
from jaxllm.sample import FLOATS, INTS
from jaxllm.step import Ports, model_step, ours
from pallas_kernels import blocks, join_devices, matmul_sm90, matmul_sm90_wide
from pallas_kernels.matmul import Product, many_rows_tile
from pallas_kernels.shapes import CORRECT

TARGETS = Path(__file__).parent / "targets"
Shape = jax.ShapeDtypeStruct


class Target:
    """A described device: what is traced under `compile` is compiled for it."""

    def __init__(self, name: str):
        self.text = (TARGETS / f"{name}.txtpb").read_text()
        self.kind = re.search(r'name: "(.+)"', self.text)[1]  # pyright: ignore[reportOptionalSubscript]
        self.mesh = topologies.make_mesh(topo=self.described(1), mesh_shape=(1,), axis_names=("tp",))

    def described(self, devices: int):
        """So many of them, in one machine."""
        return topologies.get_topology_desc(platform="cuda", target_config=self.text, topology=f"1x1x{devices}")

    def compile(self, f: Callable, *args: Any, options: dict[str, Any] | None = None, **jit: Any):
        """The executable of `f` for `args`, and the text of its thunks: what is launched, with its shared memory."""
        here = NamedSharding(self.mesh, PartitionSpec())
        shaped = jax.tree.map(lambda a: Shape(a.shape, a.dtype, sharding=here), args)
        device = AbstractDevice(device_kind=self.kind, num_cores=None, platform="gpu")  # what Pallas-Triton asks for as it lowers
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return dumped(lambda checks: jax.jit(f, compiler_options=checks | (options or {}), **jit).trace(*shaped).lower().compile())


def dumped(compile: Callable[[dict[str, Any]], Any]) -> tuple[Any, str]:
    """What `compile` makes with the options it is given, and the text of its thunks."""
    with tempfile.TemporaryDirectory() as folder:
        made = compile({"xla_gpu_fail_ptx_compilation_on_register_spilling": True, "xla_dump_to": folder})
        *_, thunks = sorted(Path(folder).glob("*thunk_sequence*.txt"))  # after all passes; of a lone kernel there is only the one before
        return made, thunks.read_text()


def case(target: Target, name: str, implementation: str) -> dict[str, Any]:
    """One call of the op."""
    inputs = jax.eval_shape(partial(draw_abstract, name))
    run = partial(attend, case=CORRECT[name], implementation=implementation, lse=CORRECT[name].sinks)
    _, thunks = target.compile(run, inputs)
    return {"thunks": thunks}


def draw_abstract(name: str):
    return jax.tree.map(jnp.asarray, draw(CORRECT[name]))


class AbstractWeights:
    """A source of tensors that have shapes and no values."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], mesh: Mesh):
        self.shapes, self.mesh = shapes, mesh

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def __call__(self, name: str, shape: tuple[int, ...], axes) -> Any:
        return Shape(shape, jnp.bfloat16)

    def fused(self, names, shapes, axes) -> Any:
        return Shape((sum(shape[0] for shape in shapes), *shapes[0][1:]), jnp.bfloat16)


def step(
    target: Target, implementation: str, kv_dtype: str | None = None, chunk: int = 0, donate: bool = True, rows: int = 64, steps: int = 1
) -> dict[str, Any]:
    """A whole step, as the engine runs it: two layers of Qwen2.5-0.5B's shape."""
    model = read_config(SHAPES["qwen2.5-0.5b"] | {"num_hidden_layers": 2, "vocab_size": 1024})
    here = Mesh(np.array(jax.devices()[:1]), ("tp",))
    weights: Any = AbstractWeights(tensor_shapes(model), here)
    decoder = Decoder(weights, model)
    graph, state = nnx.split(decoder)
    leaves, tree = jax.tree.flatten(state)
    bucket = Bucket(chunk, rows)
    plan = Plan("bfloat16", 1024, 64, 2048, 64, (bucket,), Bucket(256, 1, True), False, 20, 1, decode_steps=steps, kv_dtype=kv_dtype)
    cache = cache_shapes(plan, model, here)
    ints = partial(Shape, dtype=jnp.int32)

    def run(leaves, *arrays):
        decoder = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        return model_step(decoder, plan, target.mesh, implementation, bucket, *arrays)

    ports = Ports.shapes(bucket.rows, model, plan)
    sampling = Shape((65, FLOATS), dtype=jnp.float32), ints((65, INTS))
    args = tuple(leaves), cache, ints((65,)), ints((65, plan.max_pages)), *sampling, ints((packed_size(bucket),)), ports
    options = step_options(bucket, plan, target.mesh.devices.item(0), ours(decoder, plan, target.mesh, implementation, bucket))
    compiled, thunks = target.compile(run, *args, options=options, donate_argnums=(1, 2, 3, 7) if donate else (), keep_unused=True)
    memory: Any = compiled.memory_analysis()
    pages = cache[0][0]
    makers = re.findall(rf"= \w+\[{','.join(map(str, pages.shape))}\]\S* ([\w-]+)\(", str(compiled.as_text()))
    page_bytes = int(np.prod(pages.shape)) * pages.dtype.itemsize
    return {
        "thunks": thunks,
        "temp": memory.temp_size_in_bytes,
        "pages": page_bytes,
        "aliased": memory.alias_size_in_bytes,
        "cache": 2 * len(cache) * page_bytes,
        "makers": sorted(set(makers)),
    }


def of_8b(target: Target, devices: int, rows: int, chunk: int, mailboxes: bool) -> dict[str, Any]:
    """A step as the engine compiles it: two layers of the 8B's shape, over so many devices."""
    model = read_config(SHAPES["llama-3.1-8b"] | {"num_hidden_layers": 2}).for_context(1024)
    bucket, mesh = Bucket(chunk, rows), make_mesh(target.described(devices).devices)
    plan = Plan("bfloat16", 1024, 64, 2048, rows, (bucket,), Bucket(256, 1, True), False, 20, devices, mailboxes=mailboxes)
    with jax.default_device(mesh.devices.item(0)):  # which kernels ask for
        [program] = [p for p in Recipe(model, plan, mesh, "sm90").programs() if (p.kind, p.key) == ("step", bucket)]
        compiled, thunks = dumped(lambda checks: program.lower(OPTIONS | checks).compile())
    gathered = re.findall(r"(\w+\[[\d,]*\])(?:\{[\d,]*\})?\)? all-gather(?:-start)?\(", str(compiled.as_text()))
    return {"thunks": thunks, "temp": compiled.memory_analysis().temp_size_in_bytes, "gathered": gathered}


def linear(target: Target, rows: int, features: int, inputs: int, gated: bool) -> dict[str, Any]:
    """One product, by the tile that the device's table has for it."""
    x, weight = Shape((rows, inputs), jnp.bfloat16), Shape((features * (1 + gated), inputs), jnp.bfloat16)
    act = jax.nn.silu if gated else None
    tile = many_rows_tile(target.kind, rows, Product(features, inputs, gated), cores=132, trial=True)
    if isinstance(tile, matmul_sm90_wide.Tile):
        wide = partial(matmul_sm90_wide.linear, tile=tile, workers=132, act=act)
        return {"thunks": target.compile(wide, x, weight, Shape((3,), jnp.int32))[1]}
    assert tile is not None
    return {"thunks": target.compile(partial(matmul_sm90.linear, tile=tile, act=act), x, weight)[1]}


def sum_over(target: Target, devices: int, size: int, parts: int) -> dict[str, Any]:
    """One device's part in it; the text of its thunks."""
    h, norm = Shape((64, size), jnp.bfloat16), Shape((size,), jnp.bfloat16)
    args = h, Shape((parts, *h.shape), jnp.float32), norm, Shape((devices + 1, 2), jnp.int32)
    return {"thunks": target.compile(partial(join_devices.join, eps=1e-5), *args)[1]}


def spill(target: Target) -> dict[str, Any]:
    """A tile of far too many lines for its one warp."""
    with patch.object(blocks, "default_prefill", lambda head_dim, dtype: blocks.Prefill(128, 64, 1, 2)):
        return case(target, "mixed", "portable")


def job(target: Target, name: str) -> dict[str, Any]:
    kind, _, rest = name.partition(":")
    try:
        if kind == "spill":
            return spill(target)
        if kind == "kept":
            return step(target, rest, donate=False)
        if kind == "linear":
            rows, features, inputs, *gated = rest.split(":")
            return linear(target, int(rows), int(features), int(inputs), bool(gated))
        if kind == "join":
            return sum_over(target, *map(int, rest.split(":")))
        if kind == "row":
            return step(target, rest, rows=1)
        if kind == "again":
            return step(target, rest, steps=4)
        if kind == "8b":
            devices, rows, chunk, *alone = rest.split(":")
            return of_8b(target, int(devices), int(rows), int(chunk), int(devices) > 1 and not alone)
        if kind == "step":
            implementation, kv_dtype, chunk = (*rest.split(":"), "", "")[:3]
            return step(target, implementation, kv_dtype or None, int(chunk or 0))
        return case(target, rest, kind)
    except Exception as error:  # whatever the compiler says is the result
        return {"error": f"{type(error).__name__}: {error}"}


def local_in_loops(sass: str) -> list[int]:
    """Of each innermost loop with HGMMA in it, the loads and stores of local memory. What waits for a barrier jumps back without a
    condition, from far behind, and is no loop."""
    lines, labels, loops = sass.splitlines(), {}, []
    for place, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = place
        jump = re.search(r"@!?U?P\d+ BRA (?:\w+, )?`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels and any("HGMMA" in inside for inside in lines[labels[jump[1]] : place]):
            loops.append((labels[jump[1]], place))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines[start:end]) for start, end in inner]


def main(name: str, *jobs: str) -> None:
    target = Target(name)
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as said:  # Mosaic's assembler writes to the process's own stdout
        os.dup2(said.fileno(), 1)
        found = {}
        for each in jobs:
            before = said.tell()
            found[each] = job(target, each)
            said.seek(before)
            text = said.read().decode(errors="replace")
            found[each]["ptxas"] = re.findall(r"^.*(?:spill|Used \d+ registers).*$", text, re.M)
            found[each]["loops"] = local_in_loops(text)
        os.dup2(kept, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
