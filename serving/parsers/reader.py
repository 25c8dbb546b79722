"""Finds the calls in an answer's text as it grows: where they begin and end is here, what they say is in calls.py.

A call is told when it is complete and known to be one; whatever is not stays text, to the letter. Blank space around calls is theirs.
"""

import re
from collections.abc import Iterator

from jaxllm.text import possible_beginning
from serving.parsers.calls import Form
from serving.parsers.parts import Part, Reader, Schemas, Text, first_of


class CallReader:
    """Texts and calls of one answer.

    _held: text that is not decided yet; inside a call, all of it. _inside: the mark that began this call, "" for an opening.
    """

    def __init__(self, form: Form, schemas: Schemas):
        self._form, self._schemas = form, schemas
        self._openings = [opening.replace("NAME", name) for opening in form.openings for name in schemas]
        self._outside_marks = (*form.marks, *form.dropped)
        self._held, self._space = "", ""
        self._inside: str | None = None
        self._at_start = bool(self._openings)
        self._called = False
        self._scan = _Scan(form)

    def feed(self, text: str) -> list[Part]:
        self._held += text
        return list(self._read(final=False))

    def finish(self) -> list[Part]:
        parts = list(self._read(final=True))
        return parts if self._called or not self._space else [*parts, Text(self._space)]

    def _read(self, final: bool) -> Iterator[Part]:
        again = True
        while again:
            again = yield from (self._read_outside(final) if self._inside is None else self._read_inside(final))

    def _read_outside(self, final: bool) -> Iterator[Part]:
        """True if there is more to be read."""
        if self._at_start:
            begun = self._held.lstrip()
            if any(begun.startswith(opening) for opening in self._openings):
                self._space = self._held[: len(self._held) - len(begun)]
                self._enter("", begun)
                return True
            if not final and any(opening.startswith(begun) for opening in self._openings):
                return False
            self._at_start = False
        if found := first_of(self._held, self._outside_marks):
            place, mark = found
            yield from self._say(self._held[:place])
            rest = self._held[place + len(mark) :]
            if mark in self._form.dropped:
                self._held = rest
            else:
                self._enter(mark, rest)
            return True
        cut = len(self._held) - (0 if final else possible_beginning(self._held, self._outside_marks))
        text, self._held = self._held[:cut], self._held[cut:]
        yield from self._say(text)
        return False

    def _enter(self, mark: str, rest: str) -> None:
        self._inside, self._held, self._at_start = mark, rest, False
        self._scan = _Scan(self._form)

    def _read_inside(self, final: bool) -> Iterator[Part]:
        """True if there is more to be read."""
        end = self._scan.end(self._held)
        if end is None and not final:
            return False
        body, rest = (self._held, "") if end is None else (self._held[: end[0]], self._held[end[1] :])
        mark, self._inside = self._inside, None
        try:
            calls, left = self._form.parse(body, self._schemas)
        except (ValueError, RecursionError):  # too many brackets
            yield from self._say(mark or "")  # no call: its mark is text, and what follows it is read again
            return True
        self._held, self._space = left + rest, ""
        self._called = True
        yield from calls
        return True

    def _say(self, text: str) -> Iterator[Part]:
        """`text`, without the blank space at its end: a call may follow."""
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            yield Text(kept)


class Chain:
    """A reader of thoughts, and one of calls for what is not thought."""

    def __init__(self, thoughts: Reader, calls: Reader):
        self._thoughts, self._calls = thoughts, calls

    def feed(self, text: str) -> list[Part]:
        return self._on(self._thoughts.feed(text))

    def finish(self) -> list[Part]:
        return [*self._on(self._thoughts.finish()), *self._calls.finish()]

    def _on(self, parts: list[Part]) -> list[Part]:
        return [out for part in parts for out in (self._calls.feed(part.text) if isinstance(part, Text) else [part])]


class _Scan:
    """Looks for the end of one call, at each character once."""

    def __init__(self, form: Form):
        self._marks = (form.end,) if form.end else form.marks
        self._taken = len(form.end) if form.end else 0  # the next call's mark is not this one's
        self._longest = max(map(len, self._marks), default=0)
        self._quoted, self._in_string = form.quoted, False
        self._place = self._counted = 0  # where to look on; up to where quotes are counted

    def end(self, text: str) -> tuple[int, int] | None:
        """(end of the call, beginning of what follows). `text` is what it was the last time, and more."""
        while found := first_of(text, self._marks, self._place):
            place, _ = found
            if not self._quoted or not self._within_string(text, place):
                return place, place + self._taken
            self._place = place + 1
        self._place = max(self._place, len(text) - self._longest + 1)
        return None

    def _within_string(self, text: str, place: int) -> bool:
        quotes = sum(1 for found in _QUOTE.finditer(text, self._counted, place) if found[0] == '"')
        self._counted = place
        self._in_string ^= bool(quotes % 2)
        return self._in_string


_QUOTE = re.compile(r'\\.|"', re.S)
