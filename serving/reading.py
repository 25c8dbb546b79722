"""How the answer to one request is read: with which parsers, what the engine must do for them, and the parts that come of it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic_core import from_json

from jaxllm.request import Completion, RequestError, StructuredOutputs
from serving.parsers.calls import HARMONY, JSON, Form
from serving.parsers.enforce import NoGrammar, SpecialId, answer_grammar
from serving.parsers.harmony import HarmonyReader
from serving.parsers.parts import Call, Part, Reader, Text, Thought, joined
from serving.parsers.reader import CallReader, Chain
from serving.parsers.table import Parsers, Place, Tags
from serving.parsers.thinking import ThoughtReader
from serving.parsers.written import WrittenReader
from serving.tools import Tools

_PROMPT_END = 16  # tokens in which the prompt's last tag is, with the blank space around it


@dataclass(frozen=True)
class Reading:
    """reader: makes a fresh one for each choice. params: what the request's SamplingParams must say."""

    reader: Callable[[], Reader]
    params: dict[str, Any]
    one: bool
    thinks: bool  # are thoughts told from the rest?


async def reading(
    tokenizer: Any, parsers: Parsers, tools: Tools, prompt_ids: Sequence[int], wanted: StructuredOutputs | None = None
) -> Reading | None:
    """None: the answer is text, and needs no reading. wanted: the form that the answer must have, where it is not a call.

    Raises RequestError for tools of which this server cannot read, or enforce, the calls.
    """
    whole = wanted is not None and wanted.grammar is not None  # it says all of the answer: nothing is thought, nothing called
    if whole and tools.offered:
        raise RequestError("a grammar is of the whole answer, in which `tools` have no place: leave one of them out", "structured_outputs")
    form, tags, place = _form(parsers, tools), parsers.tags, "after"
    if isinstance(tags, Tags):
        place = tags.place(tokenizer.decode(prompt_ids[-_PROMPT_END:], skip_special_tokens=False))
        tags = None if place == "after" else tags
    reader = None if whole else _reader(form, tags, place, tools)
    if reader is None:
        return None
    marks = {*(form.tokens if form else ()), *(tags.tokens if tags else ())}
    shown = sorted(found for mark in marks if (found := tokenizer.special_id(mark)) is not None)
    params: dict[str, Any] = {"shown_special_token_ids": shown}
    if tools.enforced or tools.strict or wanted is not None:
        thinking = tags if isinstance(tags, Tags) else None
        params["structured_outputs"] = await asyncio.to_thread(_enforced, form, tools, thinking, place, wanted, tokenizer.special_id)
    return Reading(reader, params, tools.one, tags is not None)


def _form(parsers: Parsers, tools: Tools) -> Form | None:
    """What calls look like; None: there are none to be read."""
    form = parsers.form
    if form is HARMONY:
        return form
    if not tools.offered:
        return None
    if tools.enforced:
        return form if form is not None and form.written else JSON
    if form is None:
        raise RequestError(
            "`tools` with tool_choice auto needs a parser for this model's calls, and its chat template has no form that is known: send "
            "tool_choice required or a function's name, or start the server with --tool-call-parser",
            "tools",
        )
    return form


def _reader(form: Form | None, tags: Tags | Form | None, place: Place, tools: Tools) -> Callable[[], Reader] | None:
    schemas = tools.schemas
    if form is HARMONY:
        return lambda: HarmonyReader(schemas)
    calls = None if form is None else partial(WrittenReader, form) if tools.enforced else partial(CallReader, form, schemas)
    if not isinstance(tags, Tags):
        return calls
    if calls is None:
        return lambda: ThoughtReader(tags, place)
    return lambda: Chain(ThoughtReader(tags, place), calls())


def _enforced(
    form: Form | None, tools: Tools, tags: Tags | None, place: Place, wanted: StructuredOutputs | None, special_id: SpecialId
) -> StructuredOutputs:
    try:
        return StructuredOutputs(grammar=answer_grammar(form, tools, tags, place, wanted, special_id))
    except NoGrammar:
        what = "`strict`" if wanted is None else "A form of the answer"
        raise RequestError(
            f"{what} cannot be kept to with tool_choice auto in the form in which this model writes calls: leave it out, or send "
            "tool_choice required or a function's name",
            "tools",
        ) from None


class ChoiceReader:
    """One choice's text into parts. What it thought is kept, to be counted."""

    def __init__(self, reading: Reading):
        self._reader, self._one = reading.reader(), reading.one
        self._thoughts: list[str] = []
        self.calls = 0

    def read(self, text: str, ended: bool) -> list[Part]:
        """The parts that this much more text makes certain; all of them, if it has ended. Calls beyond the one that was asked for go."""
        parts = self._reader.feed(text)
        if ended:
            parts += self._reader.finish()
        kept = []
        for part in parts:
            if isinstance(part, Thought):
                self._thoughts.append(part.text)
            if isinstance(part, Call):
                if self._one and self.calls:
                    continue
                self.calls += 1
            kept.append(part)
        return joined(kept)

    def thought_tokens(self, tokenizer: Any) -> int:
        """The tokens of what was thought, counted by spelling it: tags are not among them."""
        return len(tokenizer.encode("".join(self._thoughts), add_special_tokens=False)) if self._thoughts else 0


def parts_of(reader: ChoiceReader | None, completion: Completion) -> list[Part]:
    """The parts that a completion makes certain; without a reader, its text."""
    if reader is None:
        return [Text(completion.text)] if completion.text else []
    return reader.read(completion.text, completion.finish_reason is not None)


def object_of(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object: of arguments that were cut short, as much as there is."""
    made = from_json(arguments or "{}", allow_partial="trailing-strings")
    return made if isinstance(made, dict) else {}
