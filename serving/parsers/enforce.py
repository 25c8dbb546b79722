"""Grammars of answers that must call tools, call them only as their schemas say, or have a form of their own, in a model's own marks.

The text is llguidance's, for SamplingParams.structured_outputs. A mark that is a special token stands there by its id (`<[7]>`): no text
can be taken for it. A mark that is text ends the free text before it as soon as it is complete (`suffix`).
"""

import json
import re
from collections.abc import Callable
from typing import Any

from jaxllm.grammar import schema_in_grammar
from jaxllm.request import RequestError, StructuredOutputs
from serving.parsers.calls import HARMONY, Form
from serving.parsers.table import Place, Tags
from serving.tools import Tools

SpecialId = Callable[[str], int | None]
_ANY = r"/(.|\n)*/"
_SPACE = r"/\n{0,2}/"  # between a thought and what follows


class NoGrammar(Exception):
    """It cannot be said in a grammar."""


def answer_grammar(
    form: Form | None, tools: Tools, tags: Tags | None, place: Place, wanted: StructuredOutputs | None, special_id: SpecialId
) -> str:
    """What an answer may be: calls of `tools` in this form, or, unless there must be a call, what is `wanted` or any text.

    tags, place: what may be thought before. Raises NoGrammar, and RequestError for parameters that cannot be enforced.
    """
    made = _Grammar((*(form.tokens if form else ()), *(tags.tokens if tags else ())), special_id)
    thought = _thought(made, form, tags, place)
    if tools.enforced or (wanted is None and form is not None):
        _add_calls(made, form, tools, free=not tools.enforced)
        made.rules["start"] = f"{thought} {'calls' if tools.enforced else 'calls? text?'}"
        return made.text()
    if wanted is None:
        raise NoGrammar
    answer = f"{made.spell('<|channel|>final<|message|>')} answer" if form is HARMONY else "answer"
    made.rules["answer"] = _wanted(wanted)
    if tools.offered:
        _add_calls(made, form, tools, free=False)
        answer = f"(calls | {answer})"
    made.rules["start"] = f"{thought} {answer}"
    return made.text()


def _add_calls(made: "_Grammar", form: Form | None, tools: Tools, *, free: bool) -> None:
    """The rule `calls`. free: any text may come before, and the rule `text` after them."""
    if form is None or form.written is None:
        raise NoGrammar
    before, call, between, after = form.written
    more = "" if tools.one or between is None else f"({made.spell(between)} call)*"
    begin = _free(made, form, before) if free else made.spell(before)
    made.rules["calls"] = f"{begin} call {more} {made.spell(after)}"
    names, strict = [], {tool.name for tool in tools.offered if tool.strict or tools.enforced}
    for i, (name, schema) in enumerate(tools.schemas.items()):
        head, tail = call.replace("NAME", name).split("ARGUMENTS")
        rule = _schema(schema, f"`tools`: the parameters of {name} cannot be enforced", "tools") if name in strict else _ANY_OBJECT
        made.rules[f"arguments_{i}"] = rule
        made.rules[f"call_{i}"] = f"{made.spell(head)} arguments_{i} {made.spell(tail)}"
        names.append(f"call_{i}")
    made.rules["call"] = " | ".join(names)


def _free(made: "_Grammar", form: Form, before: str) -> str:
    """Any text, up to and with the beginning of the calls. Only a mark tells a call from text."""
    mark = next((mark for mark in (*form.marks, *form.dropped) if before.startswith(mark)), None)
    if mark is None:
        raise NoGrammar
    made.rules["text"] = made.without((*form.marks, *form.dropped))
    return f"{made.up_to(mark)} {made.spell(before[len(mark) :])}"


def _thought(made: "_Grammar", form: Form | None, tags: Tags | None, place: Place) -> str:
    """What a model may think before it answers."""
    if form is HARMONY:
        return f"({made.spell('<|channel|>analysis<|message|>')} {made.up_to('<|end|>')} {made.spell('<|start|>assistant')})?"
    if tags is None or place == "after":
        return ""
    if place == "within":
        return f"{made.up_to(tags.end)} {_SPACE}"
    return f"({made.spell(tags.start)} {made.up_to(tags.end)} {_SPACE})?"


def _wanted(wanted: StructuredOutputs) -> str:
    """The right side of a rule for it. A grammar is of a whole answer, and no part of another."""
    if wanted.json is not None:
        return _schema(json.loads(str(wanted.json)), "the schema of the answer cannot be honoured", "structured_outputs")
    if wanted.choice is not None:
        return " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
    if wanted.regex is not None:
        return "/" + re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", wanted.regex, flags=re.S).replace("\n", r"\n") + "/"
    if wanted.grammar is not None:
        raise NoGrammar
    return _ANY_OBJECT


def _schema(schema: dict[str, Any], fault: str, param: str) -> str:
    try:
        return schema_in_grammar(schema)
    except ValueError as error:
        raise RequestError(f"{fault}: {error}", param) from None


_ANY_OBJECT = '%json {"type": "object"}'


class _Grammar:
    """rules: name to right side, in llguidance's words."""

    def __init__(self, marks: tuple[str, ...], special_id: SpecialId):
        self.rules: dict[str, str] = {}
        self._marks = re.compile("(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")") if marks else None
        self._special_id = special_id

    def text(self) -> str:
        return "\n".join(f"{name}: {rule}" for name, rule in self.rules.items())

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
        spelled = [re.escape(mark).replace("/", "\\/") for mark in marks if self._special_id(mark) is None]
        self.rules["TEXT"] = r"/(.|\n)+/" + (rf" & ~/(.|\n)*({'|'.join(spelled)})(.|\n)*/" if spelled else "")
        return "TEXT"
