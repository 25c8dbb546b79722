"""The two files of a batch, in OpenAI's formats: what is asked, a request a line, and what was answered so far, an answer a line.

The answers are the only record of how far a run has come. They are appended one whole line at a time, so that a run which was killed, at
whatever moment, leaves at most one line half written; the next run cuts that one off and answers the rest.
"""

import fcntl
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import uuid4

import msgspec

from jaxllm.request import ConfigError

SHOWN = 5  # duplicates that are named


class Asked(msgspec.Struct):
    """A line of the input."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Named(msgspec.Struct):
    custom_id: Any = None


class _Where(msgspec.Struct):
    line: int | None = None


class _Answered(msgspec.Struct):
    custom_id: str | None
    error: _Where | None


class BadLine(Exception):
    """A line of the input that is no request; says why."""


@dataclass(frozen=True)
class Entry:
    """Where a line of the input is. custom_id: None if it has none that can be read."""

    number: int
    offset: int
    custom_id: str | None

    @property
    def key(self) -> str | int:
        """What its answer is found by."""
        return self.number if self.custom_id is None else self.custom_id


@contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """The file, or with "-" all of stdin, so that it can be read twice. Raises ConfigError."""
    if name == "-":
        with tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(sys.stdin.buffer, spool)
            yield spool
        return
    try:
        file = open(name, "rb")  # noqa: SIM115 - closed by the block below; only a failure to open is told as one
    except OSError as error:
        raise ConfigError(f"The input file {name} cannot be read: {error.strerror}") from None
    with file:
        yield file


def index(file: BinaryIO) -> list[Entry]:
    """Every line that is not empty. Raises ConfigError for a custom_id that stands on two."""
    file.seek(0)
    entries, offset = [], 0
    for number, line in enumerate(file, 1):
        if line.strip():
            entries.append(Entry(number, offset, _custom_id(line)))
        offset += len(line)
    _refuse_duplicates(entries)
    return entries


def _custom_id(line: bytes) -> str | None:
    try:
        found = msgspec.json.decode(line, type=_Named).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return found if isinstance(found, str) else None


def _refuse_duplicates(entries: Sequence[Entry]) -> None:
    lines: dict[str, list[int]] = {}
    for entry in entries:
        if entry.custom_id is not None:
            lines.setdefault(entry.custom_id, []).append(entry.number)
    twice = [(name, numbers) for name, numbers in lines.items() if len(numbers) > 1]
    if twice:
        said = "; ".join(f"{name!r} on lines {', '.join(map(str, numbers))}" for name, numbers in twice[:SHOWN])
        more = f"; and {len(twice) - SHOWN} more" if len(twice) > SHOWN else ""
        raise ConfigError(f"A custom_id must stand on one line only, or its answers could not be told apart: {said}{more}")


def read(file: BinaryIO, entry: Entry) -> Asked:
    """The request on that line. Raises BadLine."""
    file.seek(entry.offset)
    try:
        asked = msgspec.json.decode(file.readline(), type=Asked)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadLine(f"Line {entry.number} is no request with custom_id, method, url and body: {error}") from None
    if not asked.url.startswith("/") or asked.url.startswith("//"):
        raise BadLine(f"Line {entry.number}: url must be a route, such as /v1/chat/completions, but it is {asked.url!r}")
    if _streams(asked.body):
        raise BadLine(f'Line {entry.number}: a batch\'s answers come whole, so its body must not say "stream": true')
    return asked


def _streams(body: msgspec.Raw) -> bool:
    found = msgspec.json.decode(body)
    return isinstance(found, dict) and found.get("stream") is True


class Answers:
    """The output file, held by one run at a time. `done`: the keys of entries that it has answers to."""

    def __init__(self, name: str):
        """Raises ConfigError for a file that cannot be had, or that holds something else."""
        try:
            Path(name).touch()
            self._file = open(name, "r+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise ConfigError(f"The output file {name} cannot be written: {error.strerror}") from None
        self._name, self.done = name, set[str | int]()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however that ends
            self._read()
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"Another run is writing {name}: wait for it, or name another output file") from None
        except ConfigError:
            self._file.close()
            raise

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises ConfigError if there are answers to something else."""
        if strange := self.done - {entry.key for entry in entries}:
            raise ConfigError(
                f"{self._name} holds {len(strange)} answers to requests that the input has not, such as {sorted(map(repr, strange))[0]}: "
                "it belongs to another batch; name another output file"
            )

    def answer(self, custom_id: str, status: int, request_id: str, body: Any) -> None:
        self._append(custom_id, {"status_code": status, "request_id": request_id, "body": body}, None)

    def refuse(self, entry: Entry, why: str) -> None:
        self._append(entry.custom_id, None, {"code": "invalid_line", "message": why, "param": None, "line": entry.number})

    def _read(self) -> None:
        whole = 0
        with open(self._name, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break  # a killed run was writing it
                try:
                    found = msgspec.json.decode(line, type=_Answered)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    raise ConfigError(f"Line {number} of {self._name} is no answer of a batch: name another output file") from None
                self.done.add(found.custom_id if found.custom_id is not None else _line(found))
                whole += len(line)
        self._file.truncate(whole)
        self._file.seek(whole)

    def _append(self, custom_id: str | None, response: dict | None, error: dict | None) -> None:
        line = msgspec.json.encode({"id": f"batch_req_{uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}) + b"\n"
        while line:
            line = line[self._file.write(line) :]


def _line(found: _Answered) -> int:
    return -1 if found.error is None or found.error.line is None else found.error.line
