"""Times steps with some kernels' files replaced, by turns with the steps as they are, and compares their tokens: all in one process.

    jaxllm bench variants --model llama-3.1-8b --load-format dummy --batch 1 64 --file pallas_kernels/attention_decode.py=new.py

Hosts of one kind differ by a tenth, and two processes on one host by several percent, which is more than most changes are worth. Here
both have the same engine, weights and pages; only the steps are compiled twice. Nothing is kept in the result files.

Only files of pallas_kernels can be replaced: what jaxllm makes of its classes when it starts, the network above all, would stay what it is.
One that these steps do not use changes nothing, and then nothing but noise is reported.
"""

import argparse
import contextlib
import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bench import offline, record, workloads

ROOT = Path(__file__).parent.parent
KERNELS = Path("pallas_kernels")
PACKAGES = ("jaxllm", "pallas_kernels")  # where what is replaced is used
ANSWER = 32  # tokens of each row that are compared
Files = Mapping[str, Path]  # by the name of the module that each stands for


@dataclass(frozen=True)
class Compared:
    """Milliseconds of a decode step, or seconds of MIX, a round each; and how many of the greedy tokens are the same in both."""

    what: str
    as_it_is: list[float]
    replaced: list[float]
    same: int
    tokens: int

    def __str__(self) -> str:
        old, new = (statistics.median(each) for each in (self.as_it_is, self.replaced))
        rounds = [" ".join(f"{value:.4g}" for value in each) for each in (self.as_it_is, self.replaced)]
        return f"{self.what}: {rounds[0]}, replaced {rounds[1]}: {new / old - 1:+.1%}; {self.same} of {self.tokens} tokens are the same"


@contextlib.contextmanager
def in_place(files: Files) -> Iterator[None]:
    """While it lasts, our modules have what the other files define wherever they had it from those files' modules.

    What was traced before is forgotten at both ends.
    """
    import jax

    made = {name: _loaded(name, path) for name, path in files.items()}
    ours = [*(m for name, m in sys.modules.items() if name.partition(".")[0] in PACKAGES), *made.values()]
    before: list[tuple[ModuleType, str, Any]] = []
    for name, new in made.items():
        old = importlib.import_module(name)
        for module in ours:
            if module in (old, new):
                continue
            for key, value in list(vars(module).items()):
                taken = key in vars(old) and not key.startswith("__") and value is vars(old)[key]
                if value is old or (taken and key in vars(new)):
                    before.append((module, key, value))
                    setattr(module, key, new if value is old else vars(new)[key])
    jax.clear_caches()
    try:
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)
        jax.clear_caches()


def _loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def steps(runner: Any, files: Files, wanted: set) -> dict[Any, Any]:
    """The runner's steps of the wanted shapes, compiled with the files in place."""
    programs = runner._programs
    runner._programs = [program for program in programs if program.kind == "step" and program.key in wanted]
    try:
        with in_place(files):
            made = runner._compiled(None, 0)
        return {program.key: made[program.name] for program in runner._programs}
    finally:
        runner._programs = programs


def compared(bench: offline.Bench, files: Files, batches: Sequence[int], mix: bool, rounds: int) -> Iterator[Compared]:
    """Decode of each batch, then MIX if it is wanted. Steps with prompts are replaced only for MIX."""
    engine = bench.llm.engine
    runner, plain = engine._runner, engine._runner._steps
    wanted = {b for b in plain if not b.scored} if mix else {engine.plan.bucket(rows, 0) for rows in batches}
    replaced = plain | steps(runner, files, wanted)

    def both(run: Callable[[], Any]) -> list[Any]:
        found = []
        for way in (plain, replaced):
            runner._steps = way  # nothing runs now
            found.append(run())
        return found

    def case(what: str, rows: int, value: Callable[[], float]) -> Compared:
        pairs = [pair for answers in zip(*both(partial(_answers, bench, rows)), strict=True) for pair in zip(*answers, strict=True)]
        times = [both(value) for _ in range(rounds)]
        return Compared(what, [old for old, _ in times], [new for _, new in times], sum(a == b for a, b in pairs), len(pairs))

    try:
        for rows in batches:
            yield case(f"{rows} rows, ms a step", rows, lambda rows=rows: bench.decode(rows)["value"])
        if mix:
            yield case("MIX, s", 64, lambda: bench.mix(sampled=False)["value"])
    finally:
        runner._steps = plain


def _answers(bench: offline.Bench, rows: int) -> list[tuple[int, ...]]:
    """The first tokens after the same prompts, always."""
    prompts = workloads.random_prompts(np.random.default_rng(0), [workloads.DECODE_PROMPT] * rows, bench.llm.engine.vocab_size)
    answers = bench.llm.generate(prompts, offline.GREEDY.with_defaults(max_tokens=ANSWER), use_tqdm=False)
    return [answer.outputs[0].token_ids for answer in answers]


def _file(text: str) -> tuple[str, Path]:
    """PATH=OTHER, PATH as it is called from the project's root."""
    path, _, other = text.partition("=")
    if Path(path).parent != KERNELS or Path(path).suffix != ".py" or Path(path).stem == "__init__" or not (ROOT / path).is_file():
        raise argparse.ArgumentTypeError(
            f"{path!r} is no module of {KERNELS}; say PATH=OTHER, such as {KERNELS}/attention_decode.py=new.py"
        )
    if not Path(other).is_file():
        raise argparse.ArgumentTypeError(f"{other!r}, which is to stand for {path}, is no file")
    return path.removesuffix(".py").replace("/", "."), Path(other)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="jaxllm bench variants", description="Times steps with kernels replaced beside the steps as they are."
    )
    offline.add_engine_arguments(made)
    made.add_argument(
        "--file", nargs="+", type=_file, required=True, metavar="PATH=OTHER", help="a kernel's file, and what is to stand for it"
    )
    made.add_argument("--batch", nargs="*", type=int, default=[1, 64], help="decode: rows in a batch (default: 1 64)")
    made.add_argument("--mix", action="store_true", help="MIX too, with all steps replaced")
    made.add_argument("--rounds", type=int, default=3, help="times that both are timed, by turns (default: 3)")
    return made


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = (made := parser()).parse_args(argv)
    if not args.batch and not args.mix:
        made.error("there is nothing to time: give --batch some rows, or --mix")
    args.workload = [*(["decode"] if args.batch else []), *(["mix"] if args.mix else [])]
    with offline.loaded(args, offline.engine_options(args)) as bench:
        print(record.command("jaxllm bench variants", argv, args.model, *(path for _, path in args.file)), flush=True)
        bench.warm_up()
        for found in compared(bench, dict(args.file), args.batch, args.mix, args.rounds):
            print(found, flush=True)


if __name__ == "__main__":
    main()
