"""The tools of a request: how each route writes them, what is refused, and which of them an answer may, must or must not call."""

import re
import secrets
import string
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema

from jaxllm.request import RequestError
from serving.errors import encode

Choice = Annotated[Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]})]
MAX_TOOLS = 128  # OpenAI's limit
MAX_SCHEMA = 64 * 1024  # characters of one tool's parameters as JSON
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True)
class Tool:
    """parameters: a JSON schema of an object. strict: calls in an answer must fit it, even those that the model was free to make."""

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool

    @cached_property
    def shown(self) -> dict[str, Any]:
        """What chat templates expect."""
        said = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **said, "parameters": self.parameters}}


@dataclass(frozen=True)
class Tools:
    """choice: "required" is at least one call. only: the one tool that may be called, once."""

    tools: tuple[Tool, ...] = ()
    choice: Literal["none", "auto", "required"] = "none"
    only: str | None = None
    parallel: bool = True

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is shown."""
        return () if self.choice == "none" else self.tools

    @property
    def enforced(self) -> bool:
        """Must there be a call?"""
        return self.choice == "required"

    @property
    def strict(self) -> bool:
        return any(tool.strict for tool in self.offered)

    @property
    def one(self) -> bool:
        """At most one call?"""
        return self.only is not None or not self.parallel

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """What may be called."""
        return {tool.name: tool.parameters for tool in self.offered if self.only in (None, tool.name)}

    @property
    def template(self) -> dict[str, Any]:
        """The chat template's keyword for them."""
        return {"tools": [tool.shown for tool in self.offered]} if self.offered else {}


def make_tools(found: list[Tool], choice: Any, only: str | None, parallel: bool) -> Tools:
    """Raises RequestError for two tools of a name, a name that no tool has, too many."""
    if len(found) > MAX_TOOLS:
        raise RequestError(f"`tools` holds {len(found)} tools; at most {MAX_TOOLS} are allowed", "tools")
    names = [tool.name for tool in found]
    if doubled := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise RequestError(f"`tools` holds two tools of the name {doubled}: give each its own", "tools")
    if only is not None and only not in names:
        raise RequestError(f"`tool_choice` names the tool {only:.140}, but `tools` has none of that name", "tool_choice")
    return Tools(tuple(found), choice, only, parallel)


def make_tool(where: str, name: Any, description: Any, parameters: Any, strict: Any = None, schema: str = "parameters") -> Tool:
    """Raises RequestError naming what is wrong with the tool at `where`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"`{where}.name` must be 1 to 128 letters, digits, _, - and .", f"{where}.name")
    if not isinstance(description, str | None):
        raise RequestError(f"`{where}.description` must be a string", f"{where}.description")
    if not isinstance(strict, bool | None):
        raise RequestError(f"`{where}.strict` must be true or false", f"{where}.strict")
    return Tool(name, description, _schema(f"{where}.{schema}", parameters), bool(strict))


def _schema(where: str, given: Any) -> dict[str, Any]:
    if given is None or given == {}:
        return {"type": "object", "properties": {}}  # OpenAI: leaving it out is an empty list of parameters
    if not isinstance(given, dict) or given.get("type") != "object":
        raise RequestError(f'`{where}` must be a JSON schema of "type": "object"', where)
    if not isinstance(given.get("properties", {}), dict):
        raise RequestError(f"`{where}.properties` must be an object", where)
    if (size := len(encode(given))) > MAX_SCHEMA:
        raise RequestError(f"`{where}` has {size} characters as JSON; at most {MAX_SCHEMA} are allowed", where)
    return given


def chat_tools(tools: Any, choice: Any, parallel: bool | None) -> Tools:
    """The fields of /v1/chat/completions. Raises RequestError."""
    if tools is None:
        if choice not in (None, "none"):
            raise RequestError("`tool_choice` is only allowed with `tools`", "tool_choice")
        return Tools()
    if not isinstance(tools, list) or not tools:
        raise RequestError("`tools` must be a list of at least one tool: leave it out if there is none", "tools")
    found = []
    for i, tool in enumerate(tools):
        function = _function(tool, f"tools[{i}]").get("function")
        if not isinstance(function, dict):
            raise RequestError(f"`tools[{i}].function` must be an object", f"tools[{i}].function")
        found.append(_flat(function, f"tools[{i}].function"))
    return _chosen(found, choice, parallel, nested=True)


def responses_tools(tools: Any, choice: Any, parallel: bool | None) -> Tools:
    """The fields of /v1/responses, where a function stands in the tool itself. Raises RequestError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("`tool_choice` is only allowed with `tools`", "tool_choice")
        return Tools()
    if not isinstance(tools, list):
        raise RequestError("`tools` must be a list of tools", "tools")
    found = [_flat(_function(tool, f"tools[{i}]"), f"tools[{i}]") for i, tool in enumerate(tools)]
    return _chosen(found, choice, parallel, nested=False)


def _function(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise RequestError(f"`{where}.type` must be function, the only kind of tool that this server knows", where)
    return tool


def _flat(function: dict[str, Any], where: str) -> Tool:
    return make_tool(where, function.get("name"), function.get("description"), function.get("parameters"), function.get("strict"))


def _chosen(found: list[Tool], choice: Any, parallel: bool | None, *, nested: bool) -> Tools:
    if choice is None or choice in ("none", "auto", "required"):
        return make_tools(found, choice or "auto", None, parallel is not False)
    function = choice.get("function") if nested and isinstance(choice, dict) else choice
    if not isinstance(choice, dict) or choice.get("type") != "function" or not isinstance(function, dict):
        raise RequestError("`tool_choice` must be none, auto, required, or name a function", "tool_choice")
    return make_tools(found, "required", str(function.get("name")), parallel is not False)


def messages_tools(tools: Any, choice: Any) -> Tools:
    """The fields of /v1/messages. Raises RequestError."""
    kind = choice.get("type") if isinstance(choice, dict) else None
    if choice is not None and kind not in ("none", "auto", "any", "tool"):
        raise RequestError("`tool_choice.type` must be none, auto, any or tool", "tool_choice")
    if not tools:
        if kind in ("any", "tool"):
            raise RequestError("`tool_choice` is only allowed with `tools`", "tool_choice")
        return Tools()
    if not isinstance(tools, list):
        raise RequestError("`tools` must be a list of tools", "tools")
    found = [_anthropic(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    single = choice.get("disable_parallel_tool_use") if choice else None
    if not isinstance(single, bool | None):
        raise RequestError("`tool_choice.disable_parallel_tool_use` must be true or false", "tool_choice")
    if kind == "tool":
        return make_tools(found, "required", str(choice and choice.get("name")), not single)
    return make_tools(found, {"any": "required", "none": "none"}.get(str(kind), "auto"), None, not single)


def _anthropic(tool: Any, where: str) -> Tool:
    if not isinstance(tool, dict) or tool.get("type", "custom") not in (None, "custom"):
        raise RequestError(f"`{where}` must be a tool of your own: this server has none of Anthropic's", where)
    if "input_schema" not in tool:
        raise RequestError(f"`{where}.input_schema` is missing", f"{where}.input_schema")
    return make_tool(where, tool.get("name"), tool.get("description"), tool["input_schema"], tool.get("strict"), "input_schema")


def call_id() -> str:
    """Nine letters and digits: Mistral's chat templates take no other, and the others do not mind."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


_ALPHABET = string.ascii_letters + string.digits
