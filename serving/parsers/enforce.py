"""Grammars of answers that must call tools, or call them only as their schemas say, in the form in which the model writes calls.

The text is llguidance's, for SamplingParams.structured_outputs. A mark that is a special token stands there by its id (`<[7]>`): no text
can be taken for it. A mark that is text ends the free text before it as soon as it is complete (`suffix`).
"""

import json
import re
from collections.abc import Callable
from typing import Any

from jaxllm.grammar import short, written
from jaxllm.request import RequestError, StructuredOutputs
from serving.parsers.calls import HARMONY, Form
from serving.parsers.table import Place, Tags
from serving.tools import Tools

SpecialId = Callable[[str], int | None]
_ANY = r"/(.|\n)*/"
_SPACE = r"/\n{0,2}/"  # between a thought and what follows


class NoGrammar(Exception):
    """Calls of this form cannot be enforced."""


def call_grammar(form: Form, tools: Tools, tags: Tags | None, place: Place, special_id: SpecialId) -> str:
    """tags, place: what may be thought before. Raises NoGrammar, and RequestError for parameters that cannot be enforced."""
    if form.written is None:
        raise NoGrammar
    made = _Grammar((*form.tokens, *(tags.tokens if tags else ())), special_id)
    before, call, between, after = form.written
    more = "" if tools.one or between is None else f"({made.spell(between)} call)*"
    begin = made.spell(before) if tools.enforced else _free(made, form, before)
    made.rules["calls"] = f"{begin} call {more} {made.spell(after)}"
    _add_calls(made, call, tools)
    made.rules["start"] = f"{_thought(made, form, tags, place)} {'calls' if tools.enforced else 'calls? text?'}"
    return "\n".join(f"{name}: {rule}" for name, rule in made.rules.items())


def _free(made: "_Grammar", form: Form, before: str) -> str:
    """Any text, up to and with the beginning of the calls. Only a mark tells a call from text."""
    mark = next((mark for mark in (*form.marks, *form.dropped) if before.startswith(mark)), None)
    if mark is None:
        raise NoGrammar
    made.rules["text"] = made.without((*form.marks, *form.dropped))
    return f"{made.up_to(mark)} {made.spell(before[len(mark) :])}"


def _add_calls(made: "_Grammar", call: str, tools: Tools) -> None:
    strict = {tool.name for tool in tools.offered if tool.strict or tools.enforced}
    names = []
    for i, (name, schema) in enumerate(tools.schemas.items()):
        head, tail = call.replace("NAME", name).split("ARGUMENTS")
        made.rules[f"arguments_{i}"] = f"%json {_schema(name, schema if name in strict else {'type': 'object'})}"
        made.rules[f"call_{i}"] = f"{made.spell(head)} arguments_{i} {made.spell(tail)}"
        names.append(f"call_{i}")
    made.rules["call"] = " | ".join(names)


def _schema(name: str, schema: dict[str, Any]) -> str:
    """A tool's parameters as structured_outputs takes a schema, with what it refuses and how much blank space it allows."""
    from llguidance import LLMatcher

    try:
        made = written(StructuredOutputs(json=schema))
        if fault := LLMatcher.validate_grammar(made):
            raise ValueError(fault)
    except ValueError as error:
        raise RequestError(f"`tools`: the parameters of {name} cannot be enforced: {short(str(error))}", "tools") from None
    return json.dumps(json.loads(made)["grammars"][0]["json_schema"])


def _thought(made: "_Grammar", form: Form, tags: Tags | None, place: Place) -> str:
    """What a model may think before it calls."""
    if form is HARMONY:
        return f"({made.spell('<|channel|>analysis<|message|>')} {made.up_to('<|end|>')} {made.spell('<|start|>assistant')})?"
    if tags is None or place == "after":
        return ""
    if place == "within":
        return f"{made.up_to(tags.end)} {_SPACE}"
    return f"({made.spell(tags.start)} {made.up_to(tags.end)} {_SPACE})?"


class _Grammar:
    """rules: name to right side, in llguidance's words."""

    def __init__(self, marks: tuple[str, ...], special_id: SpecialId):
        self.rules: dict[str, str] = {}
        self._marks = re.compile("(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")") if marks else None
        self._special_id = special_id

    def spell(self, text: str) -> str:
        """The terminals of a text: marks that are special tokens by their ids, all else as strings."""
        pieces = self._marks.split(text) if self._marks else [text]
        return " ".join(self._terminal(piece) for piece in pieces if piece)

    def _terminal(self, piece: str) -> str:
        token = self._special_id(piece)
        return json.dumps(piece, ensure_ascii=False) if token is None else f"<[{token}]>"

    def up_to(self, mark: str) -> str:
        """Any text, and the mark that ends it."""
        token = self._special_id(mark)
        if token is not None:
            return f"{_ANY} <[{token}]>"
        name = f"up_to_{len(self.rules)}"
        self.rules[f"{name}[suffix={json.dumps(mark, ensure_ascii=False)}]"] = _ANY
        return name

    def without(self, marks: tuple[str, ...]) -> str:
        """Any text that has none of the marks: what is a special token cannot be in a text."""
        written = [re.escape(mark).replace("/", "\\/") for mark in marks if self._special_id(mark) is None]
        self.rules["TEXT"] = r"/(.|\n)+/" + (rf" & ~/(.|\n)*({'|'.join(written)})(.|\n)*/" if written else "")
        return "TEXT"
