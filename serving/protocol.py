"""What clients send and how they are refused: the request bodies, the one error shape, and the way from a body to SamplingParams.

Bodies are validated strictly, straight from the bytes (a string is not a number, NaN is not a number). Fields outside the models are
sorted by `parse`: one that we know and do not honour is refused, one that nobody knows is accepted and reported to the caller. What only
the engine can judge (the vocabulary, the largest logprobs) is left to `engine.check`.
"""

import asyncio
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxllm.config import EngineConfig
from jaxllm.request import Logprob, Request, RequestError, SamplingParams, TokenLogprobs

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_SHORT = reprlib.Repr(maxlevel=2, maxstring=60, maxother=60, maxlong=40)
MAX_STOP = 32  # stop strings a request may have: each is looked for after every token


class EngineLike(Protocol):
    """What the server asks of an engine, be it in this process or a test's fake."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def model_name(self) -> str: ...
    @property
    def model_path(self) -> Any: ...
    @property
    def default_params(self) -> dict[str, Any]: ...
    @property
    def config(self) -> EngineConfig: ...
    @property
    def healthy(self) -> bool: ...
    def check(self, request: Request) -> None: ...
    def generate(self, request: Request) -> Any: ...  # an async generator of Output; closing it aborts the request
    def close(self) -> None: ...


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape. `code` is a word that clients match on; most errors have none."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        kind = _ERROR_TYPES.get(self.status, "APIError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class SamplingBody(BaseModel):
    """The fields that both completion routes share. None, like an absent field, means the default."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: Int | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    min_tokens: Int | None = None
    stop: Any = None  # a string or a list of them: see _stop_strings
    stop_token_ids: list[Int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[Int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    prompt_logprobs: Int | None = None
    skip_special_tokens: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.get("include_usage"))


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Any = None  # str | [str] | [int] | [[int]]: see completions.parse_prompt
    echo: bool | None = None
    logprobs: Int | None = None
    best_of: Int | None = None
    add_special_tokens: bool | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# Fields we know and do not honour, each with the values that ask for nothing; None always does.
_REFUSED_EVERYWHERE: dict[str, tuple] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "documents": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "repetition_detection": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
REFUSED: dict[type, dict[str, tuple]] = {
    CompletionBody: _REFUSED_EVERYWHERE | {"prompt_embeds": (), "response_format": ({"type": "text"},), "suffix": ("",)},
    ChatBody: _REFUSED_EVERYWHERE
    | {
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
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": (),
        "verbosity": (),
        "web_search_options": (),
    },
}
# Known, and without any effect on the answer by their own definition.
_HARMLESS = {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "include_reasoning"}


def parse[Body: SamplingBody](kind: type[Body], raw: bytes) -> tuple[Body, list[str]]:
    """The body and the names of its unknown fields. Raises ApiError 400 for what is malformed, RequestError for what is not honoured."""
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _malformed(error) from None
    ignored = []
    for name, value in (body.model_extra or {}).items():
        neutral = REFUSED[kind].get(name)
        if neutral is not None:
            if value is not None and value not in neutral:
                raise RequestError(f"`{name}` is not supported by this server yet: leave it out{_or_one_of(neutral)}", name)
        elif name not in _HARMLESS:
            ignored.append(name)
    return body, ignored + _check_stream_options(body)


def _or_one_of(neutral: tuple) -> str:
    return "".join(f", or send {value!r}" for value in neutral)


def _check_stream_options(body: SamplingBody) -> list[str]:
    """Names of the unknown options. Raises RequestError for options that cannot be honoured."""
    if body.stream_options is None:
        return []
    if not body.stream:
        raise RequestError("`stream_options` is only allowed when `stream` is true", "stream_options")
    for name in ("include_usage", "continuous_usage_stats"):
        if not isinstance(body.stream_options.get(name, False), bool | None):
            raise RequestError(f"`stream_options.{name}` must be true or false", f"stream_options.{name}")
    if body.stream_options.get("continuous_usage_stats"):
        raise RequestError("`stream_options.continuous_usage_stats` is not supported by this server yet: leave it out", "stream_options")
    return [f"stream_options.{name}" for name in body.stream_options if name not in ("include_usage", "continuous_usage_stats")]


def _malformed(error: ValidationError) -> ApiError:
    first, *others = error.errors(include_url=False, include_context=False)
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return ApiError(400, "The body must be a JSON object")
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    what = first["msg"].replace("Input should", "should").replace("Input", "it")
    value = _SHORT.repr(first["input"])
    more = f" (and {len(others)} more)" if others else ""
    return ApiError(400, f"`{where}`: {what}, but it is {value}{more}", param=str(first["loc"][0]))


def check_model(engine: EngineLike, name: str | None) -> None:
    """Raises ApiError 404 unless `name` is the served model or absent."""
    if name is not None and name != engine.model_name:
        raise ApiError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")


def fit(engine: EngineLike, prompt_tokens: int, max_tokens: int | None) -> int:
    """`max_tokens` clamped to what the context leaves (None: all of it). Raises ApiError 400 if not one token fits."""
    room = engine.max_model_len - prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"The prompt has {prompt_tokens} tokens, but this model's maximum context length is {engine.max_model_len} tokens, of which at "
            f"least one is for the answer: at most {engine.max_model_len - 1} fit",
            param="prompt",
            code="context_length_exceeded",
        )
    return room if max_tokens is None else min(max_tokens, room)


def sampling_params(engine: EngineLike, body: SamplingBody, max_tokens: int, logprobs: int | None, **changes: Any) -> SamplingParams:
    """What the request says, over the model's own defaults. Raises RequestError for a value out of range."""
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("`prompt_logprobs` is not available with `stream`: leave one of them out", "prompt_logprobs")
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if body.stop is not None:
        given["stop"] = _stop_strings(body.stop)
    return SamplingParams(**{**engine.default_params, **given, "max_tokens": max_tokens, "logprobs": logprobs, **changes})


# What goes over as it is; stop has two spellings, and max_tokens and logprobs differ by route.
_SAMPLING = (SamplingBody.model_fields.keys() & {field.name for field in fields(SamplingParams)}) - {"max_tokens", "stop"}


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise RequestError("`stop` must be a string or a list of strings", "stop")
    if len(strings) > MAX_STOP:
        raise RequestError(f"`stop` holds {len(strings)} strings; at most {MAX_STOP} are allowed", "stop")
    return tuple(strings)


def tokenizer_of(engine: EngineLike) -> Any:
    """The engine's tokenizer. Raises RequestError if it runs without one."""
    if engine.tokenizer is None:
        raise RequestError("This model was loaded without a tokenizer: send token ids to /v1/completions", "prompt")
    return engine.tokenizer


async def off_loop[T](size: int, work: Callable[[], T]) -> T:
    """`work()`, in a thread when its input has so many characters that it would keep every stream waiting for milliseconds."""
    return await asyncio.to_thread(work) if size > 20_000 else work()


def finite(logprob: Logprob) -> float:
    """A log-probability as JSON can say it: a token that was impossible has minus infinity, for which clients expect -9999."""
    return max(logprob.logprob, -9999.0)


def prompt_logprobs_body(entries: Sequence[TokenLogprobs | None] | None) -> list | None:
    """vLLM's `prompt_logprobs`: for every prompt token its likeliest ids and the token itself, None for the first."""
    return None if entries is None else [entry and {str(lp.token_id): _prompt_logprob(lp) for lp in entry} for entry in entries]


def _prompt_logprob(lp: Logprob) -> dict:
    return {"logprob": finite(lp), "rank": lp.rank, "decoded_token": lp.text}
