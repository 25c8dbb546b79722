"""The forms in which models write tool calls, a row each, and how a call's text becomes a name and arguments.

A row's forms are those of the model's own chat template (its page on the Hub has it). Nothing here knows about streaming: reader.py finds
where a call begins and ends.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from serving.parsers.parts import Call, Schemas

# A call's text to its calls and whatever text follows them. ValueError or RecursionError: this is no call.
Parse = Callable[[str, Schemas], tuple[list[Call], str]]


@dataclass(frozen=True)
class Form:
    """How one kind of model writes calls.

    models: which they are. marks: each begins a call, anywhere. end: ends it; None: the answer's end or the next mark does. openings: what
    a call without a mark begins with, at the beginning of an answer only; NAME stands for any tool's. dropped: marks that say nothing.
    further: marks within a call. quoted: marks within a JSON string of a call are its text. template: an expression; a model is of this
    kind if it is found in its chat template. written: how the model writes calls, for grammars: before the first, a call, between two,
    after the last; NAME and ARGUMENTS stand for what they say. None between two: there can be one only; None at all: there is no such
    grammar.
    """

    models: str
    parse: Parse
    marks: tuple[str, ...] = ()
    end: str | None = None
    openings: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    quoted: bool = True
    template: str | None = None
    written: tuple[str, str, str | None, str] | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        """All marks: what must stay in the text even if it is a special token."""
        return (*self.marks, *self.dropped, *self.further, *([self.end] if self.end else []))


def call_of(value: Any, schemas: Schemas) -> Call:
    """The call that {"name": ..., "arguments" or "parameters": ...} says. Raises ValueError if it says none of a known tool."""
    if not isinstance(value, dict):
        raise ValueError("a call is a JSON object")
    if isinstance(value.get("function"), dict):
        value = value["function"]
    return known(value.get("name"), value.get("arguments", value.get("parameters", {})), schemas)


def known(name: Any, arguments: Any, schemas: Schemas) -> Call:
    """Raises ValueError unless `name` is a tool's and `arguments` an object, or an object written as a string."""
    if not isinstance(name, str) or name not in schemas:
        raise ValueError(f"there is no tool {name!r}")
    if isinstance(arguments, str):
        arguments = from_json(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are a JSON object")
    text = _write(arguments)
    text.encode()  # half of a surrogate pair can be written in JSON, but not sent
    return Call(name, text)


def from_json(text: str) -> Any:
    value, rest = begin_json(text)
    if rest.strip():
        raise ValueError("more text after the JSON")
    return value


def begin_json(text: str) -> tuple[Any, str]:
    """The JSON value that `text` begins with, and the text after it. Raises ValueError."""
    text = text.lstrip()
    value, end = _JSON.raw_decode(text)
    return value, text[end:]


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


_write = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
# strict=False: models write line breaks into strings as they are.
_JSON = json.JSONDecoder(parse_constant=_no_constant, strict=False)


def parse_object(body: str, schemas: Schemas) -> tuple[list[Call], str]:
    """One JSON object, and nothing else."""
    return [call_of(from_json(body), schemas)], ""


def parse_objects(body: str, schemas: Schemas) -> tuple[list[Call], str]:
    """JSON objects, one after another or in a list, with or without something between them."""
    value, rest = begin_json(body)
    calls = [call_of(each, schemas) for each in (value if isinstance(value, list) else [value])]
    while (following := _after_separator(rest)).startswith("{"):
        try:
            value, after = begin_json(following)
            calls.append(call_of(value, schemas))
        except ValueError:
            break
        rest = after
    return calls, rest


def _after_separator(text: str) -> str:
    text = text.lstrip()
    return text[1:].lstrip() if text[:1] in (";", ",") else text


def parse_python(body: str, schemas: Schemas) -> tuple[list[Call], str]:
    """A Python list of calls with keyword arguments that are literals."""
    body = body.partition("<|python_end|>")[0].strip()
    try:
        with warnings.catch_warnings(action="ignore"):  # a backslash that escapes nothing
            tree = ast.parse(body, mode="eval").body
    except (SyntaxError, MemoryError) as error:  # MemoryError: too many brackets
        raise ValueError(f"no Python: {error}") from None
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("no list of calls")
    return [_python_call(node, schemas) for node in tree.elts], ""


def _python_call(node: ast.expr, schemas: Schemas) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("no call with keyword arguments")
    arguments = {str(keyword.arg): _python_value(keyword.value) for keyword in node.keywords}
    return known(ast.unparse(node.func), arguments, schemas)


def _python_value(node: ast.expr) -> Any:
    """A literal as JSON has it; JSON's own words are taken for what they mean."""
    if isinstance(node, ast.Name) and node.id in _JSON_WORDS:
        return _JSON_WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(each) for each in node.elts]
    if isinstance(node, ast.Dict) and all(node.keys):
        return {str(_python_value(key)): _python_value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None) or (isinstance(value, float) and value - value != 0):
        raise ValueError("an argument that JSON cannot say")
    return value


_JSON_WORDS = {"true": True, "false": False, "null": None}


def parse_mistral(body: str, schemas: Schemas) -> tuple[list[Call], str]:
    """A JSON list of calls, or name[ARGS]{...}; an id between the two says nothing to us."""
    if body.lstrip()[:1] in ("[", "{"):
        return parse_objects(body, schemas)
    head, found, arguments = body.partition("[ARGS]")
    if not found:
        brace = body.find("{")
        head, arguments = (body[:brace], body[brace:]) if brace >= 0 else (body, "{}")
    value, rest = begin_json(arguments)
    return [known(head.partition("[CALL_ID]")[0].strip(), value, schemas)], rest


def parse_deepseek(body: str, schemas: Schemas) -> tuple[list[Call], str]:
    """V3 and R1: function<sep>name and a block of JSON; V3.1: name<sep>{...}."""
    head, _, rest = body.partition(SEP)
    if head.strip() == "function":
        head, _, rest = rest.partition("\n")
        rest = rest.strip().removeprefix("```json").removesuffix("```")
    return [known(head.strip(), from_json(rest), schemas)], ""


def parse_xml(body: str, schemas: Schemas) -> tuple[list[Call], str]:
    """<function=name><parameter=key>value</parameter>...</function>: a value is text where the schema says string, and JSON elsewhere."""
    begun, found, rest = body.strip().removesuffix("</function>").partition(">")
    name, inside = begun.removeprefix("<function=").strip(), rest
    if not found or not begun.startswith("<function="):
        raise ValueError("no function in the call")
    properties = schemas.get(name, {}).get("properties", {})
    pairs = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", inside, re.S)
    if re.sub(r"<parameter=[^>]+>.*?(?:</parameter>|(?=<parameter=)|\Z)", "", inside, flags=re.S).strip():
        raise ValueError("text beside the parameters")
    return [known(name, {key.strip(): _xml_value(value, properties.get(key.strip())) for key, value in pairs}, schemas)], ""


def parse_harmony(body: str, schemas: Schemas) -> tuple[list[Call], str]:
    """A message of gpt-oss' to a function: harmony.py has the format."""
    head, _, text = body.partition(MESSAGE)
    recipient = RECIPIENT.search(head)
    if recipient is None:
        raise ValueError("the message is to nobody")
    return [known(recipient[1].removeprefix("functions."), from_json(text), schemas)], ""


def _xml_value(text: str, schema: Any) -> Any:
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return from_json(text)
    except ValueError:
        return text


MESSAGE = "<|message|>"
RECIPIENT = re.compile(r"\bto=([\w.-]+)")
SEP = "<｜tool▁sep｜>"
_JSON_CALL = ('{"name": "NAME"', '{"name":"NAME"', '{ "name": "NAME"')
HERMES = Form(
    "Hermes; Qwen 2.5 and 3; the model in the package",
    parse_object,
    ("<tool_call>",),
    "</tool_call>",
    template=r"<tool_call>[\s\\n'\"+~]*\{\\?[\"']name",
    written=("<tool_call>\n", '{"name": "NAME", "arguments": ARGUMENTS}', "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
)
XML = Form("Qwen3-Coder", parse_xml, ("<tool_call>",), "</tool_call>", quoted=False, template=r"<tool_call>[\s\\n'\"+~]*<function=")
LLAMA_JSON = Form(
    "Llama 3.1 to 3.3",
    parse_objects,
    ("<|python_tag|>",),
    openings=(*_JSON_CALL, '{"type": "function", "name": "NAME"'),
    template=r'\{\\?"name\\?": function name, \\?"parameters',
    written=("", '{"name": "NAME", "parameters": ARGUMENTS}', "; ", ""),
)
PYTHONIC = Form(
    "Llama 4, and others that call in Python",
    parse_python,
    ("<|python_start|>",),
    openings=("[NAME(",),
    further=("<|python_end|>",),
    template=r"\[func_name1\(params_name1",
)
MISTRAL = Form(
    "Mistral, where the chat template writes a JSON list",
    parse_mistral,
    ("[TOOL_CALLS]",),
    further=("[ARGS]", "[CALL_ID]"),
    template=r"\[TOOL_CALLS\]",
    written=("[TOOL_CALLS][", '{"name": "NAME", "arguments": ARGUMENTS}', ", ", "]"),
)
MISTRAL_ARGS = replace(
    MISTRAL,
    models="Mistral, where the chat template writes [ARGS]",
    template=r"\[ARGS\]",
    written=("[TOOL_CALLS]", "NAME[ARGS]ARGUMENTS", "[TOOL_CALLS]", ""),
)
_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
DEEPSEEK = Form(
    "DeepSeek V3 and R1",
    parse_deepseek,
    (_CALL[0],),
    _CALL[1],
    dropped=_CALLS,
    further=(SEP,),
    template=f"{SEP}.*```json",
    written=(_CALLS[0], f"{_CALL[0]}function{SEP}NAME\n```json\nARGUMENTS\n```{_CALL[1]}", "\n", _CALLS[1]),
)
DEEPSEEK_V31 = replace(
    DEEPSEEK, models="DeepSeek V3.1", template=SEP, written=(_CALLS[0], f"{_CALL[0]}NAME{SEP}ARGUMENTS{_CALL[1]}", "", _CALLS[1])
)
HARMONY = Form(
    "gpt-oss",
    parse_harmony,
    ("<|end|>", "<|call|>", "<|return|>", "<|start|>"),
    further=(MESSAGE, "<|channel|>", "<|constrain|>"),
    template=r"<\|channel\|>.*<\|message\|>",
    written=("", f"<|channel|>commentary to=functions.NAME <|constrain|>json{MESSAGE}ARGUMENTS<|call|>", None, ""),
)
JSON = Form(
    "any: for calls that must be made by a model without a form that can be enforced",
    parse_objects,
    openings=(*_JSON_CALL, *(f"[{each}" for each in _JSON_CALL)),
    written=("[", '{"name": "NAME", "parameters": ARGUMENTS}', ", ", "]"),
)
