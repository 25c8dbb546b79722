"""`jaxllm serve` over a runner that makes tokens up: the whole server, the device apart.

    python -m bench.null_engine serve --port 8001 --max-num-seqs 256
    python -m bench.null_engine --step-ms 12.8 serve --port 8001 --max-num-seqs 256

HTTP, API processes, the socket, core, scheduler, pages and detokenizer are the ones that serve; only the network is missing. It takes the
flags of `jaxllm serve`. A step takes no time, or as long as is said. With an address in place of `serve` it is the engine process.
"""

import argparse
import sys
import time
from functools import partial
from typing import Any

from jaxllm.batch import StepResult
from jaxllm.config import EngineConfig
from jaxllm.loading import Loaded
from jaxllm.plan import GIB, Machine, make_plan
from jaxllm.request import ConfigError
from jaxllm.scheduler import Step
from jaxllm.source import as_config_error, default_params, eos_ids, load_tokenizer, open_model
from serving import cli, engine_process
from serving.remote_engine import EngineProcess, RemoteEngine, StartFailed

WORD = " of"  # what every token says, or its beginning: a common word, as real answers hold
MACHINE = Machine("none", "none", 1, 100 * GIB)  # for rows and prompt tokens as a large GPU has them


class _Made:
    """A step whose tokens are there at a time of time.perf_counter."""

    def __init__(self, tokens: list[list[int]], done: float):
        self._tokens, self._done = tokens, done

    def draw(self) -> None:
        """Nothing is left to choose: no token depends on what was read."""

    def read(self) -> StepResult:
        if (wait := self._done - time.perf_counter()) > 0:
            time.sleep(wait)
        return StepResult(self._tokens)


class NullRunner:
    """Draws one and the same token for everybody, as often as is asked; what edits logits, or asks about them, it cannot do.

    step: seconds from one token of a row to its next; a step is begun when the one before it is done, as on a device.
    """

    patch = None

    def __init__(self, token: int, step: float = 0.0):
        self._token, self._step, self._free = token, step, 0.0

    def run(self, step: Step) -> _Made:
        self._free = max(self._free, time.perf_counter()) + self._step * step.turns
        return _Made([[self._token] * row.samples for row in step.rows], self._free)


def parts(step: float, config: EngineConfig) -> Loaded:
    """What loading.load_engine_parts gives, without weights. Raises ConfigError if the model has no tokenizer."""
    with as_config_error():
        folder, checkpoint = open_model(config)
        tokenizer = load_tokenizer(config, folder)
    if tokenizer is None:
        raise ConfigError("the null engine needs a model with a tokenizer: it measures what text costs too")
    plan = make_plan(config, checkpoint.config, checkpoint.dtype, MACHINE, 0)
    runner: Any = NullRunner(tokenizer.encode(WORD, add_special_tokens=False)[0], step)
    ends, defaults = eos_ids(config, checkpoint, tokenizer), default_params(config, checkpoint)
    return Loaded("null", str(folder), plan, runner, tokenizer, checkpoint.config.vocab_size, ends, defaults)


def make_engine(step: float, config: EngineConfig) -> RemoteEngine:
    try:
        return RemoteEngine(config, EngineProcess(config, "bench.null_engine", "--step-ms", str(1e3 * step))).wait()
    except StartFailed:
        raise SystemExit(1) from None  # the engine's process has said why


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m bench.null_engine", description="Serves made-up tokens through the whole server.")
    made.add_argument("--step-ms", type=float, default=0.0, help="from one token of an answer to its next (default: no time)")
    made.add_argument("what", help="serve, or the address of the server whose engine process this is")
    made.add_argument("flags", nargs=argparse.REMAINDER, help="of jaxllm serve")
    args = made.parse_args(argv)
    if args.what == "serve":
        return cli.main(["serve", *args.flags], make_engine=partial(make_engine, args.step_ms / 1e3))
    return engine_process.main(args.what, load=partial(parts, args.step_ms / 1e3))


if __name__ == "__main__":
    sys.exit(main())
