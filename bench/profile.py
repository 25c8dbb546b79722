"""Where each microsecond of a step goes: kernels by name and time, gaps between them, and what the host does meanwhile.

    jaxllm bench profile --model qwen2.5-0.5b --load-format dummy --batch 8
    jaxllm bench profile --model llama-3.1-8b --load-format dummy --workload mix

It turns the engine's own core, a step a turn, in this thread: first untraced, which gives the wall time that counts, then from the
beginning and the same steps under JAX's profiler, which slows the host and says what ran when. Host events are nested, so their times
do not add up.
"""

import argparse
import gc
import glob
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import offline, record, workloads

RAMP = 24  # steps of the workload before anything is timed
# What the profiler adds for itself, and what only waits.
_IDLE = ("ThreadpoolListener", "ThunkExecutor", "end: ")


class Span(NamedTuple):
    """One event: where it ran, its name, when it began and how long it took, in microseconds."""

    plane: str
    line: str
    name: str
    start: float
    duration: float


@dataclass(frozen=True)
class Line:
    """A name's share of a step: microseconds and runs a step, and microseconds a run."""

    name: str
    us: float
    count: float
    each: float


@dataclass(frozen=True)
class Profile:
    """A stretch of steps, timed and then traced. busy: share of the untraced wall time in which some kernel ran, a GPU in the mean."""

    steps: int
    wall_ms: float  # a step, untraced
    host_ms: float  # of it, the thread's own work: not waiting for the GPU
    traced_ms: float  # a step, from the first kernel to the last
    busy: float
    gaps: int  # pauses a step of over a microsecond
    longest_gap_us: float
    kernels_per_layer: float
    kernels: list[Line]
    host: list[Line]


def spans(folder: Path) -> list[Span]:
    """Every event of the trace in `folder`."""
    from jax.profiler import ProfileData

    [path] = glob.glob(str(folder / "**" / "*.xplane.pb"), recursive=True)
    planes = ProfileData.from_file(path).planes
    return [Span(p.name, line.name, e.name, e.start_ns / 1e3, e.duration_ns / 1e3) for p in planes for line in p.lines for e in line.events]


def lines(events: Iterable[Span], steps: int) -> list[Line]:
    """Events by name, those that take longest first."""
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        durations[event.name].append(event.duration)
    found = [Line(name, sum(d) / steps, len(d) / steps, sum(d) / len(d)) for name, d in durations.items()]
    return sorted(found, key=lambda line: -line.us)


def covered(events: Sequence[Span]) -> tuple[float, list[float]]:
    """(microseconds in which at least one event ran, the pauses between), however the events overlap."""
    busy, pauses, end = 0.0, [], None
    for event in sorted(events, key=lambda e: e.start):
        stop = event.start + event.duration
        if end is None or event.start > end:
            if end is not None:
                pauses.append(event.start - end)
            busy += event.duration
            end = stop
        elif stop > end:
            busy += stop - end
            end = stop
    return busy, pauses


def summarise(events: Sequence[Span], *, steps: int, layers: int, wall_ms: float, host_ms: float) -> Profile:
    """A trace of `steps` steps as a Profile; without a GPU in it, only its host part has numbers."""
    on_gpu: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.plane.startswith("/device:GPU") and "Stream" in event.line:
            on_gpu[event.plane].append(event)
    host = [e for e in events if e.plane.startswith("/host:CPU") and not e.name.startswith(_IDLE)]
    shares, first, pauses, length = [0.0], [], [], 0.0
    for number, plane in enumerate(sorted(on_gpu)):
        found = on_gpu[plane]
        extent = max(e.start + e.duration for e in found) - min(e.start for e in found)
        busy, between = covered(found)
        shares = [*shares[number == 0 :], min(1.0, busy / steps / (1e3 * wall_ms))]  # the profiler makes kernels a little longer
        if number == 0:
            first, pauses, length = found, [p for p in between if p > 1], extent
    kernels = [e for e in first if not e.name.startswith(("Memcpy", "Memset"))]
    return Profile(
        steps=steps,
        wall_ms=wall_ms,
        host_ms=host_ms,
        traced_ms=length / steps / 1e3,
        busy=float(np.mean(shares)),
        gaps=round(len(pauses) / steps),
        longest_gap_us=max(pauses, default=0.0),
        kernels_per_layer=len(kernels) / steps / layers,
        kernels=lines(first, steps),
        host=lines(host, steps),
    )


def table(profile: Profile, most: int) -> str:
    """The profile as text: the totals, then the longest kernels and host events."""
    total = sum(line.us for line in profile.kernels) or 1.0
    out = [f"step: {profile.wall_ms:.3f} ms, of which the host works {profile.host_ms:.3f} ms (traced: {profile.traced_ms:.3f} ms)"]
    if profile.kernels:
        count = sum(line.count for line in profile.kernels)
        out.append(
            f"GPU busy {profile.busy:.1%} of the untraced time; {count:.0f} kernels and copies a step, "
            f"{profile.kernels_per_layer:.1f} kernels a layer; traced, {profile.gaps} gaps over 1 µs a step, "
            f"the longest {profile.longest_gap_us:.0f} µs"
        )
        out += _rows("GPU", profile.kernels[:most], total)
    else:
        out.append("no GPU in this trace: only the host's part is known")
    return "\n".join(out + _rows("host (nested)", profile.host[:most], None))


def _rows(title: str, found: Sequence[Line], total: float | None) -> list[str]:
    head = f"{title:<14}{'µs a step':>11}{'runs a step':>13}{'µs a run':>10}{'share':>8}  name"
    return [head] + [
        f"{'':<14}{line.us:>11.1f}{line.count:>13.1f}{line.each:>10.2f}{(f'{line.us / total:.1%}' if total else ''):>8}  {line.name[:90]}"
        for line in found
    ]


class Turner:
    """The engine's core with a workload's requests in it, turned by hand: a turn is a step. Time in Handle.read is waiting."""

    def __init__(self, parts: Any, prompts: list[int], outputs: list[int]):
        from jaxllm.core import Core
        from jaxllm.request import Request

        self.waited = 0.0
        self._run = parts.runner.run
        self._core = Core(self, parts.plan, parts.vocab_size, parts.eos_ids, None)
        tokens = workloads.random_prompts(np.random.default_rng(0), prompts, parts.vocab_size)
        for i, (ids, output) in enumerate(zip(tokens, outputs, strict=True)):
            params = offline.GREEDY.with_defaults(max_tokens=output)
            self._core.add(Request(f"profile-{i}", tuple(ids), params), lambda output: None)
        gc.collect()
        gc.freeze()  # as Engine does

    def run(self, step):
        """What Core calls: the runner's step, its wait timed."""
        return _Timed(self._run(step), self)

    def turn(self, count: int) -> None:
        """Raises RuntimeError if the workload is over."""
        for _ in range(count):
            if not self._core.turn():
                raise RuntimeError("the workload ended before the profile did; ask for fewer --steps")

    def stop(self) -> None:
        """Ends what is left of the workload, so that another may have the runner."""
        self._core.abort_all("abort")
        while self._core.turn():
            pass

    def decoding(self, rows: int) -> None:
        """Turns until every prompt has been computed and `rows` rows decode."""
        while (flight := self._core._flight) is None or sum(not row.chunked for row in flight[0].rows) < rows:
            self.turn(1)


class _Timed:
    def __init__(self, handle, turner: Turner):
        self._handle, self._turner = handle, turner

    def draw(self):
        self._handle.draw()

    def read(self):
        start = time.perf_counter()
        result = self._handle.read()
        self._turner.waited += time.perf_counter() - start
        return result


def profile(begin: Callable[[], Turner], steps: int, layers: int) -> Profile:
    """Times `steps` turns of the workload that `begin` begins, then begins it once more and traces the same turns."""
    from jaxllm.engine import profile as trace

    turner = begin()
    turner.turn(RAMP)
    start, waited = time.perf_counter(), turner.waited
    turner.turn(steps)
    wall, wait = time.perf_counter() - start, turner.waited - waited
    turner.stop()
    turner = begin()
    turner.turn(RAMP)
    with tempfile.TemporaryDirectory() as folder:
        trace(folder)
        turner.turn(steps)
        trace(None)
        found = spans(Path(folder))
    turner.stop()
    return summarise(found, steps=steps, layers=layers, wall_ms=1e3 * wall / steps, host_ms=1e3 * (wall - wait) / steps)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="jaxllm bench profile", description="Shows where a step's time goes.")
    offline.add_engine_arguments(made)
    made.add_argument("--workload", choices=["decode", "mix"], default="decode", help="default: decode")
    made.add_argument("--batch", type=int, default=8, help="decode: rows in the batch (default: 8)")
    made.add_argument("--input-len", type=int, default=workloads.DECODE_PROMPT, help="decode: tokens of a prompt (default: 512)")
    made.add_argument("--steps", type=int, default=64, help="steps timed, and as many traced (default: 64)")
    made.add_argument("--top", type=int, default=20, help="names listed (default: 20)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all of it")
    made.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the result files")
    made.add_argument("--save", action="store_true", help="keep gpu_busy and the kernels a layer as rows")
    return made


def rows(found: Profile, common: dict[str, Any]) -> list[record.Row]:
    values = {"gpu_busy": (found.busy, "share"), "kernels_per_layer": (found.kernels_per_layer, "kernels")}
    return [{"name": name, "value": record.rounded(value), "unit": unit} | common for name, (value, unit) in values.items()]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command = record.command("jaxllm bench profile", argv, args.model, args.json, args.results)
    if args.workload == "decode":
        needed = RAMP + args.steps + 8 + args.batch  # while prompts are computed, one at least in a step, the first rows decode
        prompts, outputs = [args.input_len] * args.batch, [needed] * args.batch
    else:
        prompts, outputs = (lengths.tolist() for lengths in workloads.mix_lengths())
    longest, most = max(p + o for p, o in zip(prompts, outputs, strict=True)), min(len(prompts), workloads.MIX_ROWS)

    from jaxllm.config import EngineConfig
    from jaxllm.loading import load_engine_parts

    with workloads.model_folder(args.model) as (folder, config):
        # A turn is to be a step, so that steps can be counted.
        options: dict[str, Any] = {"num_scheduler_steps": 1} | offline.options(args, longest, most)
        parts = load_engine_parts(EngineConfig(model=folder, **options))

        import jax

        device = jax.devices()[0].device_kind
        print(f"{workloads.model_name(args.model)} on {device}, {record.versions()}\n{command}", flush=True)

        def begin() -> Turner:
            turner = Turner(parts, prompts, outputs)
            if args.workload == "decode":
                turner.decoding(args.batch)
            return turner

        found = profile(begin, args.steps, len(parts.runner.model.layers))
    common = {"model": workloads.model_name(args.model), "workload": args.workload, "dtype": args.dtype, "tp": args.tensor_parallel_size}
    common |= {"batch": args.batch, "context": args.input_len} if args.workload == "decode" else {}
    print(table(found, args.top))
    shape, machine = workloads.Shape.of(config), workloads.MACHINES.get(device)
    if args.workload == "decode" and shape and machine:
        limit = workloads.decode_limit(shape, machine, args.batch, args.tensor_parallel_size)
        print(f"limit: {1e3 * limit:.3f} ms a step (bytes to read at a context of {workloads.DECODE_CONTEXT})")
    if args.json:
        head = {"device": device, "versions": record.versions(), "command": command}
        args.json.write_text(json.dumps(head | common | asdict(found), indent=1) + "\n")
    if args.save:
        record.save("profile", device, command, rows(found, common), args.results)


if __name__ == "__main__":
    main()
