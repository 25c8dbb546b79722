"""Grammars of calls, in every form a model writes: what they let through is read as calls that fit their schemas, and nothing else is."""

import json
import random
from typing import Any

import numpy as np
import pytest

from jaxllm.grammar import Grammars
from jaxllm.request import RequestError, StructuredOutputs
from jaxllm.source import default_model
from jaxllm.text import Tokenizer
from serving.parsers.calls import HARMONY, Form
from serving.parsers.enforce import NoGrammar, answer_grammar
from serving.parsers.harmony import HarmonyReader
from serving.parsers.parts import Call, More, Text, joined
from serving.parsers.reader import CallReader
from serving.parsers.table import REASONING_PARSERS, TOOL_PARSERS, Place, Tags
from serving.parsers.written import WrittenReader
from serving.reading import object_of
from serving.tools import Tool, Tools

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 3}}, "required": ["city"], "additionalProperties": False}
COUNT = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "deep": {"type": "boolean"}}, "additionalProperties": False}
TOOLS = (Tool("weather", None, CITY, False), Tool("count.all", "Counts", COUNT, False))
STRICT = (Tool("weather", None, CITY, True), Tool("count.all", "Counts", COUNT, False))
WRITTEN = {name: form for name, form in TOOL_PARSERS.items() if form.written}
THINK = REASONING_PARSERS["qwen3"]
assert isinstance(THINK, Tags)


class Marks:
    """The default model's tokenizer; with marks, four of its special tokens stand for them."""

    def __init__(self, tokenizer: Tokenizer, grammars: Grammars, marks: dict[str, int]):
        self.tokenizer, self.grammars, self.marks = tokenizer, grammars, marks

    def special_id(self, text: str) -> int | None:
        return self.marks.get(text)

    def start(
        self, form: Form | None, tools: Tools, tags: Tags | None = None, place: Place = "after", wanted: StructuredOutputs | None = None
    ) -> Any:
        grammar = answer_grammar(form, tools, tags, place, wanted, self.special_id)
        return self.grammars.compiled(StructuredOutputs(grammar=grammar)).result().start.deep_copy()


@pytest.fixture(scope="module")
def plain():
    tokenizer = Tokenizer.load(default_model())
    return Marks(tokenizer, Grammars(tokenizer, tokenizer.vocab_size, frozenset({2})), {})


@pytest.fixture(scope="module")
def special(plain):
    """<|endoftext|>, <|im_start|> and <|pad|> stand for the marks."""
    return Marks(plain.tokenizer, plain.grammars, {"<tool_call>": 0, "</tool_call>": 1, "</think>": 3})


def lets(matcher: Any, marks: Marks, text: str) -> bool:
    """Is this a whole answer?"""
    ids = marks.tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def answer(form: Form, *calls: tuple[str, dict]) -> str:
    assert form.written is not None
    before, call, between, after = form.written
    texts = [call.replace("NAME", name).replace("ARGUMENTS", json.dumps(arguments)) for name, arguments in calls]
    return before + (between or "").join(texts) + after


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_come_in_the_model_s_own_form(plain, name):
    form, must = WRITTEN[name], Tools(TOOLS, "required")
    both = (("weather", {"city": "Ulm"}), ("count.all", {"n": 1}))
    assert lets(plain.start(form, must), plain, answer(form, both[0]))
    assert lets(plain.start(form, must), plain, answer(form, *both)) == (form is not HARMONY)
    for wrong in (("weather", {"city": 5}), ("weather", {}), ("launch", {}), ("count.all", {"n": 3})):
        assert not lets(plain.start(form, must), plain, answer(form, wrong))
    assert not lets(plain.start(form, must), plain, "") and not lets(plain.start(form, must), plain, "Hello")
    for one in (Tools(TOOLS, "required", parallel=False), Tools(TOOLS, "required", only="weather")):
        assert lets(plain.start(form, one), plain, answer(form, both[0]))
        assert not lets(plain.start(form, one), plain, answer(form, *both))
    assert not lets(plain.start(form, Tools(TOOLS, "required", only="count.all")), plain, answer(form, both[0]))


def test_a_model_may_think_before_it_must_call(plain, special):
    form, must = TOOL_PARSERS["hermes"], Tools(TOOLS, "required")
    call = answer(form, ("weather", {"city": "Ulm"}))
    for place, good, bad in (
        ("before", [call, f"<think>Hm <b>.</think>\n\n{call}"], [f"Hm.</think>{call}", f"Hm.{call}"]),
        ("within", [f"Hm, <tool_call>?</think>\n{call}", f"</think>{call}"], [call, "Hm.</think>"]),
        ("after", [call], [f"<think></think>{call}"]),
    ):
        for text in good:
            assert lets(plain.start(form, must, THINK, place), plain, text), (place, text)
        for text in bad:
            assert not lets(plain.start(form, must, THINK, place), plain, text), (place, text)
    thought = special.tokenizer.encode("Hm </think>", add_special_tokens=False)  # as text it is no mark
    start = special.start(form, must, THINK, "within")
    assert start.try_consume_tokens([*thought, 3, 0]) == len(thought) + 2
    analysis = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    call = answer(HARMONY, ("weather", {"city": "Ulm"}))
    assert lets(plain.start(HARMONY, must), plain, analysis + call)


@pytest.mark.parametrize("name", WRITTEN)
def test_strict_tools_are_called_by_their_schemas_where_the_model_is_free_to_call(plain, name):
    form, may = WRITTEN[name], Tools(STRICT, "auto")
    if name in ("openai", "llama3_json", "json"):  # nothing tells where text ends and a call begins
        with pytest.raises(NoGrammar):
            plain.start(form, may)
        return
    call = answer(form, ("weather", {"city": "Ulm"}))
    for text in ("", "Hello < you >\n", call, "I look.\n" + call, answer(form, ("count.all", {"anything": [1]}))):
        assert lets(plain.start(form, may), plain, text), text
    for text in (answer(form, ("weather", {"city": 5})), "Well. " + answer(form, ("launch", {})), call[:-3]):
        assert not lets(plain.start(form, may), plain, text), text


WANTED = [
    (StructuredOutputs(json={"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"]}), '{"n": 1}', '{"n": 2}'),
    (StructuredOutputs(json_object=True), '{"anything": []}', "[]"),
    (StructuredOutputs(choice=["yes/no", 'a "b"\n']), 'a "b"\n', "a"),
    (StructuredOutputs(regex=r"a/b\\/[/\n]\d+"), "a/b\\/\n12", "a/b\\/\n"),
]


@pytest.mark.parametrize(("wanted", "good", "bad"), WANTED, ids=lambda value: getattr(value, "kind", None))
def test_an_answer_s_form_beside_thoughts_and_calls(plain, wanted, good, bad):
    call, may = answer(TOOL_PARSERS["hermes"], ("weather", {"city": 5})), Tools(TOOLS, "auto")
    for start in (
        lambda: plain.start(None, Tools(), THINK, "before", wanted),
        lambda: plain.start(TOOL_PARSERS["hermes"], may, THINK, "before", wanted),
    ):
        assert lets(start(), plain, good) and lets(start(), plain, f"<think>Hm.</think>\n\n{good}")
        assert not lets(start(), plain, bad) and not lets(start(), plain, f"Hello {good}")
    assert lets(plain.start(TOOL_PARSERS["hermes"], may, None, "after", wanted), plain, call)
    final = f"<|channel|>final<|message|>{good}"
    assert lets(plain.start(HARMONY, Tools(), None, "after", wanted), plain, final)
    with pytest.raises(NoGrammar):
        plain.start(TOOL_PARSERS["pythonic"], may, None, "after", wanted)


@pytest.mark.parametrize("strict", [False, True])
def test_marks_that_are_special_tokens(special, strict):
    form = TOOL_PARSERS["hermes"]
    encode = lambda text: special.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    call = [0, *encode('\n{"name": "weather", "arguments": {"city": "Ulm"}}\n'), 1]
    start = lambda: special.start(form, Tools(STRICT, "auto") if strict else Tools(TOOLS, "required"))  # noqa: E731
    for ids in (call, [*call, *encode("\n"), *call], [*encode("Hm. <tool_call>"), *call]):
        matcher = start()
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == (strict or ids[0] == 0)
    wrong = [0, *encode('\n{"name": "weather", "arguments": {"city": 5}}\n'), 1]
    assert start().try_consume_tokens(wrong) < len(wrong)


@pytest.mark.parametrize("name", WRITTEN)
def test_whatever_the_grammar_lets_through_is_read(plain, name):
    """Random answers, a token at a time, mostly of single characters so that they end."""
    form, ways = WRITTEN[name], random.Random(name)
    short = np.array([len(plain.tokenizer.token_bytes(i)) == 1 for i in range(plain.tokenizer.vocab_size)])
    ended = 0
    for tools in (Tools(TOOLS, "required"), Tools(TOOLS, "required", only="count.all")) * 5:
        start = plain.tokenizer.encode(
            "<|channel|>commentary" if form is HARMONY else "", add_special_tokens=False
        )  # no thought: it has no end
        ids = walk(plain.start(form, tools), start, short, ways)
        text = b"".join(map(plain.tokenizer.token_bytes, ids)).decode()
        reader = HarmonyReader(tools.schemas) if form is HARMONY else CallReader(form, tools.schemas)
        parts = joined([*reader.feed(text), *reader.finish()])
        calls = [part for part in parts if isinstance(part, Call)]
        assert calls and not any(isinstance(part, Text) for part in parts), text
        assert all(fits(call.name, json.loads(call.arguments)) for call in calls), text
        assert not tools.one or [call.name for call in calls] == ["count.all"]
        if form is not HARMONY:
            assert calls_as_they_come(form, text, ways) == [(call.name, json.loads(call.arguments)) for call in calls]
        ended += 1
    assert ended == 10


def calls_as_they_come(form: Form, text: str, ways: random.Random) -> list[tuple[str, dict]]:
    """What WrittenReader makes of the text, in pieces of up to 4 characters."""
    reader, parts, at = WrittenReader(form), [], 0
    while at < len(text):
        size = ways.randint(1, 4)
        parts += reader.feed(text[at : at + size])
        at += size
    calls = joined([*parts, *reader.finish()])
    assert all(isinstance(part, Call) for part in calls)
    assert any(isinstance(part, More) for part in parts)  # told before it is complete
    return [(part.name, json.loads(part.arguments)) for part in calls if isinstance(part, Call)]


@pytest.mark.parametrize("cut", range(150))
def test_calls_that_end_too_soon_keep_what_there_is(cut):
    """Cut anywhere: a call whose arguments have begun has what there is of them; a head is text; ends of the form are nobody's."""
    form = TOOL_PARSERS["hermes"]
    text = answer(form, ("weather", {"city": 'U"lm}'}), ("count.all", {"n": 1}))[:cut]
    reader = WrittenReader(form)
    parts = joined([*reader.feed(text), *reader.finish()])
    calls = [part for part in parts if isinstance(part, Call)]
    assert len(calls) == text.count('"arguments": ')
    for call, said in zip(calls, ('{"city": "U\\"lm}"}', '{"n": 1}'), strict=False):
        assert said.startswith(call.arguments) and (call is calls[-1] or call.arguments == said)
        assert object_of(call.arguments).keys() <= {"city", "n"}
    kept = "".join(part.text for part in parts if isinstance(part, Text))
    assert text.endswith(kept) and len(calls) + bool(kept) >= min(text.count('"name"'), 1)


def walk(matcher: Any, start: list[int], short: np.ndarray, ways: random.Random) -> list[int]:
    """An answer that begins so, and that the grammar lets through."""
    ids = list(start)
    assert matcher.consume_tokens(start)
    while not matcher.is_stopped() and not (len(ids) > 60 and matcher.is_accepting()):
        assert len(ids) < 1500, ids
        bits = np.zeros((1, 128), np.int32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: len(short)].astype(bool)
        choices = np.flatnonzero(allowed & short) if (allowed & short).any() else np.flatnonzero(allowed)
        if 2 in choices and len(choices) == 1:
            break
        token = int(ways.choice(choices))
        if token == 2:  # the end token
            break
        matcher.consume_token(token)
        ids.append(token)
    return ids


def fits(name: str, arguments: dict) -> bool:
    if name == "weather":
        return arguments.keys() == {"city"} and isinstance(arguments["city"], str) and len(arguments["city"]) <= 3
    return arguments.keys() <= {"n", "deep"} and arguments.get("n", 1) in (1, 2) and isinstance(arguments.get("deep", True), bool)


def test_parameters_that_cannot_be_enforced_name_the_tool(plain):
    for wrong in ({"properties": {"a": {"type": "strng"}}}, {"properties": {"a": {"not": {}}}}, {"properties": {"a": {"nullable": True}}}):
        tools = Tools((*TOOLS, Tool("third", None, {"type": "object", **wrong}, False)), "required")
        with pytest.raises(RequestError, match="the parameters of third cannot be enforced"):
            plain.start(TOOL_PARSERS["hermes"], tools)
