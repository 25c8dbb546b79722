"""What an answer's text turns out to be, once it is read: thoughts, words for the user, calls of tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Thought:
    text: str


@dataclass(frozen=True)
class Call:
    """arguments: a JSON object as text, or its beginning, on which More goes on."""

    name: str
    arguments: str


@dataclass(frozen=True)
class More:
    """More of the arguments of the call before."""

    arguments: str


Part = Text | Thought | Call | More
Schemas = Mapping[str, Mapping[str, Any]]  # the tools there are: name to the JSON schema of its parameters


class Reader(Protocol):
    """Reads one answer. However its text is cut into pieces, the parts are the same, once neighbours of a kind are joined."""

    def feed(self, text: str) -> list[Part]:
        """The parts that this much more text makes certain."""
        ...

    def finish(self) -> list[Part]:
        """What was held back; call it once, after the last text."""
        ...


def joined(parts: Sequence[Part]) -> list[Part]:
    """`parts` with neighbours that go on from each other put together."""
    if len(parts) < 2:
        return list(parts)
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + part.text)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            out[-1] = Thought(last.text + part.text)
        elif isinstance(part, More) and isinstance(last, Call):
            out[-1] = Call(last.name, last.arguments + part.arguments)
        elif isinstance(part, More) and isinstance(last, More):
            out[-1] = More(last.arguments + part.arguments)
        else:
            out.append(part)
    return out


def first_of(text: str, marks: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """(place, mark) of the mark that begins first in `text`."""
    found = [(place, mark) for mark in marks if (place := text.find(mark, start)) >= 0]
    return min(found) if found else None
