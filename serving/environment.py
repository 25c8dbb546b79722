"""`jaxllm collect-env`: what a bug report should say of a machine, as text to paste. Loads no JAX, which would take the GPUs' memory."""

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("jaxllm", "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "tokenizers", "safetensors", "orbax-checkpoint")
PACKAGES += ("fastapi", "starlette", "uvicorn", "pydantic", "pyzmq", "msgspec", "uvloop")
PLUGINS = re.compile(r"(jax-(cuda|rocm)\w*-(plugin|pjrt)|nvidia-[\w-]+|libtpu)", re.I)
VARIABLES = re.compile(r"(JAX_|XLA|TF_GPU|CUDA|NVIDIA|NCCL|OMP|LD_LIBRARY_PATH$|TPU)")  # how arithmetic, devices and libraries are chosen
# Variables of ours and of the Hub's may hold a key or a prompt. These are shown; of the others, only that they are set.
SHOWN = {f"JAXLLM_{name}" for name in ("DTYPE", "DEVICE", "MAX_MODEL_LEN", "MAX_NUM_SEQS", "GPU_MEMORY_UTILIZATION", "ATTENTION_BACKEND")}
SHOWN |= {f"JAXLLM_{name}" for name in ("MODEL", "TENSOR_PARALLEL_SIZE", "KV_CACHE_DTYPE", "BLOCK_SIZE", "ENFORCE_EAGER", "LOAD_FORMAT")}
SHOWN |= {"HF_HOME", "HF_HUB_OFFLINE"}
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH|CREDENTIAL|COOKIE", re.I)
USER = re.compile(r"(?<=://)[^/\s@]*@")  # the name and password in a URL
GPUS = "--query-gpu=name,memory.total,driver_version,compute_cap"


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="jaxllm collect-env", description="Print what a bug report should say of this machine.").parse_args(argv)
    print("\n".join(lines()))
    return 0


def lines() -> Iterator[str]:
    """The report."""
    yield from _section("System", _system())
    yield from _section("Packages", {name: version for name in PACKAGES if (version := _version(name))} | plugins())
    yield from _section("Extras of jaxllm that are installed", {name: "" for name in extras("jaxllm")})
    yield from _section("Environment", variables(os.environ))


def _section(title: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield f"{title}:"
    yield from (f"  {name}: {value}" if value else f"  {name}" for name, value in rows.items())
    if not rows:
        yield "  none"


def _system() -> dict[str, str]:
    gpus = _output("nvidia-smi", GPUS, "--format=csv,noheader").splitlines() or ["none that nvidia-smi knows of"]
    return {
        "OS": f"{_os()}, kernel {platform.release()}, {platform.machine()}",
        "Python": f"{sys.version.split()[0]} ({platform.python_implementation()}), {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "CPU": f"{_first(Path('/proc/cpuinfo'), r'model name') or platform.processor() or 'unknown'}, {_cores()} cores for this process",
        "Memory": _memory(),
        **{f"GPU {i}": gpu for i, gpu in enumerate(gpus)},
    }


def _os() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, LookupError):
        return platform.platform()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    found = _first(Path("/proc/meminfo"), "MemTotal")
    return f"{int(found.split()[0]) / 2**20:.1f} GiB" if found else "unknown"


def _first(path: Path, name: str) -> str:
    """What stands after the colon of the first line with that name; nothing if there is none."""
    try:
        found = re.search(rf"^{name}\s*:\s*(.+)$", path.read_text(), re.M)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def plugins() -> dict[str, str]:
    """What drives the accelerators."""
    found = {each.metadata["Name"]: each.version for each in metadata.distributions() if each.metadata["Name"]}
    return {name: found[name] for name in sorted(found, key=str.lower) if PLUGINS.match(name)}


def extras(package: str) -> list[str]:
    """The extras of a package for which everything is installed."""
    found = metadata.metadata(package).get_all("Provides-Extra") or []
    return [extra for extra in found if _installed(package, extra)]


def _installed(package: str, extra: str) -> bool:
    requirements = [Requirement(text) for text in metadata.requires(package) or []]
    added = [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})]
    # An extra may ask for another package's extra: jax is there for everybody, jax[cuda13] is not.
    return all(_version(r.name) is not None and all(_installed(r.name, inner) for inner in r.extras) for r in added)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, and of those that may hold a secret only that they are set."""
    found = {}
    for name, value in sorted(environment.items()):
        if (name in SHOWN or VARIABLES.match(name)) and not SECRET.search(name):
            found[name] = USER.sub("...@", value)
        elif name.startswith(("JAXLLM_", "HF_")):
            found[name] = "(set)"
    return found
