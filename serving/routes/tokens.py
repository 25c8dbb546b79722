"""POST /tokenize and /detokenize: text or messages to token ids and back, with vLLM's fields."""

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import RequestError
from serving import shapes
from serving.context import Context
from serving.conversation import encode_messages, parse_messages, template_options
from serving.errors import json_response
from serving.openapi import documented
from serving.protocol import Body, EngineLike, Int, off_loop, said, tokenizer_of
from serving.routes.completions import encode_prompt
from serving.tools import chat_tools


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages."""

    prompt: str | None = said("A text to encode.")
    messages: list[dict[str, Any]] | None = said("A conversation to encode through the chat template.")
    add_special_tokens: bool | None = said("Begin a text with the model's begin token; on unless false. Not for messages.")
    return_token_strs: bool | None = said("Give each token's text too.")
    add_generation_prompt: bool | None = said("End the messages with the beginning of an answer; on unless false.")
    continue_final_message: bool | None = said("Leave the last message open.")
    chat_template_kwargs: dict[str, Any] | None = said("Variables for the chat template.")
    tools: list[Any] | None = said("The tools that the messages come with, as /v1/chat/completions takes them.")


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[Int] | None = said("Token ids.")


def add(app: FastAPI, context: Context) -> None:
    @app.post("/tokenize", **documented(TokenizeBody, shapes.TokenizeAnswer))
    async def tokenize(http: HttpRequest) -> Response:
        async def work(body: TokenizeBody) -> Response:
            return json_response(await _tokenize(context.engine, body))

        return await context.post(http, TokenizeBody, work)

    @app.post("/detokenize", **documented(DetokenizeBody, shapes.DetokenizeAnswer))
    async def detokenize(http: HttpRequest) -> Response:
        async def work(body: DetokenizeBody) -> Response:
            ids, tokenizer = _known_ids(context.engine, body.tokens), tokenizer_of(context.engine)
            return json_response({"prompt": await off_loop(len(ids), lambda: tokenizer.decode(ids, skip_special_tokens=False))})

        return await context.post(http, DetokenizeBody, work)


async def _tokenize(engine: EngineLike, body: TokenizeBody) -> dict:
    tokenizer = tokenizer_of(engine)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either `prompt` or `messages`", "prompt")
    if body.prompt is not None:
        ids = await encode_prompt(engine, body.prompt, body.add_special_tokens is not False)
    else:
        if body.add_special_tokens:
            raise RequestError("`add_special_tokens` is for `prompt`: the chat template writes them itself", "add_special_tokens")
        ids = await encode_messages(
            engine, parse_messages(body.messages), template_options(body) | chat_tools(body.tools, None, None).template
        )
    texts = {"token_strs": [tokenizer.token_text(token) for token in ids]} if body.return_token_strs else {}
    return {"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids, **texts}


def _known_ids(engine: EngineLike, ids: list[int] | None) -> list[int]:
    if ids is None:
        raise RequestError("`tokens` is missing", "tokens")
    vocab = engine.vocab_size
    if outside := [i for i in ids if not 0 <= i < vocab]:
        raise RequestError(f"tokens holds token id {outside[0]}, but the vocabulary has ids 0 to {vocab - 1}", "tokens")
    return ids
