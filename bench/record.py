"""Keeps measurements: `bench/results/<what>-<device>.json`, one object of device, versions, command, commit, date and rows.

A row is one measurement: name, value, unit, what it was measured on, and where known the hardware's limit and another engine's
figure (`anchor`). A new row replaces the old one of the same name and workload; an old row that stays beside newer ones keeps the
versions, command, commit and date it was measured with.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
_MEASURED = ("value", "unit", "limit", "anchor", "versions", "command", "commit", "date")  # the rest of a row says what was measured


def count(text: str) -> int:
    """An argument's value, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("a count is at least 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--results and --no-save, for a bench that keeps its rows unless told otherwise."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--no-save", action="store_true", help="print only")


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


def rounded(value: float | None) -> float | None:
    """Four digits: more is noise."""
    return None if value is None else float(f"{value:.4g}")


def describe(row: Row) -> str:
    """A row as a line: what it measured, the value, tokens a second, and how far it is from the limit and from vLLM."""
    value, unit = row["value"], row["unit"]
    where = "".join(f" {key} {row[key]:>4}" for key in ("batch", "context", "clients") if row.get(key) is not None)
    line = f"{row['name']:<18} {row.get('model', ''):<14}{where:<26} {value:>10,.4g} {unit:<5}{_speed(row):<17}"
    faster = (lambda other: value / other) if unit == "tok/s" else (lambda other: other / value)
    if "limit" in row:
        line += f"  limit {row['limit']:,.4g} ({faster(row['limit']):.0%} of it)"
    if "anchor" in row:
        line += f"  vLLM {row['anchor']:,.4g} ({faster(row['anchor']):.2f} times its speed)"
    return line.rstrip()


def _speed(row: Row) -> str:
    """Tokens a second of a row that is a time for a known number of tokens."""
    seconds = row["value"] * {"ms": 1e-3, "s": 1.0}.get(row["unit"], 0.0)
    tokens = {"decode_step_ms": "batch", "mix_s": "tokens", "mix_sampled_s": "tokens"}.get(row["name"])
    return f"  {row[tokens] / seconds:>9,.0f} tok/s" if tokens and seconds else ""


def command(program: str, argv: list[str], *hidden: object) -> str:
    """The command line to repeat. A path is one machine's, and a key is nobody's business: of `hidden` ones the last part is enough."""
    line = shlex.join([*program.split(), *argv])
    for each in hidden:
        if each is not None and str(each):
            line = line.replace(str(each), Path(str(each)).name)
    return line


def device() -> str:
    """This machine's first GPU by the name that JAX gives it too, without starting JAX; "cpu" if there is none."""
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "cpu").splitlines()[0]


def slug(name: str) -> str:
    """A name as part of a file name: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    """What the measurement depends on. `driver` is None where there is no NVIDIA driver."""
    installed = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return installed | {"python": platform.python_version(), "driver": driver.splitlines()[0] if driver else None}


def commit() -> str | None:
    """The commit measured, marked if the tree differs from it (results apart). Outside a checkout: what BENCH_COMMIT says, or None."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
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
