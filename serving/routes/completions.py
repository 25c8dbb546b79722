"""POST /v1/completions: prompts (texts or token ids) in, continuations out, in OpenAI's text_completion shape with vLLM's extras.

`prepare` checks every prompt before any starts. The choice of prompt i and continuation j has index i * n + j.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar
from uuid import uuid4

from fastapi import FastAPI
from msgspec.structs import replace
from pydantic import WithJsonSchema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import Completion, Output, Request, RequestError, SamplingParams, TokenLogprobs
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

MAX_PROMPTS = 1024  # in one request
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_SEVERAL = {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}, "minItems": 1, "maxItems": MAX_PROMPTS}
Prompt = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _IDS, _SEVERAL]})]


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompt | None = said("A text, a list of texts, token ids, or a list of lists of them.")
    echo: bool | None = said("Give the prompt back before its continuation.")
    logprobs: Int | None = said("Log-probabilities of the answer: so many likeliest tokens at each place.")
    best_of: Int | None = said("Must equal n: this server returns every choice it makes.")
    add_special_tokens: bool | None = said("Begin a text prompt with the model's begin token; on unless false.")

    refused: ClassVar[dict[str, tuple]] = {
        **SamplingBody.refused,
        "prompt_embeds": (),
        "suffix": ("",),
    }


def add(app: FastAPI, context: Context) -> None:
    @app.post("/v1/completions", **documented(CompletionBody, shapes.CompletionAnswer, events=True))
    async def completions(http: HttpRequest) -> Response:
        async def work(body: CompletionBody) -> Response:
            return await respond(http, context, await prepare(context, body), stream=bool(body.stream))

        return await context.post(http, CompletionBody, work)


def parse_prompt(prompt: Any) -> list[str | list[int]]:
    """The prompts, as texts or token ids. Raises RequestError for anything but a string, strings, token ids or lists of token ids."""
    if prompt is None:
        raise RequestError("`prompt` is missing", "prompt")
    if isinstance(prompt, str) or _is_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and (all(isinstance(p, str) for p in prompt) or all(_is_ids(p) for p in prompt)):
        if len(prompt) > MAX_PROMPTS:
            raise RequestError(f"`prompt` holds {len(prompt)} prompts; at most {MAX_PROMPTS} are allowed in one request", "prompt")
        return prompt
    raise RequestError("`prompt` must be a string, a list of strings, a list of token ids, or a list of such lists, none empty", "prompt")


def _is_ids(value: Any) -> bool:
    # type() rather than isinstance: true and false are ints to Python, but no token ids.
    return isinstance(value, list) and bool(value) and all(type(v) is int and 0 <= v < 2**31 for v in value)


async def prepare(context: Context, body: CompletionBody) -> "CompletionAnswer":
    """Everything checked and encoded, nothing started. Raises ApiError or RequestError."""
    engine, n = context.engine, 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise RequestError(f"`best_of` must equal `n`, but {body.best_of} != {n}: this server returns every choice it makes", "best_of")
    if body.echo:
        tokenizer_of(engine)  # which says the prompt's text
    answer = CompletionAnswer(engine, body, context.fingerprint)
    for i, prompt in enumerate(parse_prompt(body.prompt)):
        ids = truncated(engine, body, await encode_prompt(engine, prompt, body.add_special_tokens is not False), _asked(engine, body))
        text = prompt if isinstance(prompt, str) and body.truncate_prompt_tokens is None else None
        request = make_request(f"{answer.id}-{i}", ids, _params(engine, body, len(ids)), body, text)
        await check(engine, request)
        answer.requests.append(request)
    return answer


async def encode_prompt(engine: EngineLike, prompt: str | list[int], special: bool) -> list[int]:
    """Token ids of a text; ids as they are."""
    if not isinstance(prompt, str):
        return prompt
    tokenizer = tokenizer_of(engine)
    return await off_loop(len(prompt), lambda: tokenizer.encode(prompt, add_special_tokens=special))


def _asked(engine: EngineLike, body: CompletionBody) -> int:
    return body.max_tokens if body.max_tokens is not None else engine.default_params.get("max_tokens", 16)


def _params(engine: EngineLike, body: CompletionBody, prompt_tokens: int) -> SamplingParams:
    asked = _asked(engine, body)
    if asked == 0 and body.echo:
        asked = 1  # the engine always makes one; CompletionAnswer.streams drops it
    changes = {}
    if body.echo and body.logprobs is not None:
        changes["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return sampling_params(engine, body, fit(engine, prompt_tokens, asked), body.logprobs, **changes)


class CompletionAnswer:
    """One request's choices in the text_completion shape; serving.stream drives it."""

    def __init__(self, engine: EngineLike, body: CompletionBody, fingerprint: str):
        self.id = f"cmpl-{uuid4().hex}"
        self.requests: list[Request] = []
        self._body, self._tokenizer = body, engine.tokenizer
        self._n = 1 if body.n is None else body.n
        self._head = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": engine.model_name,
            "system_fingerprint": fingerprint,
        }
        self._frame = Frame(self._head, body.include_usage, body.continuous_usage)
        self._offsets: dict[int, int] = {}  # choice -> characters of token text before its next token

    def streams(self, engine: EngineLike) -> list[AsyncGenerator[Output, None]]:
        outputs = [engine.generate(request) for request in self.requests]
        return [_prompt_only(stream) for stream in outputs] if self._body.max_tokens == 0 else outputs

    async def whole(self, outputs: list[Output], usage: Usage) -> dict:
        choices = [self._choice(i, output, c) for i, output in enumerate(outputs) for c in output.outputs]
        return {**self._head, "choices": choices, "usage": usage.body()}

    def _choice(self, i: int, output: Output, completion: Completion) -> dict:
        index = i * self._n + completion.index
        entries, ids = completion.logprobs, completion.token_ids
        if self._body.echo and self._body.logprobs is not None:
            entries, ids = (*_prompt_entries(output), *(entries or ())), output.prompt_token_ids + ids
        choice = {
            "index": index,
            "text": (self._echo(output) if self._body.echo else "") + completion.text,
            "logprobs": self._logprobs(index, entries, ids),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
        if self._body.return_token_ids:
            choice |= {"token_ids": completion.token_ids, "prompt_token_ids": output.prompt_token_ids}
        return choice

    def first(self, i: int, output: Output) -> bytes:
        """With `echo` or `return_token_ids`, the prompt as the first event of every choice."""
        if not self._body.echo and not self._body.return_token_ids:
            return b""
        entries = _prompt_entries(output) if self._body.echo and self._body.logprobs is not None else None
        echo = Completion(text=self._echo(output) if self._body.echo else "")
        prompt = output.prompt_token_ids
        return b"".join(self._event(i * self._n + j, echo, entries, prompt, None, prompt) for j in range(self._n))

    def event(self, i: int, completion: Completion, usage: Usage) -> bytes:
        return self._event(i * self._n + completion.index, completion, completion.logprobs, completion.token_ids, usage)

    def _event(self, index: int, completion: Completion, entries, ids, usage: Usage | None, prompt: Sequence[int] | None = None) -> bytes:
        logprobs = "null" if entries is None else encode(self._logprobs(index, entries, ids))
        end = '"finish_reason":null,"stop_reason":null'
        if completion.finish_reason is not None:
            end = f'"finish_reason":"{completion.finish_reason}","stop_reason":{encode(completion.stop_reason)}'
        if self._body.return_token_ids:
            end += f',"token_ids":{encode(completion.token_ids)},"prompt_token_ids":{encode(prompt)}'
        return self._frame.choice(f'{{"index":{index},"text":{encode(completion.text)},"logprobs":{logprobs},{end}}}', usage)

    async def last(self, usage: Usage) -> bytes:
        return self._frame.last(usage)

    def failed(self, error: ApiError) -> bytes:
        return self._frame.failed(error)

    def _echo(self, output: Output) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._tokenizer.decode(list(output.prompt_token_ids), skip_special_tokens=self._body.skip_special_tokens is not False)

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs | None] | None, ids: tuple[int, ...]) -> dict | None:
        """OpenAI's four lists; `text_offset` counts characters of token texts from the choice's beginning."""
        if entries is None or self._body.logprobs is None:
            return None
        body: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(index, 0)
        for entry, token in zip(entries, ids, strict=True):
            # The first token of a prompt has no entry: nothing predicts it.
            text = entry[0].text if entry else self._text(token)
            body["tokens"].append(f"token_id:{token}" if self._body.return_tokens_as_token_ids else text)
            body["token_logprobs"].append(finite(entry[0]) if entry else None)
            body["top_logprobs"].append(self._top(entry) if entry else None)
            body["text_offset"].append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return body

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Text -> log-probability of the likeliest tokens and the chosen one. Of tokens with one text the likeliest counts."""
        top = {}
        for logprob in (*entry[1 : 1 + (self._body.logprobs or 0)], entry[0]):
            name = f"token_id:{logprob.token_id}" if self._body.return_tokens_as_token_ids else logprob.text
            top.setdefault(name, finite(logprob))
        return top

    def _text(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.token_text(token)


def _prompt_entries(output: Output) -> Sequence[TokenLogprobs | None]:
    return output.prompt_logprobs or (None,)  # an engine has nothing to say about a prompt of one token


async def _prompt_only(stream: AsyncGenerator[Output, None]) -> AsyncGenerator[Output, None]:
    """`stream` without what was generated: for `echo` with max_tokens 0, which asks about the prompt only."""
    async with aclosing(stream):
        async for output in stream:
            emptied = (replace(c, text="", token_ids=(), logprobs=None, stop_reason=None) for c in output.outputs)
            yield replace(output, outputs=tuple(replace(c, finish_reason=c.finish_reason and "length") for c in emptied))
