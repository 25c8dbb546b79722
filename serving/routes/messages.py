"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages, for text. A last message of the assistant's is continued.

Errors keep the one shape of this server, which Anthropic's clients read as well.
"""

from collections.abc import AsyncGenerator
from typing import Annotated, Any, ClassVar
from uuid import uuid4

from fastapi import FastAPI
from pydantic import WithJsonSchema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import Completion, Output, Request, RequestError
from serving import shapes
from serving.context import Context
from serving.errors import ApiError, encode, json_response
from serving.openapi import documented
from serving.protocol import DrawingBody, EngineLike, Int, fit, make_request, said, sampling_params, stop_strings, truncated
from serving.routes.chat import encode_messages
from serving.stream import respond
from serving.usage import Usage

System = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})]


class MessagesBody(DrawingBody):
    """POST /v1/messages."""

    messages: list[dict[str, Any]] | None = said("The conversation: role and content each, content being text or a list of text blocks.")
    system: System | None = said("The system prompt: a text, or a list of text blocks.")
    max_tokens: Int | None = said("Tokens to generate at most; Anthropic's clients must send it, and so must others.")
    stop_sequences: list[str] | None = said("Strings that end the answer.")

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
        "thinking": ({"type": "disabled"},),
        "tool_choice": ({"type": "none"}, {"type": "auto"}),
        "tools": ([],),
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
            return json_response({"input_tokens": len(await _encode(context.engine, body))})

        return await context.post(http, MessagesBody, work)


async def prepare(context: Context, body: MessagesBody) -> "MessagesAnswer":
    """Everything checked and encoded, nothing started. Raises ApiError or RequestError."""
    engine = context.engine
    if body.max_tokens is None:
        raise RequestError("`max_tokens` is missing", "max_tokens")
    ids = truncated(engine, body, await _encode(engine, body), body.max_tokens)
    stop = stop_strings(body.stop_sequences or [], "stop_sequences")
    params = sampling_params(engine, body, fit(engine, len(ids), body.max_tokens), None, stop=stop)
    answer = MessagesAnswer(engine)
    request = make_request(answer.id, ids, params, body)
    engine.check(request)
    answer.requests.append(request)
    return answer


async def _encode(engine: EngineLike, body: MessagesBody) -> list[int]:
    if not body.messages:
        raise RequestError("`messages` must hold at least one message", "messages")
    conversation = [_parse_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    system = [] if body.system is None else [{"role": "system", "content": _text(body.system, "system")}]
    goes_on = conversation[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    return await encode_messages(engine, [*system, *conversation], options)


def _parse_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if message.get("role") not in ("user", "assistant"):
        raise RequestError(f"`{where}.role` must be user or assistant", where)
    return {"role": message["role"], "content": _text(message.get("content"), f"{where}.content")}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"`{where}` must be a text or a list of text blocks", where)
    for block in content:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise RequestError(f"`{where}` holds a block that is not text: this model reads text only", where)
    return "\n".join(block["text"] for block in content)


class MessagesAnswer:
    """One request's answer in Anthropic's message shape; serving.stream drives it."""

    def __init__(self, engine: EngineLike):
        self.id = f"msg_{uuid4().hex}"
        self.requests: list[Request] = []
        self._model = engine.model_name
        self._end: Completion | None = None

    def streams(self, engine: EngineLike) -> list[AsyncGenerator[Output, None]]:
        return [engine.generate(request) for request in self.requests]

    async def whole(self, outputs: list[Output], usage: Usage) -> dict:
        ((completion,),) = (output.outputs for output in outputs)
        return self._message([{"type": "text", "text": completion.text}], usage) | _stop(completion)

    def _message(self, content: list[dict], usage: Usage) -> dict:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "content": content}
        return head | {"stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}

    def first(self, i: int, output: Output) -> bytes:
        usage = Usage(1)
        usage.add(0, Output(output.request_id, None, output.prompt_token_ids, (), False, num_cached_tokens=output.num_cached_tokens))
        start = _event("message_start", message=self._message([], usage))
        return start + _event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def event(self, i: int, completion: Completion, usage: Usage) -> bytes:
        self._end = completion
        if not completion.text:
            return b""
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": completion.text})

    async def last(self, usage: Usage) -> bytes:
        assert self._end is not None
        delta = _event("message_delta", delta=_stop(self._end), usage=_usage(usage))
        return _event("content_block_stop", index=0) + delta + _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        return _event("error", **error.body)


def _event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: {encode({'type': kind, **data})}\n\n".encode()


def _stop(end: Completion) -> dict:
    by_string = isinstance(end.stop_reason, str)
    reason = "max_tokens" if end.finish_reason == "length" else "stop_sequence" if by_string else "end_turn"
    return {"stop_reason": reason, "stop_sequence": end.stop_reason if by_string else None}


def _usage(usage: Usage) -> dict:
    """Anthropic counts the tokens read from a cache by themselves."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
