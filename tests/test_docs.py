"""The documents against the tree: the file table is complete, links lead somewhere, and commands exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import server_tables

from jaxllm.config import EngineConfig
from serving import exposition
from serving.options import ServerOptions

ROOT = Path(__file__).parent.parent
PACKAGES = ("converters", "pallas_kernels", "jaxllm", "serving", "bench")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_table_names_every_module_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"^\| `([\w/]+\.py)` \| .+ \|$", text, re.M)
    present = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.stat().st_size}
    assert len(named) == len(set(named)), "a file is named twice"
    assert set(named) == present, f"not in the table: {sorted(present - set(named))}; no such file: {sorted(set(named) - present)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_text_mentions_exist(document):
    text = (ROOT / document).read_text()
    mentioned = set(re.findall(rf"`((?:{'|'.join(PACKAGES)}|tests|docs|examples)/[\w./-]+)`", text))
    assert not {name for name in mentioned if not (ROOT / name).exists()}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, section = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{document} links to {target}"
        if section:
            assert section in {anchor(heading) for heading in re.findall(r"^#+ (.+)$", linked.read_text(), re.M)}, (
                f"{document} links to {target}"
            )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_commands_are_targets(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    shell = "\n".join(code_blocks((ROOT / document).read_text(), "sh"))
    wanted = set(re.findall(r"^make ([a-z]+)", shell, re.M))
    assert wanted <= targets, f"the Makefile has no {sorted(wanted - targets)}"


def test_the_readme_opens_with_the_two_commands():
    first = code_blocks((ROOT / "README.md").read_text(), "sh")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make serve", "make test"]


def test_continuous_integration_runs_the_readmes_test_command():
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o100, ".ci/run is not executable"
    assert run.read_text().splitlines()[-1] == "exec make test"


def test_the_readmes_python_is_good_python():
    for block in code_blocks((ROOT / "README.md").read_text(), "python"):
        compile(block, "README.md", "exec")


def test_the_readmes_flags_exist():
    """Every flag of the README's table is a field of EngineConfig or of ServerOptions."""
    fields = {field.name for owner in (EngineConfig, ServerOptions) for field in dataclasses.fields(owner)}
    table = re.findall(r"^\| (`-.+?) \| ", (ROOT / "README.md").read_text(), re.M)
    flags = {flag[2:].replace("-", "_") for row in table for flag in re.findall(r"`(--[\w-]+)`", row)}
    assert flags and flags <= fields, f"neither the engine's nor the server's: {sorted(flags - fields)}"


def test_the_servers_tables_are_the_codes():
    text = server_tables.PAGE.read_text()
    assert server_tables.filled(text) == text, "docs/server.md is not what the code says: make docs"


def test_the_dashboard_asks_for_metrics_that_there_are():
    asked = set(re.findall(r"jaxllm:(\w+)", (ROOT / "docs" / "grafana.json").read_text()))
    there = {*exposition.GAUGES, *(f"{name}_total" for name in exposition.COUNTERS), "request_success_total"}
    there |= {f"{name}_bucket" for name in exposition.HISTOGRAMS}
    assert asked and asked <= there, f"no such metrics: {sorted(asked - there)}"
