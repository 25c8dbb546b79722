"""POST /v1/chat/completions: messages through the model's chat template in, assistant messages out, in OpenAI's chat.completion shape.

Roles and further message fields are the template's to judge; this module makes every content a string and refuses what is not text.
"""

import time
from collections.abc import AsyncGenerator
from typing import Any, ClassVar
from uuid import uuid4

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import Completion, Logprob, Output, Request, RequestError
from serving import shapes
from serving.context import Context
from serving.errors import ApiError, encode
from serving.frame import Frame
from serving.openapi import documented
from serving.protocol import (
    EngineLike,
    Int,
    SamplingBody,
    check,
    finite,
    fit,
    make_request,
    off_loop,
    prompt_logprobs_body,
    said,
    sampling_params,
    tokenizer_of,
    truncated,
)
from serving.stream import respond
from serving.usage import Usage

# What `chat_template_kwargs` may not set: names that have a meaning to us, not to the template.
_RESERVED = {"self", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "tools", "documents"}


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] | None = said("The conversation: role and content each, content being text or a list of text parts.")
    max_completion_tokens: Int | None = said("The newer name of max_tokens.")
    logprobs: bool | None = said("Give each token's log-probability.")
    top_logprobs: Int | None = said("With logprobs: so many likeliest tokens at each place.")
    add_generation_prompt: bool | None = said("End the prompt with the beginning of an answer; on unless false.")
    continue_final_message: bool | None = said("Go on with the last message in place of answering it.")
    chat_template_kwargs: dict[str, Any] | None = said("Variables for the chat template, such as enable_thinking.")

    refused: ClassVar[dict[str, tuple]] = {
        **SamplingBody.refused,
        # The template writes the special tokens; adding them once more would double the first.
        "add_special_tokens": (False,),
        "audio": (),
        "chat_template": (),
        "echo": (False,),
        "function_call": ("none",),
        "functions": (),
        "metadata": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": (),
        "verbosity": (),
        "web_search_options": (),
    }
    harmless: ClassVar[frozenset[str]] = SamplingBody.harmless | {"include_reasoning"}


def add(app: FastAPI, context: Context) -> None:
    @app.post("/v1/chat/completions", **documented(ChatBody, shapes.ChatAnswer, events=True))
    async def chat(http: HttpRequest) -> Response:
        async def work(body: ChatBody) -> Response:
            return await respond(http, context, await prepare(context, body), stream=bool(body.stream))

        return await context.post(http, ChatBody, work)


def parse_messages(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The messages with every content a string. Raises RequestError naming the message at fault."""
    if not messages:
        raise RequestError("`messages` must hold at least one message", "messages")
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _parse_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"`{where}.role` must be a string, such as user", where)
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise RequestError(f"`{where}.{name}` is not supported by this server yet: send text content only", where)
    return {**message, "content": _parse_content(message.get("content"), message["role"], where)}


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


async def prepare(context: Context, body: ChatBody) -> "ChatAnswer":
    """Everything checked and encoded, nothing started. Raises ApiError or RequestError."""
    engine, asked = context.engine, _max_tokens(context.engine, body)
    ids = truncated(engine, body, await encode_messages(engine, parse_messages(body.messages), template_options(body)), asked)
    params = sampling_params(engine, body, fit(engine, len(ids), asked), _logprobs(body))
    answer = ChatAnswer(engine, body, context.fingerprint)
    request = make_request(answer.id, ids, params, body)
    await check(engine, request)
    answer.requests.append(request)
    return answer


async def encode_messages(engine: EngineLike, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
    """The conversation's token ids, through the chat template."""
    tokenizer = tokenizer_of(engine)
    size = sum(len(message["content"]) for message in messages)
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


def _max_tokens(engine: EngineLike, body: ChatBody) -> int | None:
    asked = {value for value in (body.max_tokens, body.max_completion_tokens) if value is not None}
    if len(asked) > 1:
        raise RequestError("`max_tokens` and `max_completion_tokens` mean the same: send one of them", "max_tokens")
    return asked.pop() if asked else engine.default_params.get("max_tokens")


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("`top_logprobs` is only allowed when `logprobs` is true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


class ChatAnswer:
    """One request's choices in the chat.completion shape; serving.stream drives it."""

    def __init__(self, engine: EngineLike, body: ChatBody, fingerprint: str):
        self.id = f"chatcmpl-{uuid4().hex}"
        self.requests: list[Request] = []
        self._body, self._tokenizer = body, engine.tokenizer
        self._head = {
            "id": self.id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": engine.model_name,
            "system_fingerprint": fingerprint,
        }
        self._frame = Frame(self._head, body.include_usage, body.continuous_usage)

    def streams(self, engine: EngineLike) -> list[AsyncGenerator[Output, None]]:
        return [engine.generate(request) for request in self.requests]

    async def whole(self, outputs: list[Output], usage: Usage) -> dict:
        (output,) = outputs
        body = {**self._head, "choices": [self._choice(completion) for completion in output.outputs], "usage": usage.body()}
        if self._body.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
        return body

    def _choice(self, completion: Completion) -> dict:
        ids = {"token_ids": completion.token_ids} if self._body.return_token_ids else {}
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **ids,
        }

    def first(self, i: int, output: Output) -> bytes:
        """The role, once for every choice, before any text."""
        start = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        if self._body.return_token_ids:
            start += f',"prompt_token_ids":{encode(output.prompt_token_ids)}'
        return b"".join(self._frame.choice(f'{{"index":{j},{start}}}') for j in range(1 if self._body.n is None else self._body.n))

    def event(self, i: int, completion: Completion, usage: Usage) -> bytes:
        logprobs = "null" if completion.logprobs is None else encode(self._logprobs(completion))
        end = "null" if completion.finish_reason is None else f'"{completion.finish_reason}","stop_reason":{encode(completion.stop_reason)}'
        if self._body.return_token_ids:
            end += f',"token_ids":{encode(completion.token_ids)}'
        delta = f'"delta":{{"content":{encode(completion.text)}}}'
        return self._frame.choice(f'{{"index":{completion.index},{delta},"logprobs":{logprobs},"finish_reason":{end}}}', usage)

    async def last(self, usage: Usage) -> bytes:
        return self._frame.last(usage)

    def failed(self, error: ApiError) -> bytes:
        return self._frame.failed(error)

    def _logprobs(self, completion: Completion) -> dict | None:
        """OpenAI's chat logprobs: each chosen token with the likeliest ones beside it."""
        if completion.logprobs is None:
            return None
        content = [self._token(chosen) | {"top_logprobs": [self._token(t) for t in top]} for chosen, *top in completion.logprobs]
        return {"content": content, "refusal": None}

    def _token(self, logprob: Logprob) -> dict:
        # A token may be a part of a character: then only its bytes are exact.
        text = f"token_id:{logprob.token_id}" if self._body.return_tokens_as_token_ids else logprob.text
        return {"token": text, "logprob": finite(logprob), "bytes": list(self._tokenizer.token_bytes(logprob.token_id))}
