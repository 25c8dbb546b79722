"""Compiled executables, kept between starts in one file for each way of starting.

JAX's own cache would spare a second start XLA's work, but not tracing and lowering, which hold Python's lock: 0.3 to 0.6 s a shape. Reading
one back takes 20 ms (8B on an H200: 20 shapes in 0.6 s instead of 23). The price is that nobody looks at the program any more, so a file's
name is a digest of all that decides it: our source, the versions, the devices, JAX's settings, and what the caller adds.
"""

import contextlib
import hashlib
import logging
import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

log = logging.getLogger("jaxllm")

KEPT = 32  # files; the ones not used for the longest time go
PACKAGES = ("jaxllm", "pallas_kernels", "converters")


class Executables:
    """Executables by name, for `devices`. `made_from`: whatever decides how they are compiled, beside what this module adds itself: plain
    values, and dataclasses, sequences, sets and mappings of them. `folder` None keeps nothing."""

    def __init__(self, folder: Path | None, devices: Sequence[Any], *made_from: object):
        self._devices = devices
        # XLA's choices among matmul kernels are kept too: they are timed, so they differ from start to start, and with them the last bits.
        self.options: dict[str, Any] = {}
        if folder is not None and devices[0].platform == "gpu":
            with contextlib.suppress(OSError):  # `keep` will complain
                self.options["xla_gpu_per_fusion_autotune_cache_dir"] = str(_made(folder / "autotune"))
        self._path = folder and folder / f"{_digest(*made_from, _surroundings(devices))}.executables"
        self._kept: dict[str, tuple] = {}
        if self._path is not None and self._path.exists():
            self._kept = self._read(self._path)

    @staticmethod
    def _read(path: Path) -> dict[str, tuple]:
        try:
            kept = dict(pickle.loads(path.read_bytes()))
            os.utime(path)
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
            log.warning("%s cannot be read (%r): compiling again", path, error)
            return {}
        return kept

    def get(self, name: str) -> Compiled | None:
        """The executable, ready to run; None if it was not kept. Any thread may ask."""
        if (found := self._kept.get(name)) is None:
            return None
        try:
            return serialize_executable.deserialize_and_load(*found, execution_devices=self._devices)
        except (jax.errors.JaxRuntimeError, pickle.UnpicklingError) as error:
            log.warning("%s in %s cannot be loaded (%s): compiling it again", name, self._path, error)
            del self._kept[name]
            return None

    def keep(self, made: Mapping[str, Compiled]) -> None:
        """Replaces what is kept, unless it is there already. A full disk or a folder that nobody may write to costs only a warning."""
        if self._path is None or self._kept.keys() == made.keys():
            return
        try:
            _made(self._path.parent)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:  # whole or not at all, whoever else starts
                pickle.dump({name: serialize_executable.serialize(executable) for name, executable in made.items()}, file)
            os.replace(file.name, self._path)
            newest_first = sorted(self._path.parent.glob("*.executables"), key=lambda path: -path.stat().st_mtime)
            for path in newest_first[KEPT:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("compiled steps cannot be kept for the next start: %s", error)


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _digest(*values: object) -> str:
    return hashlib.sha256(_text(values).encode()).hexdigest()[:32]


def _text(value: Any) -> str:
    """The same text in every process: `repr` would show a set in the order of its hashes, and an object by its address."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}{_text([(field.name, getattr(value, field.name)) for field in fields(value)])}"
    if isinstance(value, Mapping):
        return f"mapping{_text(sorted((_text(k), _text(v)) for k, v in value.items()))}"
    if isinstance(value, set | frozenset):
        return f"set{_text(sorted(map(_text, value)))}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    raise TypeError(f"{value!r} has no text that stays the same from process to process")


def _surroundings(devices: Sequence[Any]) -> dict[str, Any]:
    """What decides how anything compiles for these devices, here and now."""
    client = devices[0].client
    return {
        "source": _source(),
        "platform": (jax.__version__, client.platform, client.platform_version, _processor()),
        "devices": [(device.id, device.device_kind) for device in devices],
        "settings": settings(),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }


def settings() -> dict[str, Any]:
    """JAX's, as far as they have a lasting text."""
    return {k: v for k, v in jax.config.values.items() if isinstance(v, bool | int | float | str)}


@cache
def _source() -> str:
    """A digest of our own code and tables."""
    made = hashlib.sha256()
    for package in PACKAGES:
        root = Path(str(files(package)))
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".json") and "default_model" not in p.parts):
            made.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return made.hexdigest()


def _processor() -> str:
    """What code for this CPU may use; empty where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""
