"""How long `jaxllm serve` takes from process start until /health answers 200: with nothing cached, and again with what that left.

    jaxllm bench startup --model qwen2.5-0.5b --load-format dummy
    jaxllm bench startup --model llama-3.1-8b --load-format orbax --keep shapes

"Nothing cached" is a fresh folder for everything that jaxllm, CUDA and Triton keep of compiling; weights may lie in the page cache,
and Python's own bytecode is as the installation left it. The phases are the ones that the server logs. A shape that is not to have
dummy weights is written as a checkpoint first, `safetensors` or, converted from that, `orbax`; --keep keeps what was written.
"""

import argparse
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import record, workloads
from bench.checkpoints import WRITTEN, written

PHASE = re.compile(r"\b(?:INFO )?([a-z][\w ]*?) {2,}(\d+\.\d+) s$")
WARNING = re.compile(r"^\S+ (WARNING|ERROR) ")
CACHES = ("XDG_CACHE_HOME", "CUDA_CACHE_PATH", "TRITON_CACHE_DIR")
POLL_S = 0.01


@dataclass(frozen=True)
class Start:
    """One start: seconds to the first 200 of /health, what the server said its phases took, and what it warned of."""

    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def phases(lines: list[str]) -> dict[str, float]:
    """Seconds by phase, from the server's log."""
    return {found[1]: float(found[2]) for line in lines if (found := PHASE.search(line.rstrip()))}


def start(command: list[str], caches: Path, timeout: float) -> Start:
    """Starts a server on a free port and ends it once it is healthy. Raises RuntimeError, with its last words, if it never is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {name: str(caches / name.lower()) for name in CACHES}
    begun = time.perf_counter()
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    assert server.stderr is not None
    listener = threading.Thread(target=said.extend, args=(server.stderr,), daemon=True)
    listener.start()
    try:
        while not _healthy(port):
            if server.poll() is not None or time.perf_counter() - begun > timeout:
                listener.join(1)
                raise RuntimeError(f"the server was not healthy after {time.perf_counter() - begun:.0f} s:\n{''.join(said[-20:])}")
            time.sleep(POLL_S)
        seconds = time.perf_counter() - begun
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()
        server.wait()
        listener.join(5)
        server.stderr.close()
    return Start(seconds, phases(said), tuple(line.rstrip() for line in said if WARNING.search(line)))


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def table(cold: list[Start], warm: list[Start]) -> str:
    """Phases by line, the medians of cold and warm starts; what no phase covers (imports, the first request) comes last."""
    lines = [f"{'phase':<28}{'nothing cached':>16}{'cached':>16}"]
    columns = [_medians(starts) for starts in (cold, warm)]
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [f"{column[name]:.2f} s" if name in column else "" for column in columns]
        lines.append(f"{name:<28}{cells[0]:>16}{cells[1]:>16}".rstrip())
    return "\n".join(lines)


def _medians(starts: list[Start]) -> dict[str, float]:
    if not starts:
        return {}
    names = dict.fromkeys(name for each in starts for name in each.phases)
    found = {name: statistics.median(each.phases.get(name, 0.0) for each in starts) for name in names}
    total = statistics.median(each.seconds for each in starts)
    return found | {"everything else": total - sum(found.values()), "process start to /health": total}


def rows(cold: list[Start], warm: list[Start], common: dict[str, Any], device: str, size: int = 0) -> list[record.Row]:
    """size: bytes of weights that were read; 0 if none were. How fast is known of starts that compile nothing meanwhile."""
    made = []
    for name, starts in (("start_cold_s", cold), ("start_warm_s", warm)):
        if starts:
            seconds = statistics.median(each.seconds for each in starts)
            row = {"name": name, "value": record.rounded(seconds), "unit": "s"} | common
            anchor = workloads.vllm_figure(device, row)
            made.append(row if anchor is None else row | {"anchor": anchor})
    if size and (took := _medians(warm).get("weights")):
        made.append({"name": "load_GBps", "value": record.rounded(size / took / 1e9), "unit": "GB/s"} | common)
    return made


def weight_bytes(folder: Path) -> int:
    """Bytes of the files that hold the weights of a model folder."""
    files = [path for pattern in ("*.safetensors", "orbax/**/*") for path in folder.glob(pattern)]
    return sum(path.stat().st_size for path in files if path.is_file())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench startup", description="Times jaxllm serve from process start to ready.")
    made.add_argument("--model", help=f"a folder, or a shape: {', '.join(workloads.SHAPES)} (default: the model that ships with jaxllm)")
    formats = "dummy: random weights; safetensors, orbax: of a shape, a checkpoint is written first (default: auto)"
    made.add_argument("--load-format", default="auto", help=formats)
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="write a shape's checkpoint here, and use what is here already")
    made.add_argument("--dtype", default="auto", help="default: auto")
    made.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    made.add_argument("--cold", type=int, default=1, help="starts with nothing cached (default: 1)")
    made.add_argument("--warm", type=int, default=3, help="starts after that (default: 3)")
    made.add_argument("--timeout", type=float, default=900.0, help="seconds for one start (default: 900)")
    made.add_argument("--args", default="", help='more flags of jaxllm serve, as one word: --args="--max-model-len 8192"')
    record.add_arguments(made)
    return made


@contextlib.contextmanager
def serve_command(args: argparse.Namespace) -> Iterator[tuple[list[str], int]]:
    """`jaxllm serve` with what was asked, and the bytes of weights it reads. A shape's name is a folder while the block runs."""
    flags = ["--load-format", args.load_format, "--dtype", args.dtype, "-tp", str(args.tensor_parallel_size), *args.args.split()]
    with model(args) as folder:
        size = weight_bytes(Path(folder)) if folder and args.load_format != "dummy" else 0
        yield [sys.executable, "-m", "serving.cli", "serve", *([folder] if folder else []), *flags], size


@contextlib.contextmanager
def model(args: argparse.Namespace) -> Iterator[str | None]:
    """The folder to serve, None for the default model. Raises OSError if a checkpoint that is wanted cannot be written."""
    if not args.model:
        yield None
    elif args.model in workloads.SHAPES and args.load_format in WRITTEN:
        with written(args.model, args.load_format, args.keep) as path:
            yield str(path)
    else:
        with workloads.model_folder(args.model) as (folder, _):
            yield folder


def tell(how: str, number: int, done: Start) -> None:
    print("\n".join([f"{how}, start {number + 1}: {done.seconds:.2f} s", *done.warnings]), flush=True)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command, device = record.command("jaxllm bench startup", argv, args.model, args.results), record.device()
    name = workloads.model_name(args.model) if args.model else "default"
    print(f"{name} on {device}, {record.versions()}\n{command}", flush=True)
    cold: list[Start] = []
    warm: list[Start] = []
    try:
        with serve_command(args) as (serve, size), contextlib.ExitStack() as folders:
            caches = Path(folders.enter_context(tempfile.TemporaryDirectory()))
            for number in range(args.cold):
                caches = Path(folders.enter_context(tempfile.TemporaryDirectory()))
                cold.append(start(serve, caches, args.timeout))
                tell("nothing cached", number, cold[-1])
            for number in range(args.warm):
                warm.append(start(serve, caches, args.timeout))
                tell("cached", number, warm[-1])
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"jaxllm bench startup: {error}") from error
    print(table(cold, warm))
    common = {"model": name, "dtype": args.dtype, "tp": args.tensor_parallel_size, "load_format": args.load_format}
    kept = rows(cold, warm, common | ({"dtype": "bfloat16"} if args.dtype == "auto" and name in workloads.SHAPES else {}), device, size)
    for row in kept:
        print(record.describe(row))
    if not args.no_save:
        record.save("startup", device, command, kept, args.results)


if __name__ == "__main__":
    main()
