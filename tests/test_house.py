"""The house rules a program can check: lint, format, types, the direction of imports, and that no file names somebody's machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent  # the console scripts of the same environment


def run(*command: object) -> None:
    """Runs a checker at the root; what it prints is the reason the test fails."""
    # Node comes from the wheel beside pyright: a machine's own may be absent, or older than pyright needs.
    env = os.environ | {"PYRIGHT_PYTHON_GLOBAL_NODE": "off", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_COLOR": "1"}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"\n{done.stdout[-8000:]}{done.stderr[-2000:]}"


def files() -> list[Path]:
    """Every file git has, or would take with the next `git add`."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files, and this is not a checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def lines(path: Path) -> list[str]:
    """A text file's lines; none of a binary one."""
    data = path.read_bytes()
    return [] if b"\0" in data[:8192] else data.decode("utf-8", "replace").splitlines()


def test_lint():
    run(sys.executable, "-m", "ruff", "check", ".")


def test_format():
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types():
    run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable)


def test_imports_run_one_way():
    run(SCRIPTS / "lint-imports", "--no-cache")


# Folders only one machine has, and ways to name the package index that one machine uses.
MACHINE = re.compile(r"(?<![\w.}])/(work|farm|home|Users|root|mnt/[a-z])/\w|(index|find|trusted)-(url|links|host)\b|//[^/\s]+/simple\b")


@pytest.mark.parametrize("text", ["see /ho" + "me/ann/x", "'/wo" + "rk/a'", "--extra-ind" + "ex-url", "http://pypi.local/sim" + "ple"])
def test_machine_names_are_recognised(text):
    assert MACHINE.search(text)


def test_no_file_names_a_machine():
    found = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for path in files() for n, line in enumerate(lines(path), 1) if MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


def test_files_are_small():
    """What is cloned stays small: data is made by scripts, or packed."""
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in files() if path.stat().st_size > 8_000_000}
    assert large.pop("jaxllm/default_model/model.safetensors", 0) <= 40_000_000
    assert not large
