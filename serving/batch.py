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


BATCH = {
    "Batch": [
        Flag("input_file", "Requests, one a line: custom_id, method, url and body; - is stdin.", metavar="FILE", short="-i"),
        Flag("output_file", "Where answers go; a run that finds some there goes on after them.", metavar="FILE", short="-o"),
        Flag("max_concurrency", "Most requests under way at once.", whole(1), "COUNT", "twice what the engine runs at once"),
    ]
}
# Of jaxllm serve's own flags, those that say how requests and answers are read.
_STRICT = [flag for group in options.SERVER.values() for flag in group if flag.name == "strict"]
READING = {"Reading": [*_STRICT, *options.SERVER["Tools and reasoning"]]}


def batch_parser() -> Parser:
    """`jaxllm run-batch`: its files, then flags of ServerOptions and those of EngineConfig."""
    parser = Parser(
        prog="jaxllm run-batch",
        usage="jaxllm run-batch -i FILE -o FILE [options]",
        description="Answer every request of a file in OpenAI's batch format, on any route of jaxllm serve that takes a POST. A run that "
        "was stopped or killed goes on when it is started again with the same files.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options by name, such as max-model-len: 8k. Default: none.")
    add_flags(parser, BATCH, BatchOptions)
    add_flags(parser, READING, ServerOptions)
    add_flags(parser, options.ENGINE, EngineConfig)
    return parser


def read_options(argv: Sequence[str]) -> tuple[EngineConfig, ServerOptions, BatchOptions]:
    """What `argv`, the --config file and the environment ask for. Exits with a sentence for what it refuses."""
    parser = batch_parser()
    args = parser.parse(argv)
    options.refuse_remote_code(parser, args)
    if args.input_file is None or args.output_file in (None, "-"):
        parser.error("-i FILE and -o FILE must be given: the output file is also how a run knows what is done")
    if Path(args.input_file).resolve() == Path(args.output_file).resolve():
        parser.error(f"{args.input_file} cannot be input and output")
    reading = {flag.name: getattr(args, flag.name) for group in READING.values() for flag in group}
    served = ServerOptions(max_body_bytes=UNLIMITED, **reading)
    return EngineConfig(**values(args, EngineConfig)), served, BatchOptions(**values(args, BatchOptions))


def main(argv: Sequence[str], make_engine: "Callable[[EngineConfig], EngineLike]") -> int:
    """Runs the batch. Returns 0 when every line has its answer, be it an error; 1 with a sentence when it had to stop before."""
    config, served, batch = read_options(argv)
    assert batch.input_file is not None and batch.output_file is not None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, while the model loads
    try:
        with open_input(batch.input_file) as file, Answers(batch.output_file) as answers:
            entries = index(file)
            answers.check(entries)
            todo = [entry for entry in entries if entry.key not in answers.done]
            counts: Counter[str] = Counter(before=len(entries) - len(todo))
            if todo:
                engine = make_engine(config)
                try:
                    asyncio.run(_Run(engine, served, file, answers, counts).answer(todo, batch.max_concurrency))
                finally:
                    engine.close()
    except JaxllmError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("jaxllm: stopped; start it again with the same files and it goes on from here", file=sys.stderr)
        return 1
    print(
        f"{len(entries)} requests: {counts['answered']} answered, {counts['errors']} with an error, {counts['before']} answered before; "
        f"in {batch.output_file}"
    )
    return 0


class _Run:
    """One engine's part in a batch. `counts` is the caller's."""

    def __init__(self, engine: "EngineLike", served: ServerOptions, file: BinaryIO, answers: Answers, counts: Counter[str]):
        self._engine, self._served, self._file, self._answers, self._counts = engine, served, file, answers, counts

    async def answer(self, todo: Sequence[Entry], at_once: int | None) -> None:
        """Every entry. Raises EngineDeadError, ConfigError if an answer cannot be written, CancelledError at SIGTERM."""
        from serving.app import build_app

        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        app = build_app(self._engine, self._served, getattr(self._engine, "memory", None))
        before = self._counts["before"]
        bar = tqdm(total=len(todo) + before, initial=before, unit=" requests", disable=None)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://batch", timeout=None)
        with bar:
            async with app.router.lifespan_context(app), client:
                await self._share(iter(todo), min(len(todo), at_once or 2 * (self._engine.config.max_num_seqs or ROWS)), client, bar)

    async def _share(self, todo: Iterator[Entry], count: int, client: httpx.AsyncClient, bar: tqdm) -> None:
        """Lets `count` tasks take one entry after another. The first error ends all."""

        async def work() -> None:
            for entry in todo:
                self._counts["errors" if await self._failed(client, entry) else "answered"] += 1
                bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(work())
        except* JaxllmError as errors:
            raise errors.exceptions[0] from None
        except* OSError as errors:
            raise ConfigError(f"An answer could not be written: {errors.exceptions[0]}; start again when it can") from None

    async def _failed(self, client: httpx.AsyncClient, entry: Entry) -> bool:
        """Answers it; whether with an error."""
        try:
            asked = read(self._file, entry)
        except BadLine as error:
            self._answers.refuse(entry, str(error))
            return True
        response = await self._post(client, asked.url, bytes(asked.body))
        self._answers.answer(asked.custom_id, response.status_code, response.headers["x-request-id"], _body(response))
        return response.status_code != 200

    async def _post(self, client: httpx.AsyncClient, url: str, body: bytes) -> httpx.Response:
        while True:
            response = await client.post(url, content=body, headers={"content-type": "application/json"})
            if not self._engine.healthy:
                raise EngineDeadError("the engine has stopped; what was answered is kept, and the same command goes on from there")
            if response.status_code != 429:
                return response
            await asyncio.sleep(float(response.headers["retry-after"]))  # --max-num-queued-reqs: no answer, only a place to wait


def _body(response: httpx.Response) -> Any:
    try:
        return msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return response.text
