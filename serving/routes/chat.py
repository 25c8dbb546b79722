"""POST /v1/chat/completions: messages through the model's chat template in, assistant messages out (chat_answer.py)."""

from typing import Any, ClassVar

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import RequestError
from serving import shapes
from serving.context import Context
from serving.conversation import effort_options, encode_messages, parse_messages, template_options
from serving.openapi import documented
from serving.protocol import EngineLike, Int, SamplingBody, check, fit, make_request, said, sampling_params, truncated
from serving.reading import reading
from serving.routes.chat_answer import ChatAnswer, ReadChatAnswer
from serving.stream import respond
from serving.structured import asked as asked_form
from serving.tools import Choice, chat_tools


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] | None = said("The conversation: role and content each, content being text or a list of text parts.")
    max_completion_tokens: Int | None = said("The newer name of max_tokens.")
    logprobs: bool | None = said("Give each token's log-probability.")
    top_logprobs: Int | None = said("With logprobs: so many likeliest tokens at each place.")
    add_generation_prompt: bool | None = said("End the prompt with the beginning of an answer; on unless false.")
    continue_final_message: bool | None = said("Go on with the last message in place of answering it.")
    chat_template_kwargs: dict[str, Any] | None = said("Variables for the chat template, such as enable_thinking.")
    tools: list[Any] | None = said("Functions that the model may call: name, description and the JSON schema of their parameters.")
    tool_choice: Choice | None = said("none, auto, required, or the function to call; auto if there are tools.")
    parallel_tool_calls: bool | None = said("Whether one answer may hold several calls; true unless false.")
    include_reasoning: bool | None = said("Give what the model thought beside its answer; on unless false.")
    reasoning_effort: str | None = said("How much to think, for chat templates that know it: none, minimal, low, medium, high.")

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
        "prediction": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
    }


def add(app: FastAPI, context: Context) -> None:
    @app.post("/v1/chat/completions", **documented(ChatBody, shapes.ChatAnswer, events=True))
    async def chat(http: HttpRequest) -> Response:
        async def work(body: ChatBody) -> Response:
            return await respond(http, context, await prepare(context, body), stream=bool(body.stream))

        return await context.post(http, ChatBody, work)


async def prepare(context: Context, body: ChatBody) -> ChatAnswer:
    """Everything checked and encoded, nothing started. Raises ApiError or RequestError."""
    engine, asked = context.engine, _max_tokens(context.engine, body)
    tools = chat_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    options = template_options(body) | effort_options(engine, body.reasoning_effort) | tools.template
    ids = truncated(engine, body, await encode_messages(engine, parse_messages(body.messages), options), asked)
    how = await reading(engine.tokenizer, context.parsers, tools, ids, asked_form(body.response_format, body.structured_outputs))
    params = sampling_params(engine, body, fit(engine, len(ids), asked), _logprobs(body), **(how.params if how else {}))
    head = (engine, body, context.fingerprint)
    answer = ChatAnswer(*head) if how is None else ReadChatAnswer(*head, how)
    request = make_request(answer.id, ids, params, body)
    await check(engine, request)
    answer.requests.append(request)
    return answer


def _max_tokens(engine: EngineLike, body: ChatBody) -> int | None:
    asked = {value for value in (body.max_tokens, body.max_completion_tokens) if value is not None}
    if len(asked) > 1:
        raise RequestError("`max_tokens` and `max_completion_tokens` mean the same: send one of them", "max_tokens")
    return asked.pop() if asked else engine.default_params.get("max_tokens")


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("`top_logprobs` is only allowed when `logprobs` is true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
