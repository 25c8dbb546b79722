"""Which devices a server takes, decided before JAX's backend starts, because it claims memory on every device it can see."""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import EngineConfig
from jaxllm.plan import Machine
from jaxllm.request import ConfigError


def choose_devices(config: EngineConfig) -> list[Any]:
    """The first `tensor_parallel_size` devices. CUDA_VISIBLE_DEVICES says which GPUs there are to choose from.

    If JAX's backend has started already (somebody used JAX in this process before), what it sees is what there is.
    """
    count = config.tensor_parallel_size
    if count < 1:
        raise ConfigError(f"--tensor-parallel-size must be at least 1, but it is {count}")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise ConfigError(f"--gpu-memory-utilization must be above 0 and at most 1, but it is {config.gpu_memory_utilization}")
    if not _started():
        # The pool that JAX takes at start is the fraction that was asked for: weights, cache and step live in it.
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(config.gpu_memory_utilization)
        set_flags()
        # Numbers among the devices that CUDA_VISIBLE_DEVICES leaves.
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, range(count))))
        if config.device != "auto":
            jax.config.update("jax_platforms", config.device)
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise ConfigError(f"no {config.device} device can be used: {str(error).splitlines()[0]}") from error
    if config.device == "cpu" and devices[0].platform != "cpu":
        devices = jax.devices("cpu")
    if config.device == "cuda" and devices[0].platform != "gpu":
        raise ConfigError("--device cuda wants an NVIDIA GPU, but JAX sees none; install the cuda13 or cuda12 extra, or leave --device out")
    if len(devices) < count:
        raise ConfigError(
            f"--tensor-parallel-size {count} wants as many devices, but there are {len(devices)}; "
            "lower it, or show more (CUDA_VISIBLE_DEVICES)"
        )
    return devices[:count]


def set_flags() -> None:
    """What XLA must be told before the backend starts; nothing afterwards.

    Temporaries keep their addresses from step to step, so that a step's CUDA graph is launched as it is: updating its nodes cost
    0.84 ms of a 1.05 ms step (0.5B, H200).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not _started() and "xla_gpu_command_buffer_update_mode" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_command_buffer_update_mode=SKIP_TEMP".strip()


def machine(devices: Sequence[Any], config: EngineConfig) -> Machine:
    """What `plan` needs to know about the chosen devices."""
    first = devices[0]
    memory = int(_total_memory(first.local_hardware_id) * config.gpu_memory_utilization) if first.platform == "gpu" else None
    peers = first.platform == "gpu" and all(_reaches(a.local_hardware_id, b.local_hardware_id) for a, b in permutations(devices, 2))
    return Machine(first.platform, first.device_kind, len(devices), memory, peers)


def _total_memory(ordinal: int) -> int:
    """Bytes of the GPU with this number among the visible ones, from the driver: JAX's allocator of mapped memory keeps no such figure."""
    size = ctypes.c_size_t()
    if status := _driver().cuDeviceTotalMem_v2(ctypes.byref(size), _gpu(ordinal)):
        raise ConfigError(f"the NVIDIA driver does not tell the memory of GPU {ordinal}: error {status}")
    return size.value


def _reaches(ordinal: int, other: int) -> bool:
    """May a kernel on one GPU write into the memory of the other?"""
    answer = ctypes.c_int()
    return not _driver().cuDeviceCanAccessPeer(ctypes.byref(answer), _gpu(ordinal), _gpu(other)) and bool(answer.value)


def _gpu(ordinal: int) -> ctypes.c_int:
    device = ctypes.c_int()
    if status := _driver().cuDeviceGet(ctypes.byref(device), ordinal):
        raise ConfigError(f"the NVIDIA driver knows no GPU {ordinal}: error {status}")
    return device


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    if status := driver.cuInit(0):
        raise ConfigError(f"the NVIDIA driver does not start: error {status}")
    return driver


def cache_folder() -> Path | None:
    """Where compiled steps are kept. None if JAX was told to keep what it compiles: what it has read back cannot be written again."""
    if jax.config.jax_compilation_cache_dir is not None:
        return None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm"


def _started() -> bool:
    from jax._src import xla_bridge  # there is no public way to ask

    return xla_bridge.backends_are_initialized()
