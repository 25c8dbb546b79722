"""`jaxllm run-batch`: the requests of an OpenAI batch file, through the same application that `jaxllm serve` serves, without a socket.

A run may be stopped or killed at any time, and goes on where it was when it is started again with the same files.
"""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import httpx
import msgspec
from tqdm import tqdm

from jaxllm.config import EngineConfig
from jaxllm.request import ConfigError, EngineDeadError, JaxllmError
from serving import options
from serving.batch_files import Answers, BadLine, Entry, index, open_input, read
from serving.flags import Flag, Parser, add_flags, values, whole
from serving.options import ServerOptions

if TYPE_CHECKING:
    from serving.protocol import EngineLike

ROWS = 1024  # the most sequences an engine runs at once unless told otherwise
UNLIMITED = 2**62  # bytes of a body: the file is the user's own


@dataclass(frozen=True)
class BatchOptions:
    input_file: str | None = None
    output_file: str | None = None
    max_concurrency: int | None = None
    strict: bool = False


BATCH = {
    "Batch": [
        Flag("input_file", "Requests, one a line: custom_id, method, url and body; - is stdin.", metavar="FILE", short="-i"),
        Flag("output_file", "Where answers go; a run that finds some there goes on after them.", metavar="FILE", short="-o"),
        Flag("max_concurrency", "Most requests under way at once.", whole(1), "COUNT", "twice what the engine runs at once"),
        Flag("strict", "Refuse unknown fields in place of ignoring them.", "switch"),
    ]
}


def batch_parser() -> Parser:
    """`jaxllm run-batch`: its files, then the flags of EngineConfig."""
    parser = Parser(
        prog="jaxllm run-batch",
        usage="jaxllm run-batch -i FILE -o FILE [options]",
        description="Answer every request of a file in OpenAI's batch format, on any route of jaxllm serve that takes a POST. A run that "
        "was stopped or killed goes on when it is started again with the same files.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options by name, such as max-model-len: 8k. Default: none.")
    add_flags(parser, BATCH, BatchOptions)
    add_flags(parser, options.ENGINE, EngineConfig)
    return parser


def read_options(argv: Sequence[str]) -> tuple[EngineConfig, BatchOptions]:
    """What `argv`, the --config file and the environment ask for. Exits with a sentence for what it refuses."""
    parser = batch_parser()
    args = parser.parse(argv)
    options.refuse_remote_code(parser, args)
    if args.input_file is None or args.output_file in (None, "-"):
        parser.error("-i FILE and -o FILE must be given: the output file is also how a run knows what is done")
    if Path(args.input_file).resolve() == Path(args.output_file).resolve():
        parser.error(f"{args.input_file} cannot be input and output")
    return EngineConfig(**values(args, EngineConfig)), BatchOptions(**values(args, BatchOptions))


def main(argv: Sequence[str], make_engine: "Callable[[EngineConfig], EngineLike]") -> int:
    """Runs the batch. Returns 0 when every line has its answer, be it an error; 1 with a sentence when it had to stop before."""
    config, batch = read_options(argv)
    assert batch.input_file is not None and batch.output_file is not None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, while the model loads
    try:
        with open_input(batch.input_file) as file, Answers(batch.output_file) as answers:
            entries = index(file)
            answers.check(entries)
            _run(config, batch, make_engine, file, entries, answers)
    except JaxllmError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("jaxllm: stopped; start it again with the same files and it goes on from here", file=sys.stderr)
        return 1
    return 0


def _run(config: EngineConfig, batch: BatchOptions, make_engine: Callable, file: BinaryIO, entries: list[Entry], answers: Answers) -> None:
    todo = [entry for entry in entries if entry.key not in answers.done]
    counts: Counter[str] = Counter(before=len(entries) - len(todo))
    if todo:
        engine = make_engine(config)
        try:
            asyncio.run(_answer_all(engine, batch, file, todo, answers, counts))
        finally:
            engine.close()
    print(
        f"{len(entries)} requests: {counts['answered']} answered, {counts['errors']} with an error, {counts['before']} answered before; "
        f"in {batch.output_file}"
    )


async def _answer_all(
    engine: "EngineLike", batch: BatchOptions, file: BinaryIO, todo: list[Entry], answers: Answers, counts: Counter[str]
) -> None:
    from serving.app import build_app

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    app = build_app(engine, ServerOptions(strict=batch.strict, max_body_bytes=UNLIMITED), getattr(engine, "memory", None))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    rows = batch.max_concurrency or 2 * (engine.config.max_num_seqs or ROWS)
    bar = tqdm(total=len(todo) + counts["before"], initial=counts["before"], unit=" requests", disable=None)
    with bar:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client,
        ):
            work = iter(todo)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(rows, len(todo))):
                        group.create_task(_Worker(engine, client, file, answers, counts, bar).work(work))
            except* JaxllmError as errors:
                raise errors.exceptions[0] from None


@dataclass(frozen=True)
class _Worker:
    """Answers one request after another."""

    engine: "EngineLike"
    client: httpx.AsyncClient
    file: BinaryIO
    answers: Answers
    counts: Counter[str]
    bar: tqdm

    async def work(self, todo: Iterator[Entry]) -> None:
        """Until `todo`, which all workers share, is empty. Raises EngineDeadError, ConfigError if the answer cannot be written."""
        for entry in todo:
            try:
                failed = await self._answer(entry)
            except OSError as error:
                raise ConfigError(f"An answer could not be written: {error.strerror}; start again when it can") from None
            self.counts["errors" if failed else "answered"] += 1
            self.bar.update()

    async def _answer(self, entry: Entry) -> bool:
        """Whether it failed."""
        try:
            asked = read(self.file, entry)
        except BadLine as error:
            self.answers.refuse(entry, str(error))
            return True
        response = await self._post(asked.url, bytes(asked.body))
        self.answers.answer(asked.custom_id, response.status_code, response.headers["x-request-id"], _body(response))
        return response.status_code != 200

    async def _post(self, url: str, body: bytes) -> httpx.Response:
        while True:
            response = await self.client.post(url, content=body, headers={"content-type": "application/json"})
            if not self.engine.healthy:
                raise EngineDeadError("the engine has stopped; what was answered is kept, and the same command goes on from there")
            if response.status_code != 429:
                return response
            await asyncio.sleep(float(response.headers["retry-after"]))  # --max-num-queued-reqs: no answer, only a place to wait


def _body(response: httpx.Response) -> Any:
    try:
        return msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return response.text
