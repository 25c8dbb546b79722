"""A conversation as clients send it to /v1/chat/completions, made into what chat templates read; other routes bring theirs into its form.

Roles and further message fields are the template's to judge. Here every content becomes a string, what is not text is refused, and calls
of tools in the history become objects.
"""

import json
from typing import Any

from jaxllm.request import RequestError
from serving.errors import encode
from serving.protocol import EngineLike, off_loop, tokenizer_of

# What `chat_template_kwargs` may not set: names that have a meaning to us, not to the template.
_RESERVED = {"self", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "tools", "documents"}


class Arguments(dict):
    """A call's arguments, for templates of both kinds: those that write an object as JSON, and those that put a text beside another."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def parse_messages(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The messages with every content a string. Raises RequestError naming the message at fault."""
    if not messages:
        raise RequestError("`messages` must hold at least one message", "messages")
    return with_names([_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)])


def with_names(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, those of tools with the name of what was called: some templates ask for it, and no client sends it."""
    names: dict[Any, str] = {}
    for message in messages:
        names |= {call.get("id"): call["function"]["name"] for call in message.get("tool_calls") or ()}
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]
    return messages


def _parse_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"`{where}.role` must be a string, such as user", where)
    for name in ("function_call", "audio"):
        if message.get(name):
            raise RequestError(f"`{where}.{name}` is not supported by this server: send text content and `tool_calls` only", where)
    made = {**message, "content": _parse_content(message.get("content"), message["role"], where)}
    made.pop("tool_calls", None)
    if message.get("tool_calls"):
        made["tool_calls"] = _parse_calls(message["tool_calls"], f"{where}.tool_calls")
    if isinstance(message.get("tool_call_id"), list | dict):
        raise RequestError(f"`{where}.tool_call_id` must be a string", where)
    if isinstance(thought := message.get("reasoning_content") or message.get("reasoning"), str):
        made |= {"reasoning_content": thought, "reasoning": thought}  # templates know the first name, newer clients send the second
    return made


def _parse_content(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""  # OpenAI allows an assistant that said nothing
    if not isinstance(content, list):
        raise RequestError(f"`{where}.content` must be a string or a list of text parts", where)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"`{where}.content` holds a part that is not text ({kind!r}): this model reads text only", where)
    return "\n".join(part["text"] for part in content)  # a line each, as vLLM joins them


def _parse_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(f"`{where}` must be a list", where)
    made = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"`{where}[{i}].function` must have a name, and arguments", where)
        if not isinstance(call.get("id"), str | None):
            raise RequestError(f"`{where}[{i}].id` must be a string", where)
        made.append(history_call(call.get("id"), function["name"], function.get("arguments"), f"{where}[{i}].function.arguments"))
    return made


def history_call(id: str | None, name: str, arguments: Any, where: str) -> dict[str, Any]:
    """A call that was made earlier, as templates read it. Raises RequestError for arguments that are no JSON object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError(f"`{where}` is not valid JSON", where) from None
    if not isinstance(arguments, dict | None):
        raise RequestError(f"`{where}` must be a JSON object", where)
    given = {} if id is None else {"id": id}
    return {**given, "type": "function", "function": {"name": name, "arguments": Arguments(arguments or {})}}


async def encode_messages(engine: EngineLike, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
    """The conversation's token ids, through the chat template."""
    tokenizer = tokenizer_of(engine)
    size = sum(len(message["content"]) for message in messages) + len(encode(options.get("tools", [])))
    return await off_loop(size, lambda: tokenizer.chat(messages, **options))


def template_options(body: Any) -> dict[str, Any]:
    """What a body with ChatBody's three template fields says to the chat template."""
    extra = body.chat_template_kwargs or {}
    if clash := sorted(_RESERVED & extra.keys()):
        raise RequestError(f"`chat_template_kwargs` must not set {clash[0]}", "chat_template_kwargs")
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        raise RequestError("`continue_final_message` and `add_generation_prompt` exclude each other", "continue_final_message")
    begins = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    return {**extra, "add_generation_prompt": begins, "continue_final_message": goes_on}


def effort_options(engine: EngineLike, effort: str | None) -> dict[str, Any]:
    """What `reasoning_effort` says to this model's chat template. Raises RequestError if it says nothing to it."""
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise RequestError(f"`reasoning_effort` must be one of {', '.join(_EFFORTS)}", "reasoning_effort")
    text = "".join(tokenizer_of(engine).chat_templates.values())
    if "reasoning_effort" in text:
        return {"reasoning_effort": effort}
    if "enable_thinking" in text:
        return {"enable_thinking": effort != "none"}
    if effort == "none":
        return {}
    raise RequestError("`reasoning_effort` says nothing to this model's chat template: leave it out, or send none", "reasoning_effort")


_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
