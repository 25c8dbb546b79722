"""gpt-oss' answers: messages in channels, of which analysis is thinking, final is the answer, and commentary calls tools or says why.

github.com/openai/harmony has the format. A message is <|start|>role<|channel|>name to=recipient<|message|>text, and ends with <|end|>,
<|call|> or <|return|>; the prompt ends within the first one's head.
"""

import re
from collections.abc import Iterator

from jaxllm.text import possible_beginning
from serving.parsers.calls import HARMONY, MESSAGE, RECIPIENT
from serving.parsers.parts import Part, Schemas, Text, Thought, first_of


class HarmonyReader:
    """_held: the head of a message until it is complete, then what is undecided of its text; all of it, if it is a call."""

    def __init__(self, schemas: Schemas):
        self._schemas = schemas
        self._held = ""
        self._head: str | None = None  # of the message we are in
        self._said: set[type] = set()  # kinds of parts that were told: a message after another of its kind begins a paragraph
        self._fresh = True

    def feed(self, text: str) -> list[Part]:
        self._held += text
        return list(self._read(final=False))

    def finish(self) -> list[Part]:
        return list(self._read(final=True))

    def _read(self, final: bool) -> Iterator[Part]:
        while self._head is not None or self._begun():
            found = first_of(self._held, HARMONY.marks)
            if found is None and not final:
                yield from self._undecided()
                return
            body, rest = self._held, ""
            if found:
                place, mark = found
                body, rest = self._held[:place], self._held[place + len(mark) :]
            yield from self._end(body)
            self._held, self._head, self._fresh = rest, None, True
            if not rest:
                return
        if final and self._head is None and not any(mark in self._held for mark in HARMONY.tokens):  # no message, and no beginning of one
            yield from self._tell(Text, self._held)

    def _begun(self) -> bool:
        """Takes the head of the next message, once it is complete."""
        head, found, rest = self._held.partition(MESSAGE)
        if found:
            self._head, self._held = head, rest
        return bool(found)

    def _undecided(self) -> Iterator[Part]:
        """Tells what cannot change: of a call, nothing."""
        kind = self._kind()
        if kind is not None:
            cut = len(self._held) - possible_beginning(self._held, HARMONY.marks)
            text, self._held = self._held[:cut], self._held[cut:]
            yield from self._tell(kind, text)

    def _end(self, body: str) -> Iterator[Part]:
        """The rest of a message, or all of a call."""
        assert self._head is not None
        if kind := self._kind():
            yield from self._tell(kind, body)
            return
        message = f"{self._head}{MESSAGE}{body}"
        try:
            calls, _ = HARMONY.parse(message, self._schemas)
            yield from calls
        except (ValueError, RecursionError):
            yield from self._tell(Text, message)

    def _kind(self) -> type[Text] | type[Thought] | None:
        """What this message's text is; None: a call."""
        assert self._head is not None
        if RECIPIENT.search(self._head):
            return None
        channel = re.search(r"<\|channel\|>\s*(\w+)", self._head)
        return Thought if channel and channel[1] == "analysis" else Text

    def _tell(self, kind: type[Text] | type[Thought], text: str) -> Iterator[Part]:
        if text:
            yield kind("\n\n" + text if self._fresh and kind in self._said else text)
            self._said.add(kind)
            self._fresh = False
