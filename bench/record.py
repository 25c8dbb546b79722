"""Keeps measurements: `bench/results/<what>-<device>.json`, one object of device, versions, command, commit, date and rows.

A row is one measurement: name, value, unit, what it was measured on, and where known the hardware's limit and another engine's
figure (`anchor`). A new row replaces the old one of the same name and workload; an old row that stays beside newer ones keeps the
versions, command, commit and date it was measured with.
"""

import importlib.metadata
import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
_MEASURED = ("value", "unit", "limit", "anchor", "versions", "command", "commit", "date")  # the rest of a row says what was measured


def save(what: str, device: str, command: str, rows: list[Row], folder: Path = RESULTS) -> Path:
    """Merges `rows` into the file for `what` on `device` and returns its path. Raises ValueError if that file is not ours."""
    path = folder / f"{what}-{slug(device)}.json"
    now = {"versions": versions(), "command": command, "commit": commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    replaced = [_workload(row) for row in rows]
    kept = [_without(row, now) for row in _earlier(path) if _workload(row) not in replaced]
    merged = sorted(kept + rows, key=lambda row: json.dumps(_workload(row)))
    # One row a line: a changed measurement is then one changed line in git.
    lines = ",\n".join("    " + json.dumps(row) for row in merged)
    head = json.dumps({"device": device} | now, indent=2).removesuffix("\n}")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')
    return path


def _earlier(path: Path) -> list[Row]:
    """The rows of a result file, each with the circumstances it was measured in."""
    if not path.exists():
        return []
    try:
        old = json.loads(path.read_text())
        circumstances = {key: old[key] for key in ("versions", "command", "commit", "date")}
        return [row | {k: v for k, v in circumstances.items() if k not in row} for row in old["rows"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a result file of this bench ({error!r}): move it away, or write elsewhere with --results"
        ) from error


def _without(row: Row, now: Row) -> Row:
    """A row less the circumstances that are the file's own."""
    return {key: value for key, value in row.items() if now.get(key) != value}


def _workload(row: Row) -> list[tuple[str, Any]]:
    """What a row measures, whatever came out."""
    return sorted((key, value) for key, value in row.items() if key not in _MEASURED)


def slug(name: str) -> str:
    """A name as part of a file name: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    """What the measurement depends on. `driver` is None where there is no NVIDIA driver."""
    installed = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return installed | {"python": platform.python_version(), "driver": driver.splitlines()[0] if driver else None}


def commit() -> str | None:
    """The commit measured, marked if the tree differs from it (results apart); None outside a checkout."""
    name = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return name and name + ("-changed" if changed else "")


def _output(*command: str) -> str | None:
    """What a command prints; None if it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
