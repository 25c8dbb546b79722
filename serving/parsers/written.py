"""Reads calls that a grammar has enforced: the form is certain, so that arguments can be told as they come, and not once they are complete.

The text is form.written, nothing else: before, call, between, call, ..., after. An answer that ends too soon leaves its last call with what
its arguments have, as OpenAI's do.
"""

import re
from collections.abc import Iterator

from serving.parsers.calls import Form
from serving.parsers.parts import Call, More, Part, Text


class WrittenReader:
    """_held: what was read and not told. _within: are we within a call's arguments?"""

    def __init__(self, form: Form):
        assert form.written is not None
        before, call, between, after = form.written
        head, tail = call.split("ARGUMENTS")
        self._first = _pattern(before + head)
        self._next = self._first if between is None else _pattern(tail + between + head)
        self._end, self._again = tail + after, tail + (between or after)
        self._held, self._within, self._called = "", False, False
        self._object = _Object()

    def feed(self, text: str) -> list[Part]:
        self._held += text
        return list(self._read())

    def finish(self) -> list[Part]:
        """What is left is the end of the form, if it is as it should be; anything else is text."""
        left = self._held
        if self._called and not self._within:
            left = "" if self._end.startswith(left) else left.removeprefix(self._again)
        return [Text(left)] if left else []

    def _read(self) -> Iterator[Part]:
        while self._held:
            if self._within:
                length = self._object.take(self._held)
                self._within = not self._object.complete
                text, self._held = self._held[:length], self._held[length:]
                yield More(text)
            elif found := (self._next if self._called else self._first).match(self._held):
                self._held, self._within, self._called = self._held[found.end() :], True, True
                self._object = _Object()
                yield Call(next(name for name in found.groups() if name), "")
            else:
                return


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("".join(r"([\w.-]+)" if piece == "NAME" else re.escape(piece) for piece in re.split("(NAME)", text)))


class _Object:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self):
        self.complete = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def take(self, text: str) -> int:
        """How many of these characters belong to it."""
        start = 1 if self._escaped else 0
        self._escaped = False
        for found in _MARK.finditer(text, start):
            mark = found[0]
            if mark == '"':
                self._in_string = not self._in_string
            elif mark[0] == "\\":
                self._escaped = len(mark) == 1  # what it escapes is still to come
            elif not self._in_string:
                self._depth += 1 if mark in "{[" else -1
                if not self._depth:
                    self.complete = True
                    return found.end()
        return len(text)


_MARK = re.compile(r'["{}\[\]]|\\.?', re.S)
