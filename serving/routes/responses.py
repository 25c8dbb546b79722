"""POST /v1/responses: OpenAI's Responses, for text. Answers are stored, with the conversation that led to them, and another request may go
on from one by `previous_response_id`; they are kept in memory by the engine's process, the oldest going first.
"""

import json
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, ClassVar
from uuid import uuid4

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, WithJsonSchema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import Completion, Output, Request, RequestError, SamplingParams
from serving import shapes
from serving.context import Context
from serving.errors import ApiError, encode, json_response
from serving.openapi import documented
from serving.protocol import DrawingBody, EngineLike, Int, check, fit, make_request, said, sampling_params, truncated
from serving.routes.chat import encode_messages
from serving.stream import respond
from serving.structured import ResponsesFormat, asked
from serving.usage import Usage

_ITEMS = {"type": "array", "items": {"type": "object"}, "minItems": 1}
Input = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _ITEMS]})]
_TEXT_PARTS = ("input_text", "output_text", "text")


class TextOptions(BaseModel):
    """The field `text`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: ResponsesFormat | None = None


class ResponseBody(DrawingBody):
    """POST /v1/responses."""

    input: Input | None = said("A text, or a list of messages whose content is text or text parts.")
    instructions: str | None = said("A system message; it is not carried over to later responses.")
    max_output_tokens: Int | None = said("Tokens to generate at most; as many as fit unless given.")
    previous_response_id: str | None = said("Go on after this stored response.")
    store: bool | None = said("Keep the response for later; on unless false.")
    metadata: dict[str, str] | None = said("Kept with the response and given back.")
    text: TextOptions | None = said(
        "With `format`: the form of the answer, text, json_object, or json_schema with name and schema beside it."
    )
    user: str | None = said("Given back; has no other effect.")

    refused: ClassVar[dict[str, tuple]] = {
        **DrawingBody.refused,
        "background": (False,),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "parallel_tool_calls": (True, False),
        "prompt": (),
        "reasoning": ({},),
        "response_format": (),
        "service_tier": ("auto", "default"),
        "structured_outputs": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
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


async def prepare(context: Context, body: ResponseBody) -> "ResponseAnswer":
    """Everything checked and encoded, nothing started. Raises ApiError or RequestError."""
    engine, before = context.engine, []
    if body.previous_response_id is not None:
        before = (await _recall(context, body.previous_response_id, "previous_response_id"))["messages"]
    conversation = [*before, *parse_input(body.input)]
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    ids = truncated(engine, body, await encode_messages(engine, [*system, *conversation], {}), body.max_output_tokens)
    form = asked(body.text.format if body.text else None, param="text.format")
    params = sampling_params(engine, body, fit(engine, len(ids), body.max_output_tokens), None, structured_outputs=form)
    answer = ResponseAnswer(context, body, conversation, params)
    request = make_request(answer.id, ids, params, body)
    await check(engine, request)
    answer.requests.append(request)
    return answer


def parse_input(given: Any) -> list[dict[str, Any]]:
    """The messages of `input`. Raises RequestError naming the item at fault."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError("`input` must be a text or a list of messages, and not empty", "input")
    return [_parse_item(item, f"input[{i}]") for i, item in enumerate(given)]


def _parse_item(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise RequestError(f"`{where}` must be a message: other items are not supported by this server yet", "input")
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise RequestError(f"`{where}.role` must be user, assistant, system or developer", "input")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
                raise RequestError(f"`{where}.content` holds a part that is not text: this model reads text only", "input")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(f"`{where}.content` must be a text or a list of text parts", "input")
    return {"role": "system" if role == "developer" else role, "content": content}  # developer is what OpenAI calls system now


class ResponseAnswer:
    """One request's answer in the response shape; serving.stream drives it."""

    def __init__(self, context: Context, body: ResponseBody, conversation: list[dict[str, Any]], params: SamplingParams):
        self.id = f"resp_{uuid4().hex}"
        self.requests: list[Request] = []
        self._context, self._body, self._conversation = context, body, conversation
        self._item_id = f"msg_{uuid4().hex}"
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._text: list[str] = []
        self._end: Completion | None = None
        self._count = 0
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": context.engine.model_name,
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": params.temperature,
            "text": {"format": _format(body)},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def streams(self, engine: EngineLike) -> list[AsyncGenerator[Output, None]]:
        return [engine.generate(request) for request in self.requests]

    async def whole(self, outputs: list[Output], usage: Usage) -> dict:
        ((completion,),) = (output.outputs for output in outputs)
        return await self._finish(completion, completion.text, usage)

    async def _finish(self, end: Completion, text: str, usage: Usage) -> dict:
        """The complete response, stored if it is to be."""
        cut = end.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed") | {
            "completed_at": int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(text, "incomplete" if cut else "completed")],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        if self._body.store is not False:
            messages = [*self._conversation, {"role": "assistant", "content": text}]
            await self._context.memory.keep(self.id, encode({"response": response, "messages": messages}).encode())
        return response

    def _response(self, status: str) -> dict[str, Any]:
        unknown = {"completed_at": None, "error": None, "incomplete_details": None, "output": [], "usage": None}
        return self._head | {"status": status} | unknown

    def _item(self, text: str | None, status: str) -> dict:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, **data: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._count, **data}
        self._count += 1
        return f"event: {kind}\ndata: {encode(body)}\n\n".encode()

    def first(self, i: int, output: Output) -> bytes:
        return b"".join(
            (
                self._event("response.created", response=self._response("in_progress")),
                self._event("response.in_progress", response=self._response("in_progress")),
                self._event("response.output_item.added", output_index=0, item=self._item(None, "in_progress")),
                self._event("response.content_part.added", **self._place, part=_part("")),
            )
        )

    def event(self, i: int, completion: Completion, usage: Usage) -> bytes:
        self._end = completion
        self._text.append(completion.text)
        if not completion.text:
            return b""
        return self._event("response.output_text.delta", **self._place, delta=completion.text, logprobs=[])

    async def last(self, usage: Usage) -> bytes:
        assert self._end is not None
        text = "".join(self._text)
        response = await self._finish(self._end, text, usage)
        return b"".join(
            (
                self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
                self._event("response.content_part.done", **self._place, part=_part(text)),
                self._event("response.output_item.done", output_index=0, item=response["output"][0]),
                self._event(f"response.{response['status']}", response=response),
            )
        )

    def failed(self, error: ApiError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param, **error.body)


def _format(body: ResponseBody) -> dict[str, Any]:
    """The form asked for, as it is given back."""
    format = body.text.format if body.text else None
    return {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)


def _part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
