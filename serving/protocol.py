"""What clients send: how a body is read and refused, the sampling fields that all generating routes share, and the way to SamplingParams.

Bodies are validated strictly, straight from the bytes (a string is not a number, NaN is not a number). Fields outside the models are
sorted by `parse`: one that we know and do not honour is refused, one that nobody knows is accepted and reported to the caller, or refused
where the server is strict. What only the engine can judge (the vocabulary, the largest logprobs) is left to `engine.check`.
"""

import asyncio
import reprlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from jaxllm.config import EngineConfig
from jaxllm.request import Logprob, Request, RequestError, SamplingParams, Stats, TokenLogprobs
from serving.errors import ApiError
from serving.structured import ResponseFormat, StructuredBody, asked

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Strings = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})]
_SHORT = reprlib.Repr(maxlevel=2, maxstring=60, maxother=60, maxlong=40)
OFF_LOOP = 20_000  # characters
MAX_STOP = 32  # stop strings a request may have: each is looked for after every token


class EngineLike(Protocol):
    """What the server asks of an engine, be it in this process, in another, or a test's fake."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
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
    def generate(self, request: Request) -> Any: ...  # an async generator: closing it aborts the request
    def stats(self) -> Stats | Awaitable[Stats]: ...
    def forget(self) -> Awaitable[None] | None: ...
    def profile(self, folder: str | None) -> Awaitable[None] | None: ...  # starts one, or ends it; RuntimeError if that cannot be
    def close(self) -> None: ...


def said(what: str, **limits: Any) -> Any:
    """An optional field, and the sentence that /docs and docs/server.md say of it. None, like an absent field, means the default."""
    return Field(default=None, description=what, **limits)


class Body(BaseModel):
    """What all bodies have.

    refused: fields we know and do not honour, each with the values that ask for nothing; None always does. harmless: known, and without
    any effect on the answer by their own definition.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    refused: ClassVar[dict[str, tuple]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset({"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})

    model: str | None = said("The served model's name; any other is a 404.")


class PromptBody(Body):
    """What every body has that becomes a prompt."""

    truncate_prompt_tokens: Int | None = said("Keep only so many of the prompt's last tokens; -1: as many as fit.", ge=-1)
    priority: Int | None = said("The smallest is served first, under --scheduling-policy priority.")
    cache_salt: str | None = said("Share cached pages only with prompts of the same salt.")


class DrawingBody(PromptBody):
    """How tokens are drawn, on every route that generates: OpenAI's fields and vLLM's."""

    temperature: float | None = said("0 takes the likeliest token; up to 2.")
    top_p: float | None = said("Draw from the likeliest tokens that have this probability together.")
    top_k: Int | None = said("Draw from so many likeliest tokens; 0 and -1 are off.")
    min_p: float | None = said("Draw from tokens at least so likely, as a fraction of the likeliest one's probability.")
    presence_penalty: float | None = said("Lowers every token that was produced already, once.")
    frequency_penalty: float | None = said("Lowers every token by how often it was produced.")
    repetition_penalty: float | None = said("Divides the logits of tokens in prompt and answer; 1 is off.")
    seed: Int | None = said("Makes sampling repeatable, whatever else is in the batch.")
    min_tokens: Int | None = said("No end before so many tokens.")
    stop_token_ids: list[Int] | None = said("Token ids that end the answer.")
    ignore_eos: bool | None = said("Go on after the model's own end token.")
    include_stop_str_in_output: bool | None = said("Keep the stop string in the text.")
    logit_bias: dict[Int, Annotated[float, Field(ge=-100, le=100)]] | None = said("Token id to what is added to its logit.")
    allowed_token_ids: list[Int] | None = said("Draw no other token.")
    bad_words: list[str] | None = said("Texts that must not be drawn.")
    skip_special_tokens: bool | None = said("Leave special tokens out of the text.")
    spaces_between_special_tokens: bool | None = said("Has no effect: this server's detokenizers put no spaces there.")
    stream: bool | None = said("Send the answer token by token, as server-sent events.")

    refused: ClassVar[dict[str, tuple]] = {
        "documents": (),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_json": (),
        "guided_regex": (),
        "kv_transfer_params": (),
        "length_penalty": (1,),
        "logprob_token_ids": ([],),
        "mm_processor_kwargs": ({},),
        "repetition_detection": (),
        "request_id": (),
        "stream_interval": (1,),
        "thinking_token_budget": (),
        "truncation_side": ("left",),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
    }


class SamplingBody(DrawingBody):
    """What the two completion routes share."""

    stream_options: dict[str, Any] | None = said("With stream: include_usage and continuous_usage_stats, each true or false.")
    max_tokens: Int | None = said("Tokens to generate at most.")
    n: Int | None = said("How many continuations of each prompt.")
    stop: Strings | None = said(f"Strings that end the answer, {MAX_STOP} at most.")
    prompt_logprobs: Int | None = said("Log-probabilities of the prompt: so many likeliest tokens at each place. Not with stream.")
    return_tokens_as_token_ids: bool | None = said('Write the tokens of logprobs as "token_id:N".')
    return_token_ids: bool | None = said("Give the ids of prompt and answer beside their text.")
    response_format: ResponseFormat | None = said("The form of the answer: text, json_object, or json_schema with its name and schema.")
    structured_outputs: StructuredBody | None = said("The form of the answer: exactly one of json, regex, choice, grammar, json_object.")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.get("include_usage"))

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.get("continuous_usage_stats"))


def parse[B: Body](kind: type[B], raw: bytes, strict: bool = False) -> tuple[B, list[str]]:
    """The body and the names of its unknown fields, of which there are none if `strict`.

    Raises ApiError 400 for what is malformed, RequestError for what is not honoured.
    """
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _malformed(error) from None
    ignored = []
    for name, value in (body.model_extra or {}).items():
        neutral = kind.refused.get(name)
        if neutral is not None:
            if value is not None and value not in neutral:
                instead = _INSTEAD.get(name, f"leave it out{_or_one_of(neutral)}")
                raise RequestError(f"`{name}` is not supported by this server yet: {instead}", name)
        elif name not in kind.harmless:
            ignored.append(name)
    if isinstance(body, SamplingBody):
        ignored += _check_stream_options(body)
    if strict and ignored:
        raise RequestError(
            f"`{_SHORT.repr(ignored[0])[1:-1]}` is no field of this route, and this server refuses unknown fields", ignored[0]
        )
    return body, ignored


_FORM = "say the answer's form by `structured_outputs` on the completion routes, by `text.format` on /v1/responses"
_INSTEAD: dict[str, str] = dict.fromkeys(
    ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "response_format"), _FORM
)


def _or_one_of(neutral: tuple) -> str:
    return "".join(f", or send {value!r}" for value in neutral)


def _check_stream_options(body: SamplingBody) -> list[str]:
    """Names of the unknown options. Raises RequestError for options that cannot be honoured."""
    known = ("include_usage", "continuous_usage_stats")
    if body.stream_options is None:
        return []
    if not body.stream:
        raise RequestError("`stream_options` is only allowed when `stream` is true", "stream_options")
    for name in known:
        if not isinstance(body.stream_options.get(name, False), bool | None):
            raise RequestError(f"`stream_options.{name}` must be true or false", f"stream_options.{name}")
    return [f"stream_options.{name}" for name in body.stream_options if name not in known]


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


def truncated(engine: EngineLike, body: PromptBody, ids: Sequence[int], max_tokens: int | None) -> tuple[int, ...]:
    """The last tokens of the prompt, as many as `truncate_prompt_tokens` says. -1 leaves room for `max_tokens`."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return tuple(ids)
    if keep == 0:
        raise RequestError("`truncate_prompt_tokens` of 0 leaves no prompt: send at least 1, or -1", "truncate_prompt_tokens")
    if keep == -1:
        keep = max(engine.max_model_len - max(max_tokens or 1, 1), 1)
    return tuple(ids[-keep:])


def sampling_params(engine: EngineLike, body: DrawingBody, max_tokens: int, logprobs: int | None, **changes: Any) -> SamplingParams:
    """What the request says, over the model's own defaults. Raises RequestError for a value out of range."""
    given = {name: value for name in _SAMPLING if (value := getattr(body, name, None)) is not None}
    if body.stream and "prompt_logprobs" in given:
        raise RequestError("`prompt_logprobs` is not available with `stream`: leave one of them out", "prompt_logprobs")
    if isinstance(body, SamplingBody):
        given["structured_outputs"] = asked(body.response_format, body.structured_outputs)
        if body.stop is not None:
            given["stop"] = stop_strings(body.stop)
    return SamplingParams(**{**engine.default_params, **given, "max_tokens": max_tokens, "logprobs": logprobs, **changes})


# What goes over as it is; stop and the answer's form have several spellings, and max_tokens and logprobs differ by route.
_OTHERWISE = {"max_tokens", "stop", "structured_outputs"}
_SAMPLING = (SamplingBody.model_fields.keys() & {field.name for field in fields(SamplingParams)}) - _OTHERWISE


async def check(engine: EngineLike, request: Request) -> None:
    """`engine.check`, in a thread where it compiles a form."""
    await off_loop(0 if request.params.structured_outputs is None else OFF_LOOP, lambda: engine.check(request))


def stop_strings(stop: Any, name: str = "stop") -> tuple[str, ...]:
    """The strings of the field `name`. Raises RequestError for what are none, or too many."""
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise RequestError(f"`{name}` must be a string or a list of strings", name)
    if len(strings) > MAX_STOP:
        raise RequestError(f"`{name}` holds {len(strings)} strings; at most {MAX_STOP} are allowed", name)
    return tuple(strings)


def make_request(id: str, ids: Sequence[int], params: SamplingParams, body: PromptBody, text: str | None = None) -> Request:
    """The engine's request for one prompt of `body`."""
    stream = bool(getattr(body, "stream", False))
    return Request(id, tuple(ids), params, text, stream, priority=body.priority or 0, cache_salt=body.cache_salt)


def tokenizer_of(engine: EngineLike) -> Any:
    """The engine's tokenizer. Raises RequestError if it runs without one."""
    if engine.tokenizer is None:
        raise RequestError("This model was loaded without a tokenizer: send token ids to /v1/completions", "prompt")
    return engine.tokenizer


async def off_loop[T](size: int, work: Callable[[], T]) -> T:
    """`work()`, in a thread when its input has so many characters that it would keep every stream waiting for milliseconds."""
    return await asyncio.to_thread(work) if size >= OFF_LOOP else work()


def finite(logprob: Logprob) -> float:
    """A log-probability as JSON can say it: a token that was impossible has minus infinity, for which clients expect -9999."""
    return max(logprob.logprob, -9999.0)


def prompt_logprobs_body(entries: Sequence[TokenLogprobs | None] | None) -> list | None:
    """vLLM's `prompt_logprobs`: for every prompt token its likeliest ids and the token itself, None for the first."""
    return None if entries is None else [entry and {str(lp.token_id): _prompt_logprob(lp) for lp in entry} for entry in entries]


def _prompt_logprob(lp: Logprob) -> dict:
    return {"logprob": finite(lp), "rank": lp.rank, "decoded_token": lp.text}
