"""The `jaxllm` command: each of its commands imports what it needs only when it runs, so that help and mistakes answer at once."""

import importlib
import importlib.util
import logging
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jaxllm import __version__
from jaxllm.config import EngineConfig
from jaxllm.request import ConfigError, EngineDeadError, JaxllmError
from serving import options, run
from serving.options import ServerOptions

if TYPE_CHECKING:
    from serving.protocol import EngineLike

log = logging.getLogger("jaxllm.server")

BENCHES = {  # each runs bench.NAME as a program
    "serve": "load any OpenAI server over HTTP",
    "latency": "time one batch through the Python API",
    "throughput": "time many requests through the Python API",
    "offline": "measure decode, prefill and mixed work, and keep the results",
    "structured": "measure what answers with a form cost other rows",
    "api": "measure what API processes stream, over an engine that makes tokens up",
    "streams": "measure what streams over HTTP cost the engine's steps",
    "startup": "time jaxllm serve from process start to ready",
    "profile": "show where a step's time goes on the GPU",
    "kernels": "time the attention kernels, and find their block sizes",
    "linears": "time a decode step's linear layers, and find their tiles",
    "variants": "time steps with kernels replaced beside the steps as they are",
    "compare": "put results beside limits and vLLM's figures",
}

COMMANDS = {
    "serve": ("[MODEL]", "Serve a model over OpenAI's HTTP API."),
    "chat": ("", "Talk with a model that any OpenAI server serves."),
    "complete": ("", "Let such a model continue texts."),
    "run-batch": ("-i FILE -o FILE", "Answer every request of an OpenAI batch file, without a server."),
    "convert": ("MODEL FOLDER", "Write a model in the form that starts sharded."),
    "bench": ("NAME", "Measure; jaxllm bench --help lists what there is."),
    "collect-env": ("", "Print what a bug report should say of this machine."),
}
USAGE = "\n".join(
    [
        "jaxllm serves language models over OpenAI's HTTP API.\n",
        "usage: jaxllm COMMAND [options]; jaxllm COMMAND --help lists them\n",
        *(f"  {f'{name} {arguments}':<26} {what}" for name, (arguments, what) in COMMANDS.items()),
        f"  {'--version':<26} Print the version.\n",
    ]
)


def main(argv: Sequence[str] | None = None, *, make_engine: "Callable[[EngineConfig], EngineLike] | None" = None) -> int:
    """Runs the command; returns its exit status. `make_engine` stands in for jaxllm's Engine in tests."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command in ("-V", "--version"):
        print(f"jaxllm {__version__}")
    elif command == "serve":
        return serve(rest, make_engine or _make_engine)
    elif command == "run-batch":
        return run_batch(rest, make_engine or _make_engine)
    elif command in ("chat", "complete"):
        from serving import terminal

        return terminal.main(command, rest)
    elif command == "convert":
        return convert(rest)
    elif command == "bench":
        return bench(rest)
    elif command == "collect-env":
        from serving import environment

        return environment.main(rest)
    else:
        return _complain(f"there is no command {command!r}: jaxllm --help lists what there is", 2)
    return 0


def _complain(sentence: object, status: int) -> int:
    print(f"jaxllm: {sentence}", file=sys.stderr)
    return status


def bench(argv: Sequence[str]) -> int:
    """Runs bench.NAME as a program, without importing it: bench is above serving."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: jaxllm bench NAME [options], with NAME one of")
        print("\n".join(f"  {bench:<12} {what}" for bench, what in BENCHES.items()))
        return 0
    if name not in BENCHES or importlib.util.find_spec(f"bench.{name}") is None:
        return _complain(f"there is no bench {name!r} here: there is {', '.join(BENCHES)}", 2)
    sys.argv = [f"jaxllm bench {name}", *rest]
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=False)
    return 0


def convert(argv: Sequence[str]) -> int:
    """Writes a model in our own form. Returns 0, or 1 with a sentence if it could not."""
    args = options.convert_parser().parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Orbax starts JAX, which would take the GPUs' memory
    from converters import orbax
    from jaxllm.plan import choose_dtype
    from jaxllm.source import as_config_error, open_model

    start = time.perf_counter()
    names = ("model", "dtype", "load_format", "revision", "download_dir")
    try:
        if args.load_format == "dummy":
            raise ConfigError("there is nothing to convert in dummy weights; leave out --load-format dummy")
        with as_config_error():
            _, checkpoint = open_model(EngineConfig(**{name: getattr(args, name) for name in names}))
            orbax.convert(checkpoint, Path(args.folder), choose_dtype(args.dtype, checkpoint.dtype))
    except JaxllmError as error:
        return _complain(error, 1)
    print(f"{args.folder} written in {time.perf_counter() - start:.1f} s; serve it with: jaxllm serve {args.folder}")
    return 0


def serve(argv: Sequence[str], make_engine: "Callable[[EngineConfig], EngineLike]") -> int:
    """Loads the model, then serves until a signal. Returns 0 after SIGTERM or SIGINT, 1 if it could not start or the engine died.

    Raises SystemExit, as uvicorn does, if the first request failed: the log has said why.
    """
    config, server_options = options.read(argv)
    set_up_logging()
    signal.signal(signal.SIGTERM, stop)  # so that the engine is closed, while it loads as well as later
    try:
        while True:
            try:
                _serve(config, server_options, make_engine)
                break
            except EngineDeadError as error:
                if not server_options.restart_engine:
                    return _complain(f"{error}; with --restart-engine it would have been started again", 1)
                log.warning("%s: starting it again", error)
    except JaxllmError as error:
        return _complain(error, 1)
    except (KeyboardInterrupt, _Stopped):
        pass
    return 0


def _serve(config: EngineConfig, options: ServerOptions, make_engine: "Callable[[EngineConfig], EngineLike]") -> None:
    """One engine's life. Raises EngineDeadError if it died."""
    start = time.perf_counter()
    # Bound first: a port that is taken should be known before minutes of loading. It listens only when everything is ready.
    with run.bind(options) as listener:
        engine = make_engine(config)
        try:
            if options.api_server_count == 1:
                run.serve(engine, options, listener, lambda: run.say_ready(engine, options, listener, start))
            else:
                run.serve_in_processes(engine, options, listener, start)
        finally:
            engine.close()


def run_batch(argv: Sequence[str], make_engine: "Callable[[EngineConfig], EngineLike]") -> int:
    """As serving.batch.main."""
    from serving import batch

    set_up_logging()
    return batch.main(argv, make_engine)


def _make_engine(config: EngineConfig) -> "EngineLike":
    from serving.remote_engine import RemoteEngine, StartFailed

    engine = RemoteEngine(config)
    try:
        importlib.import_module("serving.app")  # a second's work, while the engine loads
        return engine.wait()
    except StartFailed:
        raise SystemExit(1) from None  # the engine's process has said why


class _Stopped(SystemExit):
    """SIGTERM came."""


def stop(*_: object) -> NoReturn:
    raise _Stopped


def set_up_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("jaxllm").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
