"""POST /v1/responses: OpenAI's Responses, for text and functions. Answers (responses_answer.py) are stored, with the conversation that led
to them, and another request may go on from one by `previous_response_id`; they are kept in memory by the engine's process, the oldest
going first.
"""

import json
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, WithJsonSchema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import RequestError
from serving import shapes
from serving.context import Context
from serving.conversation import Arguments, effort_options, encode_messages, history_call, with_names
from serving.errors import ApiError, json_response
from serving.openapi import documented
from serving.protocol import DrawingBody, Int, check, fit, make_request, said, sampling_params, truncated
from serving.reading import reading
from serving.routes.responses_answer import ResponseAnswer
from serving.stream import respond
from serving.structured import ResponsesFormat, asked
from serving.tools import Choice, responses_tools

_ITEMS = {"type": "array", "items": {"type": "object"}, "minItems": 1}
Input = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _ITEMS]})]
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class TextOptions(BaseModel):
    """The field `text`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: ResponsesFormat | None = None


class ResponseBody(DrawingBody):
    """POST /v1/responses."""

    input: Input | None = said("A text, or a list of items: messages of text, reasoning, function calls and their outputs.")
    instructions: str | None = said("A system message; it is not carried over to later responses.")
    max_output_tokens: Int | None = said("Tokens to generate at most; as many as fit unless given.")
    previous_response_id: str | None = said("Go on after this stored response.")
    store: bool | None = said("Keep the response for later; on unless false.")
    metadata: dict[str, str] | None = said("Kept with the response and given back.")
    text: TextOptions | None = said(
        "With `format`: the form of the answer, text, json_object, or json_schema with name and schema beside it."
    )
    user: str | None = said("Given back; has no other effect.")
    tools: list[Any] | None = said("Functions that the model may call: name, description and the JSON schema of their parameters.")
    tool_choice: Choice | None = said("none, auto, required, or the function to call; auto if there are tools.")
    parallel_tool_calls: bool | None = said("Whether one answer may hold several calls; true unless false.")
    reasoning: dict[str, Any] | None = said("effort: how much to think, for chat templates that know it: none, minimal, low, medium, high.")

    refused: ClassVar[dict[str, tuple]] = {
        **DrawingBody.refused,
        "background": (False,),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "prompt": (),
        "response_format": (),
        "service_tier": ("auto", "default"),
        "structured_outputs": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
    harmless: ClassVar[frozenset[str]] = DrawingBody.harmless | {"stream_options"}


def add(app: FastAPI, context: Context) -> None:
    @app.post("/v1/responses", **documented(ResponseBody, shapes.ResponseAnswer, events=True))
    async def create(http: HttpRequest) -> Response:
        async def work(body: ResponseBody) -> Response:
            return await respond(http, context, await prepare(context, body), stream=bool(body.stream))

        return await context.post(http, ResponseBody, work)

    @app.get("/v1/responses/{response_id}", **documented(None, shapes.ResponseAnswer, 404, 503))
    async def retrieve(response_id: str) -> Response:
        return json_response((await _recall(context, response_id))["response"])

    @app.delete("/v1/responses/{response_id}", **documented(None, shapes.DeletedResponse, 404, 503))
    async def delete(response_id: str) -> Response:
        await _recall(context, response_id)
        await context.memory.keep(response_id, None)
        return json_response({"id": response_id, "object": "response", "deleted": True})


async def _recall(context: Context, response_id: str, param: str | None = None) -> dict[str, Any]:
    found = await context.memory.recall(response_id)
    if found is None:
        raise ApiError(404, f"There is no stored response {response_id}: it was never stored, or others have taken its place", param=param)
    return json.loads(found)


async def prepare(context: Context, body: ResponseBody) -> ResponseAnswer:
    """Everything checked and encoded, nothing started. Raises ApiError or RequestError."""
    engine, before = context.engine, []
    if body.previous_response_id is not None:
        before = _reread((await _recall(context, body.previous_response_id, "previous_response_id"))["messages"])
    tools = responses_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    conversation = with_names([*before, *parse_input(body.input)])
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    options = effort_options(engine, _effort(body.reasoning)) | tools.template
    ids = truncated(engine, body, await encode_messages(engine, [*system, *conversation], options), body.max_output_tokens)
    form = asked(body.text.format if body.text else None, param="text.format")
    how = await reading(engine.tokenizer, context.parsers, tools, ids, form)
    changes = {"structured_outputs": form} | (how.params if how else {})
    params = sampling_params(engine, body, fit(engine, len(ids), body.max_output_tokens), None, **changes)
    answer = ResponseAnswer(context, body, conversation, params, tools, how)
    request = make_request(answer.id, ids, params, body)
    await check(engine, request)
    answer.requests.append(request)
    return answer


def _effort(reasoning: dict[str, Any] | None) -> str | None:
    given = {name: value for name, value in (reasoning or {}).items() if value is not None}
    if unknown := sorted(given.keys() - {"effort"}):
        raise RequestError(f"`reasoning.{unknown[0]:.60}` is not supported by this server: send `effort` only", "reasoning")
    if not isinstance(given.get("effort"), str | None):
        raise RequestError("`reasoning.effort` must be a string", "reasoning")
    return given.get("effort")


def _reread(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored messages, with their calls as they were before they were written as JSON."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = Arguments(call["function"]["arguments"])
    return messages


def parse_input(given: Any) -> list[dict[str, Any]]:
    """The messages of `input`. Raises RequestError naming the item at fault."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError("`input` must be a text or a list of items, and not empty", "input")
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        _add_item(messages, item, f"input[{i}]")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Items of one turn of the assistant's are one message to chat templates: what it thought, said and called."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    match kind:
        case "message":
            message = _parse_message(item, where)
            if message["role"] == "assistant" and (opened := _open_turn(messages)) and not opened["content"] and "tool_calls" not in opened:
                opened["content"] = message["content"]
            else:
                messages.append(message)
        case "reasoning":
            thought = "".join(_texts(item.get("content") or item.get("summary") or [], f"{where}.content"))
            messages.append({"role": "assistant", "content": "", "reasoning_content": thought, "reasoning": thought})
        case "function_call":
            turn = _open_turn(messages)
            if turn is None:
                messages.append(turn := {"role": "assistant", "content": ""})
            id, name = item.get("call_id"), item.get("name")
            if not isinstance(id, str) or not isinstance(name, str):
                raise RequestError(f"`{where}` must have call_id and name", "input")
            turn.setdefault("tool_calls", []).append(history_call(id, name, item.get("arguments"), f"{where}.arguments"))
        case "function_call_output":
            if not isinstance(item.get("call_id"), str):
                raise RequestError(f"`{where}.call_id` must be a string", "input")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _content(item.get("output"), f"{where}.output")})
        case _:
            raise RequestError(
                f"`{where}` must be a message, reasoning, function_call or function_call_output: this server knows no other items", "input"
            )


def _open_turn(messages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The assistant's turn that the conversation ends in, if it does."""
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else None


def _parse_message(item: dict[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise RequestError(f"`{where}.role` must be user, assistant, system or developer", "input")
    # developer is what OpenAI calls system now
    return {"role": "system" if role == "developer" else role, "content": _content(item.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"`{where}` must be a text or a list of text parts", "input")
    return "\n".join(_texts(content, where))


def _texts(parts: Any, where: str) -> list[str]:
    if not isinstance(parts, list):
        raise RequestError(f"`{where}` must be a list of text parts", "input")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RequestError(f"`{where}` holds a part that is not text: this model reads text only", "input")
    return [part["text"] for part in parts]
