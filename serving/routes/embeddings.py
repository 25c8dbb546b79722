"""POST /v1/embeddings, /v1/score and /v1/rerank: the hidden state of a text's last token as a vector, and texts compared by it.

Any decoder can be asked; whether its vectors are of use is for the model to have been trained for. Scores are cosines of the two vectors.
"""

import base64
import struct
import time
from collections.abc import Sequence
from typing import Any, Literal
from uuid import uuid4

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import Output, Request, RequestError, SamplingParams
from jaxllm.vectors import cosine, shortened
from serving import shapes
from serving.context import Context
from serving.errors import json_response
from serving.openapi import documented
from serving.protocol import Int, PromptBody, Strings, fit, said, truncated
from serving.routes.completions import Prompt, encode_prompt, parse_prompt
from serving.stream import gather

_PARAMS = SamplingParams(max_tokens=1, temperature=0.0)


class EmbeddingBody(PromptBody):
    """POST /v1/embeddings."""

    input: Prompt | None = said("A text, a list of texts, token ids, or a list of lists of them.")
    encoding_format: Literal["float", "base64"] | None = said("Numbers, or base64 of little-endian float32.")
    dimensions: Int | None = said("Keep the first so many numbers, and make the vector's length 1 again.", ge=1)
    add_special_tokens: bool | None = said("Begin a text with the model's begin token; on unless false.")


class ScoreBody(PromptBody):
    """POST /v1/score: one text with each of several, or each with its partner."""

    text_1: Strings | None = said("A text, or a list of texts.")
    text_2: Strings | None = said("A text, or a list of texts: as many as in text_1, unless that is one.")


class RerankBody(PromptBody):
    """POST /v1/rerank."""

    query: str | None = said("What is looked for.")
    documents: list[str] | None = said("The texts to sort by how near they are to the query.")
    top_n: Int | None = said("Return only so many; 0 is all.", ge=0)
    return_documents: bool | None = said("Give the texts back; on unless false.")


def add(app: FastAPI, context: Context) -> None:
    @app.post("/v1/embeddings", **documented(EmbeddingBody, shapes.EmbeddingAnswer))
    async def embeddings(http: HttpRequest) -> Response:
        async def work(body: EmbeddingBody) -> Response:
            prompts = _prompts(body.input, "input")
            outputs = await _embed(http, context, body, prompts, body.add_special_tokens is not False)
            data = [{"object": "embedding", "index": i, "embedding": _encoded(body, output)} for i, output in enumerate(outputs)]
            return json_response({**_head(context, "embd"), "data": data, "usage": _usage(outputs)})

        return await context.post(http, EmbeddingBody, work)

    @app.post("/score", include_in_schema=False)
    @app.post("/v1/score", **documented(ScoreBody, shapes.ScoreAnswer))
    async def score(http: HttpRequest) -> Response:
        async def work(body: ScoreBody) -> Response:
            left, right = _texts(body.text_1, "text_1"), _texts(body.text_2, "text_2")
            if len(left) not in (1, len(right)):
                raise RequestError(f"`text_1` has {len(left)} texts and `text_2` {len(right)}: send as many, or one `text_1`", "text_1")
            outputs = await _embed(http, context, body, [*left, *right])
            ones, others = outputs[: len(left)], outputs[len(left) :]
            pairs = zip(ones * len(right) if len(left) == 1 else ones, others, strict=True)
            data = [{"object": "score", "index": i, "score": _cosine(a, b)} for i, (a, b) in enumerate(pairs)]
            return json_response({**_head(context, "score"), "data": data, "usage": _usage(outputs)})

        return await context.post(http, ScoreBody, work)

    @app.post("/rerank", include_in_schema=False)
    @app.post("/v1/rerank", **documented(RerankBody, shapes.RerankAnswer))
    async def rerank(http: HttpRequest) -> Response:
        async def work(body: RerankBody) -> Response:
            if body.query is None:
                raise RequestError("`query` is missing", "query")
            texts = _texts(body.documents, "documents")
            outputs = await _embed(http, context, body, [body.query, *texts])
            scores = [_cosine(outputs[0], output) for output in outputs[1:]]
            best = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or None]
            shown = body.return_documents is not False
            results = [{"index": i, "relevance_score": scores[i]} | ({"document": {"text": texts[i]}} if shown else {}) for i in best]
            return json_response(
                {"id": f"rerank-{uuid4().hex}", "model": context.engine.model_name, "results": results, "usage": _usage(outputs)}
            )

        return await context.post(http, RerankBody, work)


def _prompts(given: Any, name: str) -> list[str | list[int]]:
    try:
        return parse_prompt(given)
    except RequestError as error:
        raise RequestError(str(error).replace("`prompt`", f"`{name}`"), name) from None


def _texts(given: Any, name: str) -> list[str]:
    prompts = _prompts(given, name)
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError(f"`{name}` must be a text or a list of texts", name)
    return prompts  # pyright: ignore[reportReturnType]


async def _embed(
    http: HttpRequest, context: Context, body: PromptBody, prompts: Sequence[str | list[int]], special: bool = True
) -> list[Output]:
    """Every prompt's Output, with its embedding. Nothing starts before everything is checked."""
    engine, requests, id = context.engine, [], uuid4().hex
    for i, prompt in enumerate(prompts):
        ids = truncated(engine, body, await encode_prompt(engine, prompt, special), 1)
        fit(engine, len(ids), 1)
        request = Request(f"embd-{id}-{i}", ids, _PARAMS, stream=False, embed=True, priority=body.priority or 0, cache_salt=body.cache_salt)
        engine.check(request)
        requests.append(request)
    return await gather(http, context, requests)


def _vector(output: Output, dimensions: int | None = None) -> tuple[float, ...]:
    assert output.embedding is not None
    return output.embedding if dimensions is None else shortened(output.embedding, dimensions)


def _cosine(a: Output, b: Output) -> float:
    return cosine(_vector(a), _vector(b))


def _encoded(body: EmbeddingBody, output: Output) -> list[float] | str:
    vector = _vector(output, body.dimensions)
    if body.encoding_format != "base64":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _head(context: Context, kind: str) -> dict:
    return {"id": f"{kind}-{uuid4().hex}", "object": "list", "created": int(time.time()), "model": context.engine.model_name}


def _usage(outputs: Sequence[Output]) -> dict:
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
