"""Where a model's thinking ends and its answer begins: between tags, of which the chat template may have written the first.

Blank space around a thought belongs to its tags. What is between later tags is text: a model thinks before it answers.
"""

from collections.abc import Iterator

from jaxllm.text import possible_beginning
from serving.parsers.parts import Part, Text, Thought
from serving.parsers.table import Place, Tags


class ThoughtReader:
    def __init__(self, tags: Tags, place: Place):
        self._tags = tags
        self._place: Place = place
        self._held = ""
        self._fresh = self._place != "after"  # is blank space still the tags' own?
        self._may_open = self._fresh  # may the start tag still come?

    def feed(self, text: str) -> list[Part]:
        self._held += text
        return list(self._read(final=False))

    def finish(self) -> list[Part]:
        return list(self._read(final=True))

    def _read(self, final: bool) -> Iterator[Part]:
        if self._may_open and not self._opened(final):
            return
        if self._place == "within":
            yield from self._read_thought(final)
        if self._place == "after":
            yield from self._read_text()

    def _opened(self, final: bool) -> bool:
        """False while it is open whether the answer begins with the start tag."""
        begun = self._held.lstrip()
        if begun.startswith(self._tags.start):
            self._place, self._held = "within", begun[len(self._tags.start) :]
        elif not final and self._tags.start.startswith(begun):
            return False
        elif self._place == "before":
            self._place, self._fresh = "after", False
        self._may_open = False
        return True

    def _read_thought(self, final: bool) -> Iterator[Part]:
        if self._fresh:
            self._held = self._held.lstrip()
        thought, ended, rest = self._held.partition(self._tags.end)
        if ended:
            self._place, self._held, self._fresh = "after", rest, True
            thought = thought.rstrip()
        else:
            cut = len(thought) - (0 if final else possible_beginning(thought, (self._tags.end,)))
            cut = len(thought[:cut].rstrip())
            thought, self._held = thought[:cut], thought[cut:]
            self._fresh = self._fresh and not thought
        if thought:
            yield Thought(thought)

    def _read_text(self) -> Iterator[Part]:
        text = self._held.lstrip() if self._fresh else self._held
        self._held = ""
        if text:
            self._fresh = False
            yield Text(text)
