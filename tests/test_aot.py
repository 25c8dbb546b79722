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

import pytest

HERE = Path(__file__).parent
WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-runtime")
JOBS = {
    "a100": ["portable:mixed", "portable:head_dim_256", "portable:fp8_page_16", "step:portable", "row:portable", "again:portable"],
    "l4": ["portable:mixed", "portable:head_dim_256", "portable:fp8"],
    "h200": [
        *("sm90:prefill", "sm90:mixed", "portable:sinks", "portable:fp8", "portable:decode_page_16", "portable:head_dim_8"),
        *("sm90:prefill_group_1", "sm90:prefill_group_3"),
        *("step:sm90", "step:sm90:bfloat16:256", "step:portable:float8_e4m3fn", "row:portable", "again:portable", "kept:portable", "spill"),
    ],
    "b200": ["portable:mixed"],
}
KERNELS = [(target, job) for target, jobs in JOBS.items() for job in jobs if job.startswith(("portable", "sm90"))]
# Bytes stored and loaded: what the prefill keeps of its tile's numbers, and of the next one's, outside its loops.
SPILLED = {"sm90:mixed": (16, 52), "sm90:prefill_group_1": (84, 124), "sm90:prefill_group_3": (16, 52)}
STEPS = [(target, job) for target, jobs in JOBS.items() for job in jobs if job.startswith(("step", "row", "again"))]
LAYER = {("a100", "row:portable"): 6, ("h200", "row:portable"): 6}  # kernels


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
    flags = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "XLA_FLAGS": "", "PYTHONPATH": str(HERE.parent)}
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
    """No spilled register but those known to be outside the loops, and no more shared memory than a block may have."""
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
    assert spilled or not job.startswith("sm90"), "Mosaic's assembler said nothing"


def test_a_kernel_that_spills_is_caught():
    assert "register spilling" in compiled("h200")["spill"]["error"]


@pytest.mark.parametrize(("target", "job"), STEPS)
def test_a_step_never_copies_its_cache(target, job):
    """Only parameters and the results of kernels that write in place have the shape of a layer's pages."""
    found = result(target, job)
    assert set(found["makers"]) <= {"parameter", "get-tuple-element", "bitcast"}
    assert found["aliased"] >= found["cache"]
    assert found["temp"] < found["pages"] * 2


def test_a_cache_that_is_copied_is_caught():
    found = result("h200", "kept:portable")
    assert "copy" in found["makers"] and found["aliased"] < found["cache"]


@pytest.mark.parametrize(("target", "job"), STEPS)
def test_a_step_is_one_cuda_graph(target, job):
    thunks = result(target, job)["thunks"].splitlines()
    outside = [line for line in thunks if line and not line.startswith(" ")]
    assert len(outside) == 1 and "kCommandBuffer" in outside[0], outside
    assert sum("decode" in line for line in thunks) >= 2


@pytest.mark.parametrize(("target", "job"), LAYER)
def test_a_decode_layer_is_few_kernels(target, job):
    """From one layer's attention to the next one's."""
    thunks = [line for line in result(target, job)["thunks"].splitlines() if "kCustomKernel" in line or "kCustomCall" in line]
    first, second = (place for place, line in enumerate(thunks) if "paged_decode" in line)
    assert second - first == LAYER[target, job]
