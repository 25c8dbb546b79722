"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages, for text and tools.

A last message of the assistant's is continued. The answer's shape is in messages_answer.py.

Errors keep the one shape of this server, which Anthropic's clients read as well.
"""

from typing import Annotated, Any, ClassVar

from fastapi import FastAPI
from pydantic import WithJsonSchema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import RequestError
from serving import shapes
from serving.context import Context
from serving.conversation import effort_options, encode_messages, history_call, with_names
from serving.errors import json_response
from serving.openapi import documented
from serving.protocol import DrawingBody, EngineLike, Int, check, fit, make_request, said, sampling_params, stop_strings, truncated
from serving.reading import reading
from serving.routes.messages_answer import MessagesAnswer
from serving.stream import respond
from serving.tools import Tools, messages_tools

System = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})]


class MessagesBody(DrawingBody):
    """POST /v1/messages."""

    messages: list[dict[str, Any]] | None = said("The conversation: role and content each, content being text or a list of text blocks.")
    system: System | None = said("The system prompt: a text, or a list of text blocks.")
    max_tokens: Int | None = said("Tokens to generate at most; Anthropic's clients must send it, and so must others.")
    stop_sequences: list[str] | None = said("Strings that end the answer.")
    tools: list[Any] | None = said("Tools that the model may use: name, description and input_schema.")
    tool_choice: dict[str, Any] | None = said("none, auto, any or tool as type, with name for the last; disable_parallel_tool_use.")
    thinking: dict[str, Any] | None = said("disabled or adaptive as type; a model that thinks does so unless it can be told not to.")

    refused: ClassVar[dict[str, tuple]] = {
        **DrawingBody.refused,
        "container": (),
        "context_management": (),
        "mcp_servers": ([],),
        "output_config": (),
        "output_format": (),
        "response_format": (),
        "service_tier": ("auto", "standard_only"),
        "structured_outputs": (),
    }
    harmless: ClassVar[frozenset[str]] = DrawingBody.harmless | {"metadata"}


def add(app: FastAPI, context: Context) -> None:
    @app.post("/v1/messages", **documented(MessagesBody, shapes.MessagesAnswer, events=True))
    async def messages(http: HttpRequest) -> Response:
        async def work(body: MessagesBody) -> Response:
            return await respond(http, context, await prepare(context, body), stream=bool(body.stream))

        return await context.post(http, MessagesBody, work)

    @app.post("/v1/messages/count_tokens", **documented(MessagesBody, shapes.CountAnswer))
    async def count_tokens(http: HttpRequest) -> Response:
        async def work(body: MessagesBody) -> Response:
            tools = messages_tools(body.tools, body.tool_choice)
            return json_response({"input_tokens": len(await _encode(context.engine, body, tools))})

        return await context.post(http, MessagesBody, work)


async def prepare(context: Context, body: MessagesBody) -> MessagesAnswer:
    """Everything checked and encoded, nothing started. Raises ApiError or RequestError."""
    engine = context.engine
    if body.max_tokens is None:
        raise RequestError("`max_tokens` is missing", "max_tokens")
    tools = messages_tools(body.tools, body.tool_choice)
    ids = truncated(engine, body, await _encode(engine, body, tools), body.max_tokens)
    how = await reading(engine.tokenizer, context.parsers, tools, ids)
    stop = stop_strings(body.stop_sequences or [], "stop_sequences")
    fitting = fit(engine, len(ids), body.max_tokens)
    params = sampling_params(engine, body, fitting, None, stop=stop, **(how.params if how else {}))
    answer = MessagesAnswer(engine, how, shows_thoughts=_thinking(body) != "disabled")
    request = make_request(answer.id, ids, params, body)
    await check(engine, request)
    answer.requests.append(request)
    return answer


def _thinking(body: MessagesBody) -> str | None:
    kind = None if body.thinking is None else body.thinking.get("type")
    if body.thinking is not None and kind not in ("disabled", "adaptive"):
        raise RequestError("`thinking.type` must be disabled or adaptive: a budget of thinking cannot be kept to", "thinking")
    return kind


async def _encode(engine: EngineLike, body: MessagesBody, tools: Tools) -> list[int]:
    if not body.messages:
        raise RequestError("`messages` must hold at least one message", "messages")
    parsed = [_parse_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    conversation = with_names([message for messages in parsed for message in messages])
    system = [] if body.system is None else [{"role": "system", "content": _text(body.system, "system")}]
    goes_on = conversation[-1]["role"] == "assistant"
    if goes_on and conversation[-1].get("tool_calls"):
        raise RequestError("`messages` end in a tool_use, which only a tool_result can follow", "messages")
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    options |= effort_options(engine, "none" if _thinking(body) == "disabled" else None) | tools.template
    return await encode_messages(engine, [*system, *conversation], options)


def _parse_message(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages that one of Anthropic's is to chat templates: each result of a tool is one of its own, before the text."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise RequestError(f"`{where}.role` must be user or assistant", where)
    if not isinstance(content, list):
        return [{"role": role, "content": _text(content, f"{where}.content")}]
    special = {"user": ("tool_result",), "assistant": ("tool_use", "thinking")}[role]
    kinds = [block.get("type") if isinstance(block, dict) else None for block in content]
    text = _text([block for block, kind in zip(content, kinds, strict=True) if kind not in special], f"{where}.content")
    found = [(f"{where}.content[{i}]", content[i], kind) for i, kind in enumerate(kinds) if kind in special]
    if role == "user":
        results = [_result(block, at) for at, block, _ in found]
        return [*results, *([{"role": "user", "content": text}] if text or not results else [])]
    made: dict[str, Any] = {"role": "assistant", "content": text}
    if calls := [_call(block, at) for at, block, kind in found if kind == "tool_use"]:
        made["tool_calls"] = calls
    if thoughts := "".join(str(block.get("thinking", "")) for _, block, kind in found if kind == "thinking"):
        made["reasoning_content"] = made["reasoning"] = thoughts
    return [made]


def _result(block: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(block.get("tool_use_id"), str):
        raise RequestError(f"`{where}.tool_use_id` must be a string", where)
    text = _text(block.get("content") or "", f"{where}.content")
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": f"Error: {text}" if block.get("is_error") else text}


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    id, name = block.get("id"), block.get("name")
    if not isinstance(id, str) or not isinstance(name, str) or not isinstance(block.get("input"), dict):
        raise RequestError(f"`{where}` must have id, name and input", where)
    return history_call(id, name, block["input"], f"{where}.input")


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"`{where}` must be a text or a list of text blocks", where)
    for block in content:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise RequestError(f"`{where}` holds a block that is not text: this model reads text only", where)
    return "\n".join(block["text"] for block in content)
