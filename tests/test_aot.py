"""Kernels and whole steps, compiled to machine code for GPUs that are not there.

Needs the CUDA compilers' wheels (`pip install -e '.[aot]'`) and no GPU. `aot_compile.py` does the work, in one process a target.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import pytest
from aot_compile import local_in_loops
from jax.experimental import topologies

from bench.workloads import SHAPES
from converters.checkpoint import read_config
from jaxllm import lowering
from jaxllm.parallel import make_mesh
from jaxllm.plan import Bucket, Plan

HERE = Path(__file__).parent
WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm", "nvidia-nvvm", "nvidia-cuda-runtime")
JOBS = {
    "a100": ["portable:mixed", "portable:head_dim_256", "portable:fp8_page_16", "step:portable", "row:portable", "again:portable"],
    "l4": ["portable:mixed", "portable:head_dim_256", "portable:fp8"],
    "h200": [
        *("sm90:prefill", "sm90:mixed", "portable:sinks", "portable:fp8", "portable:decode_page_16", "portable:head_dim_8"),
        *("sm90:prefill_group_1", "sm90:prefill_group_3"),
        *("linear:8:14336:4096:gated", "linear:64:4096:14336", "linear:256:14336:4096:gated", "linear:256:2560:2048"),
        *("join:4:8192:2", "join:8:3584:1"),
        *("linear:9216:14336:4096:gated", "linear:9000:4096:14336"),
        *("linear:1024:1152:896", "linear:1024:896:4864", "linear:1024:2560:2048", "linear:1024:11008:2048:gated"),
        *("step:sm90", "step:sm90:bfloat16:256", "step:portable:float8_e4m3fn", "row:portable", "again:portable", "kept:portable", "spill"),
        *("8b:2:64:0", "8b:2:64:0:alone", "8b:4:64:0", "8b:2:64:448", "8b:2:1:0", "8b:1:1:448", "8b:1:64:2048", "8b:1:1024:0"),
    ],
    "b200": ["portable:mixed"],
}
KERNELS = [(target, job) for target, jobs in JOBS.items() for job in jobs if job.startswith(("portable", "sm90"))]
# Bytes stored and loaded once a tile, outside the loops over KV blocks: with a window there are three of them to keep numbers for.
SPILLED = {"sm90:prefill_group_1": (44, 52)}
STEPS = [(target, job) for target, jobs in JOBS.items() for job in jobs if job.startswith(("step", "row", "again"))]
SHARDED = [("h200", job) for job in JOBS["h200"] if job.startswith(("8b:2", "8b:4"))]
WORKSPACE = 2**25  # that cuBLAS gets for a step's products
LAYER = {("a100", "row:portable"): 5, ("h200", "row:portable"): 5}  # kernels


def missing() -> list[str]:
    """The wheels that are not installed."""

    def absent(name: str) -> bool:
        try:
            return not version(name)
        except PackageNotFoundError:
            return True

    return [name for name in WHEELS if absent(name)]


pytestmark = pytest.mark.skipif(bool(missing()), reason=f"compiling for a GPU needs the extra `aot`; not installed: {', '.join(missing())}")


@cache
def compiled(target: str) -> dict[str, dict]:
    """What came of the target's jobs."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(HERE.parent)}
    flags |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "aot_compile.py"), target, *JOBS[target]]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def result(target: str, job: str) -> dict:
    found = compiled(target)[job]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize(("target", "job"), KERNELS)
def test_a_kernel_fits_its_device(target, job):
    """No spilled register but a known few outside the loops, and no more shared memory than a block may have."""
    found = result(target, job)
    limit = int(re.search(r"shared_memory_per_block_optin: (\d+)", (HERE / "targets" / f"{target}.txtpb").read_text())[1])  # pyright: ignore[reportOptionalSubscript]
    shared = [int(size) for size in re.findall(r"shared_memory: (\d+) bytes", found["thunks"])]
    assert max(shared) <= limit
    spilled = [line for line in found["ptxas"] if "spill" in line]
    if job in SPILLED:
        for what, most in zip(("stores", "loads"), SPILLED[job], strict=True):
            assert max(int(size) for line in spilled for size in re.findall(rf"(\d+) bytes spill {what}", line)) <= most
    else:
        assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spilled)
    if job.startswith("sm90"):
        assert spilled, "Mosaic's assembler said nothing"
        assert len(found["loops"]) >= 2 and not any(found["loops"]), "loops over KV blocks, and how often they touch local memory"


@pytest.mark.parametrize("job", [job for job in JOBS["h200"] if job.startswith("linear")])
def test_a_product_keeps_its_sums_in_registers(job):
    found = result("h200", job)
    spilled = [line for line in found["ptxas"] if "spill" in line]
    assert spilled, "Mosaic's assembler said nothing"
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spilled)
    assert found["loops"] and not any(found["loops"]), "the loops over turns, and how often they touch local memory"


LOOP = """
.L_x_1:
  LDL R2, [R1] ;
.L_x_2:
  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], R24 ;
.L_x_3:
  {} R3, [R1+0x4] ;
  @P2 BRA `(.L_x_2) ;
  @!P3 BRA P1, `(.L_x_1) ;
  BRA `(.L_x_3) ;
"""


@pytest.mark.parametrize(("instruction", "times"), [("LDL.LU", 1), ("STL", 1), ("LDS", 0)])
def test_a_spill_inside_a_loop_is_caught(instruction, times):
    assert local_in_loops(LOOP.format(instruction)) == [times]


def test_a_kernel_that_spills_is_caught():
    assert "register spilling" in compiled("h200")["spill"]["error"]


@pytest.mark.parametrize(("target", "job"), STEPS)
def test_a_step_never_copies_its_cache(target, job):
    """Only parameters and the results of kernels that write in place have the shape of a layer's pages."""
    found = result(target, job)
    assert set(found["makers"]) <= {"parameter", "get-tuple-element", "bitcast"}
    assert found["aliased"] >= found["cache"]
    workspace = WORKSPACE if "kCublasLtMatmul" in found["thunks"] else 0
    assert found["temp"] - workspace < found["pages"] * 2


def test_one_row_s_head_is_not_written_out_in_float32():
    """As XLA would without Triton, for the next token of a prompt alone: two gigabytes of the 8B's."""
    assert result("h200", "8b:1:1:448")["temp"] < 2**28


def test_a_cache_that_is_copied_is_caught():
    found = result("h200", "kept:portable")
    assert "copy" in found["makers"] and found["aliased"] < found["cache"]


@pytest.mark.parametrize(("target", "job"), SHARDED)
def test_devices_gather_logits_and_no_weights(target, job):
    rows = job.split(":")[2]
    assert result(target, job)["gathered"] in ([f"f32[{rows},128256]"], ["f32[128256]"])


def test_a_sum_over_devices_spills_nothing():
    assert _spilled("join:4:8192:2") == _spilled("join:8:3584:1") == []


@pytest.mark.parametrize(("job", "sums"), [("8b:2:64:0", 1), ("8b:4:64:0", 1), ("8b:2:1:0", 1), ("8b:2:64:0:alone", 5)])
def test_devices_that_reach_each_other_sum_as_they_norm(job, sums):
    """Of two layers, each of which adds twice to the stream, nothing is left for XLA to sum but the embeddings."""
    assert sum("kAllReduce" in line for line in result("h200", job)["thunks"].splitlines()) == sums
    assert _spilled(job) == []


def test_a_prompt_s_products_leave_padding_out():
    """All four of a layer are kernels of ours, of which two layers have one prefill each; the head of few rows is cuBLAS's."""
    thunks = result("h200", "8b:1:64:2048")["thunks"].splitlines()
    assert [sum(kind in line for line in thunks) for kind in ("kCustomCall", "kCublasLtMatmul")] == [2 * (4 + 1), 1]
    assert _spilled("8b:1:64:2048") == []


def test_many_rows_products_leave_padding_out():
    """All four of a layer, and the head, are kernels of ours."""
    thunks = result("h200", "8b:1:1024:0")["thunks"].splitlines()
    assert [sum(kind in line for line in thunks) for kind in ("kCustomCall", "kCublasLtMatmul")] == [2 * 4 + 1, 0]
    assert _spilled("8b:1:1024:0") == []


def _spilled(job: str) -> list[str]:
    """What Mosaic's assembler says of kernels that spill."""
    said = [line for line in result("h200", job)["ptxas"] if "spill" in line]
    assert said, "it said nothing"
    return [line for line in said if "0 bytes spill stores, 0 bytes spill loads" not in line]


@pytest.mark.parametrize(("target", "job"), [*STEPS, *(each for each in SHARDED if each[1].endswith(":0"))])
def test_a_step_is_one_cuda_graph(target, job):
    thunks = result(target, job)["thunks"].splitlines()
    outside = [line for line in thunks if re.match(r"\d", line)]  # a loop's condition has a headline there too
    assert len(outside) == 1 and "kCommandBuffer" in outside[0], outside
    assert sum("decode" in line for line in thunks) >= 2


@pytest.mark.parametrize(("target", "job"), LAYER)
def test_a_decode_layer_is_few_kernels(target, job):
    """From one layer's attention to the next one's."""
    thunks = [line for line in result(target, job)["thunks"].splitlines() if "kCustomKernel" in line or "kCustomCall" in line]
    first, second = (place for place, line in enumerate(thunks) if "paged_decode" in line)
    assert second - first == LAYER[target, job]


def test_a_process_without_the_gpu_lowers_for_it():
    """The step's kernels are in its text: those that are made for one capability, and with sizes measured on one kind of device."""
    jax.devices()  # without a backend there is nothing to describe a device with
    text = (HERE / "targets" / "h200.txtpb").read_text()
    described = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    model = read_config(SHAPES["qwen2.5-0.5b"] | {"num_hidden_layers": 2, "vocab_size": 1024}).for_context(1024)
    plan = Plan("bfloat16", 1024, 64, 2048, 64, (Bucket(0, 64),), Bucket(256, 1, True), False, 20, 1)
    with lowering._start() as helper:
        assert lowering._ask(helper, lowering.Recipe(model, plan, make_mesh(described.devices), "sm90").described()) == "ready"
        answer = lowering._ask(helper, "step of 64 rows and 0 prompt tokens")
        helper.kill()
    assert isinstance(answer, lowering.Answer), answer
    assert b"mosaic_gpu_v2" in answer.stablehlo and b"__gpu$xla.gpu.triton" in answer.stablehlo
