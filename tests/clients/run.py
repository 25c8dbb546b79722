"""Other people's clients against a live server: `make clients`, or `make clients ARGS="openai litellm --checks chat stream"`.

Each client is installed from PyPI into an environment of its own, under .clients, and runs the program beside this file that bears its
name: a chat, a stream, a tool call, a structured output. Prints a table; the exit status is 1 unless everything passed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".clients"
PROGRAM_S = 900  # for one client's program, on a machine as busy as may be

CLIENTS = {  # what pip installs
    "openai": "openai",
    "langchain-openai": "langchain-openai",
    "instructor": "instructor",
    "litellm": "litellm",
    "pydantic-ai": "pydantic-ai-slim[openai]",
    "llama-index": "llama-index-llms-openai-like",
}
CHECKS = ("chat", "stream", "tool", "structured")
SERVER = ("--port", "0", "--max-num-seqs", "4", "--max-model-len", "1024")
# No client may report to its maker, or fetch anything. Whoever tries all the same fails: programs.py watches every connection.
QUIET = {
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LOGFIRE_IGNORE_NO_CONFIG": "1",
    "LOGFIRE_SEND_TO_LOGFIRE": "false",
    "OTEL_SDK_DISABLED": "true",
}


def environment(name: str) -> Path:
    """The client's own Python, made if it is not there yet."""
    folder = CACHE / name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists() or stamp.read_text() != CLIENTS[name]:
        print(f"installing {CLIENTS[name]}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", CLIENTS[name]], check=True)
        stamp.write_text(CLIENTS[name])
    return python


def start() -> tuple[subprocess.Popen, str, str]:
    """The server, its URL, and the name of its model."""
    with open(CACHE / "server.log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "serving", *SERVER], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    found = re.search(r": (\S+) at (http://\S+/v1)", server.stdout.readline())
    if found is None:
        raise SystemExit(f"The server did not start: {(CACHE / 'server.log').read_text()[-2000:]}")
    return server, found[2], found[1]


def run(name: str, python: Path, url: str, model: str, checks: list[str]) -> dict[str, str]:
    """What the client's program says of each check: "ok" and what it saw, or what went wrong."""
    env = os.environ | QUIET | {"OPENAI_API_KEY": "any"}
    command = [str(python), str(HERE / f"use_{name.replace('-', '_')}.py"), url, model, *checks]
    try:
        done = subprocess.run(command, env=env, cwd=HERE, capture_output=True, text=True, timeout=PROGRAM_S)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(checks, f"not done after {PROGRAM_S} s")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    if done.returncode != 0 and not found:
        print(done.stderr[-3000:], file=sys.stderr)
    said = {each["check"]: each["said"] for each in found}
    return {check: said.get(check, f"did not run: status {done.returncode}") for check in (*checks, "network")}


def version(name: str, python: Path) -> str:
    package = CLIENTS[name].partition("[")[0]
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", help=f"of {', '.join(CLIENTS)}; all unless given")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()
    if unknown := set(args.clients) - set(CLIENTS):
        parser.error(f"there is no client {min(unknown)}: there is {', '.join(CLIENTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is ended, too
    CACHE.mkdir(exist_ok=True)
    pythons = {name: environment(name) for name in args.clients or CLIENTS}
    server, url, model = start()
    failed = []
    try:
        print(f"{'client':<34}" + "".join(f"{check:<12}" for check in args.checks), flush=True)
        for name, python in pythons.items():
            said = run(name, python, url, model, args.checks)
            row = "".join(f"{'ok' if said[check].startswith('ok') else 'FAILED':<12}" for check in args.checks)
            print(f"{f'{name} {version(name, python)}':<34}{row}", flush=True)
            failed += [f"{name}, {check}: {text}" for check, text in said.items() if not text.startswith("ok")]
    finally:
        server.terminate()
        server.wait()
    print("".join(f"\n{line}" for line in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
