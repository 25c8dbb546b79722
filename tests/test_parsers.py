"""Answers in every form that is read: the documented examples of each family, all of them cut anywhere, and what is no call after all.

Whatever a model writes, no text is lost: what is not a call is content, to the letter.
"""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.request import ConfigError, SamplingParams
from jaxllm.source import default_model
from jaxllm.text import Detokenizer, Tokenizer
from serving.parsers.calls import HARMONY, Form
from serving.parsers.harmony import HarmonyReader
from serving.parsers.parts import Call, Part, Reader, Text, Thought, joined
from serving.parsers.reader import CallReader, Chain
from serving.parsers.table import REASONING_PARSERS, TOOL_PARSERS, Parsers, Place, Tags, choose
from serving.parsers.thinking import ThoughtReader

SCHEMAS: dict = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "clock": {"type": "object", "properties": {}},
}
PARIS, CLOCK = ("get_weather", {"city": "Paris"}), ("clock", {})
BEGIN, SEP, END = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
NEXT = "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>"

# parser: (an answer, its content, its calls)
GOLDEN = {
    "hermes": [
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
        (
            'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"arguments": {}, "name": "clock"}\n</tool_call>',
            "Let me look.",
            [PARIS, CLOCK],
        ),
        ('<tool_call>{"name": "clock"}</tool_call> Done.', " Done.", [CLOCK]),
        ('<tool_call>{"name": "clock", "arguments": "{}"}', "", [CLOCK]),  # ended at its end token
        (
            '<tool_call>{"name": "get_weather", "arguments": {"city": "a</tool_call>\\"b"}}</tool_call>',
            "",
            [("get_weather", {"city": 'a</tool_call>"b'})],
        ),
        ("Just words, 1 < 2.\n", "Just words, 1 < 2.\n", []),
    ],
    "qwen3_coder": [
        (
            "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
            "</function>\n</tool_call>",
            "I look.",
            [("get_weather", {"city": "Paris", "days": 3})],
        ),
        ("<tool_call>\n<function=clock>\n</function>\n</tool_call>", "", [CLOCK]),
    ],
    "llama3_json": [
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "clock", "parameters": {}}', "", [PARIS, CLOCK]),
        ('{"type": "function", "name": "clock", "parameters": {}}', "", [CLOCK]),
        ('{"answer": 42}', '{"answer": 42}', []),
        ('It is {"name": "clock"}', 'It is {"name": "clock"}', []),
    ],
    "pythonic": [
        ("[get_weather(city='Paris')]", "", [PARIS]),
        ('[get_weather(city="Paris", days=-1), clock()]', "", [("get_weather", {"city": "Paris", "days": -1}), CLOCK]),
        (
            "<|python_start|>[get_weather(city='a', days={'x': [true, None, 1.5]})]<|python_end|>",
            "",
            [("get_weather", {"city": "a", "days": {"x": [True, None, 1.5]}})],
        ),
        ("[1] is a footnote", "[1] is a footnote", []),
    ],
    "mistral": [
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [PARIS]),
        ('Well.[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{"city": "Paris"}[TOOL_CALLS]clock[ARGS]{}', "Well.", [PARIS, CLOCK]),
    ],
    "mistral_json": [
        ('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "clock", "arguments": {}}]', "", [PARIS, CLOCK]),
    ],
    "deepseek_v3": [
        (f'{BEGIN}function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```{END}', "", [PARIS]),
        (f'So:{BEGIN}function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```{NEXT}function{SEP}clock\n```json\n{{}}\n```{END}',
         "So:", [PARIS, CLOCK]),
    ],
    "deepseek_v31": [(f'{BEGIN}get_weather{SEP}{{"city": "Paris"}}{NEXT}clock{SEP}{{}}{END}', "", [PARIS, CLOCK])],
    "openai": [
        (
            '<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather '
            '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
            "I look.",
            [PARIS],
        ),
        ('<|start|>assistant to=functions.clock<|channel|>commentary json<|message|>{}', "", [CLOCK]),
        ("<|channel|>final<|message|>Hello.<|return|>", "Hello.", []),
    ],
    "json": [
        ('[{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "clock", "parameters": {}}]', "", [PARIS, CLOCK]),
        ('{"name": "clock", "arguments": {}}', "", [CLOCK]),
    ],
}  # fmt: skip
CASES = [(name, *case) for name, cases in GOLDEN.items() for case in cases]


def call_reader(name: str) -> Reader:
    form = TOOL_PARSERS[name]
    return HarmonyReader(SCHEMAS) if form is HARMONY else CallReader(form, SCHEMAS)


def read(reader: Reader, pieces: list[str]) -> list[Part]:
    return joined([*(part for piece in pieces for part in reader.feed(piece)), *reader.finish()])


def content(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def calls(parts: list[Part]) -> list[tuple[str, dict]]:
    return [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]


@pytest.mark.parametrize(
    ("name", "answer", "text", "called"), CASES, ids=lambda value: None if isinstance(value, list) else str(value)[:24]
)
def test_documented_answers(name, answer, text, called):
    parts = read(call_reader(name), [answer])
    assert (content(parts), calls(parts)) == (text, called)
    assert read(call_reader(name), list(answer)) == parts  # a character at a time


def test_every_parser_has_its_examples():
    assert GOLDEN.keys() == TOOL_PARSERS.keys()


# ---------------------------------------------------------------------------- broken calls

BROKEN = {
    "hermes": [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par',
        '<tool_call>{"name": "get_weather", "arguments": {"city": Paris}}</tool_call>',
        '<tool_call>{"name": "launch", "arguments": {}}</tool_call> sorry',
        '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {"a": ' + "[" * 100_000 + "}}</tool_call>",
        '<tool_call>{"name": "clock", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
        "<tool_call>",
        "<tool_call></tool_call>",
        "</tool_call>",
        "  <tool_call>[]</tool_call>\n\n",
    ],
    "qwen3_coder": ["<tool_call><function=launch></function></tool_call>", "<tool_call><function=clock> what</function></tool_call>"],
    "llama3_json": ['{"name": "clock", "parameters": {', '{"name": "launch", "parameters": {}}', "<|python_tag|>print(1)"],
    "pythonic": [
        "[clock(", "[clock(1)]", "[clock(a=open('x'))]", "[clock(a=1e999)]", "[clock(a=b'x')]", "[clock(**{})]", "[clock()] and",
        "[clock(a=" + "(" * 10_000 + ")]", "[clock(a='\\d', b=", "[launch()]",
    ],
    "mistral": ['[TOOL_CALLS]clock[ARGS]{"a"', "[TOOL_CALLS]launch[ARGS]{}", "[TOOL_CALLS]"],
    "mistral_json": ["[TOOL_CALLS][", "[TOOL_CALLS][1]"],
    "deepseek_v3": [f"<｜tool▁call▁begin｜>function{SEP}clock\n```json\n{{", f"<｜tool▁call▁begin｜>launch{SEP}{{}}<｜tool▁call▁end｜>"],
    "openai": ["Hello.", ""],
    "json": ['[{"name": "clock"', '{"name": "launch", "parameters": {}}'],
}  # fmt: skip


@pytest.mark.parametrize(("name", "answer"), [(n, a) for n, answers in BROKEN.items() for a in answers], ids=lambda value: str(value)[:40])
def test_what_is_no_call_is_content(name, answer):
    parts = read(call_reader(name), [answer])
    assert parts == ([Text(answer)] if answer else [])
    if len(answer) < 1000:
        assert read(call_reader(name), list(answer)) == parts


def test_a_broken_call_does_not_take_the_next_one_with_it():
    answer = '<tool_call>{"name": "clock</tool_call>\n<tool_call>{"name": "clock"}</tool_call>'
    parts = read(call_reader("hermes"), [answer])
    assert (content(parts), calls(parts)) == ('<tool_call>{"name": "clock</tool_call>', [CLOCK])
    nested = '<tool_call>oh <tool_call>{"name": "clock"}</tool_call>'
    assert calls(read(call_reader("hermes"), [nested])) == [CLOCK]


def test_text_after_calls_without_an_end_is_content():
    parts = read(call_reader("llama3_json"), ['{"name": "clock", "parameters": {}} and so on'])
    assert (content(parts), calls(parts)) == (" and so on", [CLOCK])


def test_a_broken_message_of_gpt_oss_keeps_its_text():
    parts = read(HarmonyReader(SCHEMAS), ['<|channel|>commentary to=functions.launch<|message|>{"a": 1}<|call|>'])
    assert not calls(parts) and '{"a": 1}' in content(parts) and "launch" in content(parts)


def test_calls_come_as_soon_as_they_are_complete_and_text_at_once():
    reader = call_reader("hermes")
    assert reader.feed("Hello <") == [Text("Hello")]
    assert reader.feed("b>") == [Text(" <b>")]
    assert reader.feed('<tool_call>{"name": "clock"}</tool_call') == []
    assert reader.feed(">") == [Call("clock", "{}")]


def test_a_long_call_costs_no_more_than_its_length():
    """What is searched is searched once: 200,000 ends within a string, a megabyte in small pieces."""
    body = '{"name": "clock", "arguments": {"a": "' + "</tool_call>" * 100_000 + '"}}'
    answer = f"<tool_call>{body}</tool_call>"
    pieces = [answer[i : i + 1000] for i in range(0, len(answer), 1000)]
    assert [name for name, _ in calls(read(call_reader("hermes"), pieces))] == ["clock"]


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_a_model_that_only_makes_blank_space_holds_nobody_up(name):
    """An expression that tries every cut of it would take minutes."""
    start, blank = time.process_time(), "\n " * 100_000
    for _, answer, _, _ in [case for case in CASES if case[0] == name]:
        for text in (answer + blank + "x", answer[:-3] + blank + answer[-3:], answer.replace(":", ":" + blank, 1)):
            read(call_reader(name), [text[i : i + 50_000] for i in range(0, len(text), 50_000)])
    assert time.process_time() - start < 10


# ---------------------------------------------------------------------------- thinking

THINK, R1 = REASONING_PARSERS["qwen3"], REASONING_PARSERS["deepseek_r1"]


@pytest.mark.parametrize(
    ("tags", "prompt", "answer", "thought", "text"),
    [
        (THINK, "assistant\n", "<think>\nHm, hm.\n</think>\n\nHello.", "Hm, hm.", "Hello."),
        (THINK, "assistant\n<think>\n", "Hm.\n</think>\n\nHello. ", "Hm.", "Hello. "),
        (THINK, "<think>\n\n</think>\n\n", "Hello. <think>", "", "Hello. <think>"),
        (THINK, "assistant\n", " Hello </think>", "", " Hello </think>"),
        (THINK, "assistant\n", "<think>Hm and so on", "Hm and so on", ""),
        (THINK, "assistant\n", "<think></think>", "", ""),
        (THINK, "assistant\n", "<thi", "", "<thi"),
        (R1, "<｜Assistant｜>", "Hm.</think>Hello.", "Hm.", "Hello."),
        (R1, "<｜Assistant｜>", "<think>Hm.</think>Hello.", "Hm.", "Hello."),
        (R1, "<｜Assistant｜></think>", "Hello.", "", "Hello."),
        (R1, "<｜Assistant｜><think>\n", "no end", "no end", ""),
    ],
)
def test_thinking(tags, prompt, answer, thought, text):
    def made():
        return ThoughtReader(tags, tags.place(prompt))

    parts = read(made(), [answer])
    assert ("".join(p.text for p in parts if isinstance(p, Thought)), content(parts)) == (thought, text)
    assert read(made(), list(answer)) == parts


def test_gpt_oss_thinks_in_a_channel_of_its_own():
    answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>analysis<|message|>Hm!<|end|>"
    answer += "<|start|>assistant<|channel|>final<|message|>Hello."
    assert read(HarmonyReader({}), [answer]) == [Thought("Hm.\n\nHm!"), Text("Hello.")]
    assert read(HarmonyReader({}), ["<|channel|>anal"]) == []  # a head is no text


# ---------------------------------------------------------------------------- cut anywhere

PLACES: list[Place] = ["before", "within", "after"]
WORDS = [
    *"<>[]{}|\"'\\ \n,;:ab1",
    "<think>",
    "</think>",
    "clock",
    "get_weather",
    '{"name": "clock"',
    ', "arguments": {}}',
    "[clock()]",
    SEP,
]
WORDS += [mark for form in TOOL_PARSERS.values() for mark in form.tokens] + [answer for _, answer, _, _ in CASES]


@st.composite
def cut_answers(draw) -> tuple[str, list[str]]:
    """Any soup of what parsers look for, and the same cut into pieces."""
    answer = "".join(draw(st.lists(st.sampled_from(WORDS), max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(0, len(answer)), max_size=20)))
    return answer, [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]


@pytest.mark.parametrize("name", TOOL_PARSERS)
@settings(max_examples=150, deadline=None)
@given(cut=cut_answers(), place=st.sampled_from(PLACES))
def test_how_an_answer_is_cut_changes_nothing(name, cut, place):
    answer, pieces = cut

    def made() -> Reader:
        calls = call_reader(name)
        return calls if name == "openai" else Chain(ThoughtReader(THINK, place), calls)  # pyright: ignore[reportArgumentType]

    whole = read(made(), [answer])
    assert read(made(), pieces) == whole
    for part in whole:
        if isinstance(part, Call):
            assert part.name in SCHEMAS and isinstance(json.loads(part.arguments), dict)


@settings(max_examples=200, deadline=None)
@given(cut=cut_answers())
def test_without_a_call_every_character_comes_back(cut):
    answer, pieces = cut
    for name in TOOL_PARSERS.keys() - {"openai"}:
        parts = read(call_reader(name), pieces)
        if not calls(parts):
            dropped = [re.escape(mark) for mark in TOOL_PARSERS[name].dropped]
            assert content(parts) == (re.sub("|".join(dropped), "", answer) if dropped else answer)


# ---------------------------------------------------------------------------- which parser

TEMPLATES = {
    "hermes": [
        """{{- "\\nFor each call:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args>}" }}""",
        """{{- '<tool_call>\\n{"name": "' }}""",
        (default_model() / "chat_template.jinja").read_text(),
    ],
    "qwen3_coder": ["""{{- "in the following format:\\n\\n<tool_call>\\n<function=example>\\n<parameter=a>" }} <tool_call>"""],
    "llama3_json": ["""{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}"""],
    "pythonic": ["""Use [func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]"""],
    "mistral": ["""{{- '[TOOL_CALLS]' + tool.function.name + '[ARGS]' + arguments }}"""],
    "mistral_json": ["""{{- "[TOOL_CALLS] [" }}"""],
    "deepseek_v3": ["""{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json'}}"""],
    "deepseek_v31": ["""{{'<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments']}}"""],
    "openai": ["""{{- "<|start|>assistant<|channel|>final<|message|>" }}"""],
    None: ["""{{ message.content }}""", """{{- '<tool_call>' + tc.name + '<arg_key>' }}"""],
}


@pytest.mark.parametrize(("name", "template"), [(name, text) for name, texts in TEMPLATES.items() for text in texts])
def test_a_model_s_template_says_its_parser(name, template):
    assert choose("auto", "auto", {"default": template}).tool == name
    reasoning = choose("auto", "auto", {"default": template + "<think></think>"}).reasoning
    assert reasoning == ("openai_gptoss" if name == "openai" else "qwen3")


def test_a_parser_may_be_named_or_none():
    template = {"default": TEMPLATES["hermes"][0]}
    assert choose("none", "deepseek_r1", template) == Parsers(None, "deepseek_r1")
    assert choose("mistral", "none", template) == Parsers("mistral", None)
    assert choose("auto", "auto", {"default": "<｜Assistant｜>' + content.split('</think>')"}).reasoning == "deepseek_r1"
    for tool, reasoning in (("openai", "qwen3"), ("hermes", "openai_gptoss"), ("openai", "none")):
        with pytest.raises(ConfigError, match="read as a whole"):
            choose(tool, reasoning, {})


# ---------------------------------------------------------------------------- special tokens


def test_marks_that_are_special_tokens_stay_and_others_go(tmp_path):
    """What the parser needs is shown; an end token beside it is not; and the same marks as ordinary tokens are text anyway."""
    folder = default_model()
    for special in (False, True):
        files = json.loads((folder / "tokenizer.json").read_text())
        for token in files["added_tokens"]:
            token["special"] = token["special"] or special
        (tmp_path / "tokenizer.json").write_text(json.dumps(files))
        (tmp_path / "tokenizer_config.json").write_text((Path(folder) / "tokenizer_config.json").read_text())
        tokenizer = Tokenizer.load(tmp_path)
        answer = '<tool_call>\n{"name": "clock"}\n</tool_call><|pad|><tool_response>'
        ids = tokenizer.encode(answer, add_special_tokens=False)
        shown = [found for mark in TOOL_PARSERS["hermes"].tokens if (found := tokenizer.special_id(mark)) is not None]
        assert len(shown) == 2 * special
        detokenizer = Detokenizer(tokenizer, [1], SamplingParams(shown_special_token_ids=shown))
        text = detokenizer.push(ids) + detokenizer.finish()
        assert text == '<tool_call>\n{"name": "clock"}\n</tool_call>' + "<tool_response>" * (not special)
        plain = Detokenizer(tokenizer, [1], SamplingParams())
        assert ("<tool_call>" in plain.push(ids)) == (not special)


def test_tables_are_whole():
    for name, form in TOOL_PARSERS.items():
        assert isinstance(form, Form) and (form.marks or form.openings) and (form.template or name == "json")
    for tags in REASONING_PARSERS.values():
        assert tags is HARMONY or isinstance(tags, Tags)
