"""The Dockerfile without Docker: its commands are good shell, what it copies exists and is all a build needs, its ports agree."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """(keyword, argument) in order: comments gone, continued lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.strip() and not line.startswith("#"))
    pairs = [line.split(None, 1) for line in re.sub(r"\\\n\s*", "", text).splitlines()]
    return [(keyword, argument) for keyword, argument in pairs]


def arguments(keyword: str) -> list[str]:
    return [argument for found, argument in instructions() if found == keyword]


def test_commands_are_good_shell_in_order():
    script = "\n".join(["set -e", *arguments("RUN")])
    assert len(arguments("RUN")) >= 3
    checked = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_what_is_copied_exists_and_is_not_ignored():
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for argument in arguments("COPY"):
        *sources, _ = argument.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in allowed, f"{source} is copied but .dockerignore leaves it out"


def test_every_package_is_copied():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {source for argument in arguments("COPY") for source in argument.split()[:-1]}
    assert {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]} <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= copied


def test_the_extra_is_one_of_ours():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [extra] = [argument.removeprefix("EXTRA=") for argument in arguments("ARG")]
    assert extra in extras
    assert f"cuda:{extra.removeprefix('cuda')}." in arguments("FROM")[0], "base image and jax extra are of one CUDA generation"


def test_it_serves_beyond_the_container_as_nobody_special():
    [entry] = arguments("ENTRYPOINT")
    command = json.loads(entry)
    assert command[:2] == ["jaxllm", "serve"] and command[command.index("--host") + 1] == "0.0.0.0"
    assert arguments("EXPOSE") == ["8000"]
    assert arguments("USER") == ["jaxllm"] and arguments("VOLUME") == ["/cache"]
