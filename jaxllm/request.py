"""What a caller asks and what comes back: SamplingParams, Request, Output, and the error tree. Plain data, no JAX.

JaxllmError
├── ConfigError        the options, the checkpoint or the machine do not fit together: fatal at start
├── RequestError       this request can never be served as asked: a 400
├── OverloadedError    too many requests wait already; later it may be served: a 429
└── EngineDeadError    the engine stopped; nothing will be answered any more: a 503
"""

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_BIAS = 300  # logit_bias entries a row keeps on the device
MAX_BAD_WORDS = 128  # each is compared with the text so far before every token
MAX_SALT = 128  # characters
MAX_STOP_IDS = 64  # stop and eos ids a row keeps on the device, to ban them before min_tokens
MAX_GRAMMAR = 200_000  # characters of a grammar or schema: llguidance reads about as many in a tenth of a second


class JaxllmError(Exception):
    """Base of every error that jaxllm raises on purpose; its text is one sentence meant for the user."""


class ConfigError(JaxllmError, ValueError):
    """Options, checkpoint and machine do not fit together."""


class RequestError(JaxllmError, ValueError):
    """The request can never be served as asked. `param` names the field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class OverloadedError(JaxllmError, RuntimeError):
    """The queue is full: the request was not taken, and may be sent again later."""


class EngineDeadError(JaxllmError, RuntimeError):
    """The engine has stopped and will answer nothing more."""


@dataclass(frozen=True)
class StructuredOutputs:
    """The form an answer must have: exactly one of these, with vLLM's names.

    json: a JSON schema, as text or as the object it is; kept as text. regex: the whole answer matches it (Rust's syntax, without
    lookaround). choice: it is one of these texts. grammar: it is a `start` of this llguidance grammar, which is much like Lark's, may
    embed schemas (`%json {...}`) and name special tokens (`<|name|>`). json_object: it is some JSON object.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self):
        if self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", json.dumps(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        if len(self.named) != 1:
            listed = ", ".join(self.named) or "none"
            raise RequestError(
                f"structured_outputs must hold exactly one of json, regex, choice, grammar and json_object, but it holds {listed}",
                "structured_outputs",
            )
        if (not self.choice and self.choice is not None) or any(not text for text in self.choice or ()):
            raise RequestError("structured_outputs.choice must name at least one text, and none that is empty", "structured_outputs")
        if (size := sum(map(len, self.choice)) if self.choice else len(str(getattr(self, self.kind)))) > MAX_GRAMMAR:
            raise RequestError(
                f"structured_outputs.{self.kind} has {size} characters; at most {MAX_GRAMMAR} are allowed", "structured_outputs"
            )

    @property
    def named(self) -> tuple[str, ...]:
        """The names of what is given."""
        return tuple(name for name in ("json", "regex", "choice", "grammar", "json_object") if getattr(self, name) is not None)

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return self.named[0]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, with vLLM's names, defaults and meanings.

    temperature 0 is greedy; top_k 0 or -1 and top_p 1 are off. `logprobs=n` returns the chosen token's
    log-probability and the n likeliest (0: the chosen one only), of the model's own distribution before
    temperature and penalties; `prompt_logprobs` the same for every prompt token. `seed` makes a request's
    tokens the same whatever else is in the batch. `max_tokens=None` means as many as fit. `allowed_token_ids`
    are the only ones that may be drawn; `bad_words` are texts that may not, each as the tokens that spell it.
    `structured_outputs` is the form that the answer must have. `shown_special_token_ids` are special tokens that stay
    in the text although skip_special_tokens leaves the others out: whoever reads the answer needs them.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()  # a string, or several
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_special_token_ids: Sequence[int] = ()
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self):
        # Frozen, so what arrives as a string or list is put in its one form here, before anybody reads it.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in (self.logit_bias or {}).items()})
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        object.__setattr__(self, "shown_special_token_ids", tuple(self.shown_special_token_ids))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        object.__setattr__(self, "top_k", max(self.top_k, 0) if self.top_k in (-1, 0) else self.top_k)
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise RequestError(f"{name} must be from {low} to {high}, but it is {value}", name)
        for name, low in _POSITIVE:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > low):
                raise RequestError(f"{name} must be greater than {low}, but it is {value}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens must not exceed max_tokens, but {self.min_tokens} > {self.max_tokens}", "min_tokens")
        if any(not s for s in self.stop):
            raise RequestError("stop strings must not be empty", "stop")
        if any(not word.strip() for word in self.bad_words):
            raise RequestError("bad_words must not be empty or blank", "bad_words")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise RequestError(f"bad_words holds {len(self.bad_words)} texts; at most {MAX_BAD_WORDS} are allowed", "bad_words")
        if self.allowed_token_ids == ():
            raise RequestError("allowed_token_ids is empty, which leaves no token to draw: name some, or leave it out", "allowed_token_ids")
        if len(self.logit_bias) > MAX_BIAS:
            raise RequestError(f"logit_bias holds {len(self.logit_bias)} tokens; at most {MAX_BIAS} fit", "logit_bias")
        if len(self.stop_token_ids) > MAX_STOP_IDS // 2:
            raise RequestError(f"stop_token_ids holds {len(self.stop_token_ids)} ids; at most {MAX_STOP_IDS // 2} fit", "stop_token_ids")

    def with_defaults(self, **changes) -> "SamplingParams":
        """A copy with `changes` made, checked like any other."""
        return replace(self, **changes)

    @cached_property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @cached_property
    def edits(self) -> bool:
        """Do the logits have to be changed, other than by a mask, or their probabilities reported, before a token is drawn?"""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias or self.min_tokens or self.logprobs is not None)

    @cached_property
    def masks(self) -> bool:
        """Are there tokens that may not be drawn, whatever their logits are?"""
        return bool(self.bad_words or self.allowed_token_ids is not None or self.structured_outputs)


_INT_MAX = 2**31 - 1
_BOUNDS = (
    ("n", 1, 128),
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, _INT_MAX),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("max_tokens", 1, _INT_MAX),
    ("min_tokens", 0, _INT_MAX),
    ("logprobs", 0, _INT_MAX),
    ("prompt_logprobs", 0, _INT_MAX),
)
_POSITIVE = (("top_p", 0.0), ("repetition_penalty", 0.0))


@dataclass(frozen=True)
class Request:
    """One prompt to continue. `id` is the caller's; it must be unique among the running ones.

    stream: a Completion for every token, those of one dispatch in one Output; otherwise each continuation comes once, whole, when it ends.
    patch: what this request brings for the engine's Patch, by name; what it leaves out is as the patch has it.
    embed: no text is wanted but Output.embedding, and `params` count for nothing.
    priority: the smallest is served first, under --scheduling-policy priority. cache_salt: prompts share cached pages only with
    prompts of the same salt.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None  # its text, if it had one, only to be given back
    stream: bool = True
    patch: Mapping[str, Any] | None = None
    embed: bool = False
    priority: int = 0
    cache_salt: str | None = None


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability; rank 1 is the likeliest."""

    token_id: int
    logprob: float
    rank: int
    text: str = ""


# The chosen token first, then the likeliest ones in order (the chosen one may be among them).
TokenLogprobs = tuple[Logprob, ...]


# A stream has one of each of these a token: a frozen dataclass takes 1.5 µs to make, a struct 0.1.
class Completion(msgspec.Struct, frozen=True, array_like=True):
    """One continuation. While it streams, `text`, `token_ids` and `logprobs` hold only what is new, one token at most.

    finish_reason: stop (an end or stop token, or a stop string), length, abort, error; None while it runs.
    stop_reason: the stop string or stop token id that ended it; None for the model's own end token, or a form that is complete; after an
    error, what it was.
    """

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class Output(msgspec.Struct, frozen=True):
    """What a request has produced: everything from `LLM.generate`, only what is new from `Engine.generate`.

    `prompt_logprobs[i]` belongs to prompt token i (None for the first, which nothing predicts). `embedding` is the final hidden state
    of the prompt's last token, of length 1 as a vector; None unless the request asked for it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    finished: bool
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    embedding: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Limits:
    """What an engine can serve at most, so that whoever holds a request can refuse it before it is sent."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    has_text: bool  # is there a tokenizer?
    by_priority: bool = False  # may requests have one?

    def check(self, request: Request) -> None:
        """Raises RequestError for what can never be served, with the numbers in it."""
        params, prompt, longest = request.params, request.prompt_token_ids, self.max_model_len
        if not prompt:
            raise RequestError("the prompt is empty; at least one token is needed", "prompt")
        if len(prompt) >= longest:
            raise RequestError(
                f"This model's maximum context length is {longest} tokens. However, your prompt contains {len(prompt)} input tokens, "
                f"which leaves no room for an answer: at most {longest - 1} fit. Shorten the prompt.",
                "prompt",
            )
        self._check_ids("prompt", prompt)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.max_logprobs:
                raise RequestError(
                    f"{name} is {getattr(params, name)}, but this server gives at most {self.max_logprobs} (--max-logprobs)", name
                )
        if params.stop and not self.has_text:
            raise RequestError("stop strings need a tokenizer, and this engine runs without one; use stop_token_ids", "stop")
        if params.bad_words and not self.has_text:
            raise RequestError("bad_words need a tokenizer, and this engine runs without one", "bad_words")
        if params.structured_outputs and not self.has_text:
            raise RequestError("structured_outputs need a tokenizer, and this engine runs without one", "structured_outputs")
        if request.priority and not self.by_priority:
            raise RequestError("priority needs a server with --scheduling-policy priority: leave it out, or send 0", "priority")
        if request.cache_salt is not None and not 0 < len(request.cache_salt) <= MAX_SALT:
            raise RequestError(f"cache_salt must have 1 to {MAX_SALT} characters, but it has {len(request.cache_salt)}", "cache_salt")

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise RequestError(f"{name} holds token id {outside[0]}, but the vocabulary has ids 0 to {self.vocab_size - 1}", name)


@dataclass
class Histogram:
    """counts[i]: observations up to bounds[i]; the last count is of those above all bounds."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass(frozen=True)
class Stats:
    """A moment's figures. pages: how many a sequence may hold; free + cached + held == pages.

    ended: requests by how they ended, a FinishReason or "refused" for those that the full queue turned away. histograms: by name,
    in seconds, tokens, or whatever the name says.
    """

    running: int
    waiting: int
    pages: int
    free: int
    cached: int
    held: int
    preemptions: int
    cached_tokens: int  # prompt tokens found in the cache
    prompt_tokens: int
    generation_tokens: int
    ended: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
