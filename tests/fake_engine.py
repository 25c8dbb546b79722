"""An engine without a model: the surface of jaxllm.engine.Engine over made-up text, one byte a token, the same for the same request.

It honours what the server hands on: stops, limits, seeds, biases, logprobs, abort by closing the generator. `running` and `aborted` let a
test see what became of a request. After 40 tokens it ends by itself, as a model would.
"""

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.request import (
    Completion,
    EngineDeadError,
    Limits,
    Logprob,
    Output,
    OverloadedError,
    Request,
    RequestError,
    SamplingParams,
    Stats,
)
from jaxllm.vectors import unit

BOS, EOS, START, END = 256, 257, 258, 259
SPECIAL = {BOS: "<s>", EOS: "</s>", START: "<|im_start|>", END: "<|im_end|>"}
VOCAB = 260
ENDS_AFTER = 40
LETTERS = b"abcdefghijklmnopqrstuvwxyz     "


class FakeTokenizer:
    """Bytes, and four special tokens; chats as ChatML, with tools and calls as JSON. `chat_templates` is only looked into."""

    def __init__(self):
        self.chat_templates: dict[str, str] = {}
        self.opening = ""  # what a prompt ends with, as some templates begin the answer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        parts = [b"" if t >= 256 and skip_special_tokens else SPECIAL[t].encode() if t >= 256 else bytes([t]) for t in ids]
        return b"".join(parts).decode(errors="replace")

    def token_text(self, token: int) -> str:
        return self.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        return SPECIAL[token].encode() if token >= 256 else bytes([token])

    def special_id(self, text: str) -> int | None:
        return next((token for token, special in SPECIAL.items() if special == text), None)

    def chat(self, messages: list[dict], add_generation_prompt: bool = True, continue_final_message: bool = False, **more) -> list[int]:
        ids = [BOS, START, *json.dumps(more["tools"]).encode(), END] if more.get("tools") else [BOS]
        for message in messages:
            if message["role"] not in ("system", "user", "assistant", "tool"):
                raise RequestError(f"The chat template does not know the role {message['role']!r}", "messages")
            further = {name: message[name] for name in ("reasoning_content", "tool_calls", "tool_call_id", "name") if name in message}
            text = message["content"] + (json.dumps(further) if further else "")
            ids += [START, *f"{message['role']}\n{text}".encode(), END]
        if continue_final_message:
            return ids[:-1]
        return [*ids, START, *f"assistant\n{self.opening}".encode()] if add_generation_prompt else ids


@dataclass
class _Run:
    """One choice on its way."""

    index: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    done: bool = False


class FakeEngine:
    def __init__(self, config: EngineConfig | None = None, *, max_model_len: int = 256, step_s: float = 0.0):
        self.config = config or EngineConfig()
        self._words = FakeTokenizer()
        self.tokenizer: FakeTokenizer | None = self._words  # a test may take it away
        self.max_model_len, self.step_s = max_model_len, step_s
        self.model_name, self.model_path = self.config.served_model_name or "fake", "/models/fake"
        self.default_params: dict[str, Any] = {}
        self.vocab_size = VOCAB
        self.healthy = True
        self.closed = False
        self.forgotten = 0
        self.profiling: str | None = None
        self.queue_full = False
        self.script: str | None = None  # what every answer says, before it ends by itself
        self.fail_at: int | None = None  # the token at which every request meets a dead engine
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.served: list[Request] = []

    def close(self) -> None:
        self.closed = True
        self.healthy = False

    def stats(self) -> Stats:
        """The real engine's figures, as if a running request held one page of 256."""
        held = len(self.running)
        return Stats(held, 0, 256, 256 - held, 0, held, 0, 0, 0, 0)

    def forget(self) -> None:
        self.forgotten += 1

    def profile(self, folder: str | None) -> None:
        if (folder is None) == (self.profiling is None):
            raise RuntimeError("no profile runs" if folder is None else "a profile runs already")
        self.profiling = folder

    def check(self, request: Request) -> None:
        by_priority = self.config.scheduling_policy == "priority"
        Limits(self.max_model_len, VOCAB, self.config.max_logprobs, self.tokenizer is not None, by_priority).check(request)

    async def generate(self, request: Request):
        self.check(request)
        if self.queue_full:
            raise OverloadedError("the queue is full")
        assert request.id not in self.running
        self.running.add(request.id)
        self.served.append(request)
        runs = [_Run(index) for index in range(request.params.n)]
        salt = len(self.served) if request.params.seed is None else request.params.seed
        try:
            first = True
            while not all(run.done for run in runs):
                await asyncio.sleep(self.step_s)
                if self.fail_at is not None and len(runs[0].ids) >= self.fail_at:
                    raise EngineDeadError("The engine has stopped")
                steps = tuple(self._step(request, run, salt) for run in runs if not run.done)
                finished = all(run.done for run in runs)
                prompt_logprobs = self._prompt_logprobs(request) if first else None
                first = False
                embedding = _embedding(request) if request.embed else None
                yield Output(request.id, request.prompt, request.prompt_token_ids, steps, finished, prompt_logprobs, 0, embedding)
        finally:
            self.running.discard(request.id)
            if not all(run.done for run in runs):
                self.aborted.append(request.id)

    def _step(self, request: Request, run: _Run, salt: int) -> Completion:
        params = request.params
        token = _choose(request, run, salt) if self.script is None else (*self.script.encode(), EOS)[len(run.ids)]
        run.ids.append(token)
        end = _end(params, run, token)
        if not (end and end[0] == "stop" and token == EOS):
            run.text += self._words.decode([token], params.skip_special_tokens and token not in params.shown_special_token_ids)
        end = _stop_string(params, run) or end
        run.done = end is not None
        safe = len(run.text) if run.done else max(run.sent, len(run.text) - max((len(s) - 1 for s in params.stop), default=0))
        text, run.sent = run.text[run.sent : safe], safe
        logprobs = None if params.logprobs is None else (self._logprobs(token, params.logprobs),)
        reason, what = end or (None, None)
        return Completion(run.index, text, (token,), logprobs, reason, what)

    def _logprobs(self, token: int, count: int) -> tuple[Logprob, ...]:
        """The chosen token first, itself the likeliest; then letters in order; the last is as good as impossible."""
        others = [97 + i if 97 + i != token else 122 for i in range(count - 1)]
        likeliest = [Logprob(t, -0.5 - i, i + 1, self._words.token_text(t)) for i, t in enumerate([token, *others])]
        if count > 3:
            likeliest[-1] = Logprob(others[-1], float("-inf"), count, self._words.token_text(others[-1]))
        return (likeliest[0], *likeliest[:count])

    def _prompt_logprobs(self, request: Request) -> list | None:
        count = request.params.prompt_logprobs
        return None if count is None else [None, *(self._logprobs(t, count) for t in request.prompt_token_ids[1:])]


def _embedding(request: Request) -> tuple[float, ...]:
    """Eight numbers made from the prompt."""
    return unit(byte - 127.5 for byte in hashlib.sha256(repr(request.prompt_token_ids).encode()).digest()[:8])


def _choose(request: Request, run: _Run, salt: int) -> int:
    params, position = request.params, len(run.ids)
    bias, token = max(((bias, token) for token, bias in params.logit_bias.items()), default=(0, 0))
    if bias > 0:
        return token
    if params.allowed_token_ids is not None:
        return params.allowed_token_ids[0]
    if not params.ignore_eos and position >= max(ENDS_AFTER, params.min_tokens):
        return EOS
    way = (0, 0) if params.greedy else (salt, run.index)
    return LETTERS[hashlib.sha256(repr((request.prompt_token_ids, way, position)).encode()).digest()[0] % len(LETTERS)]


def _end(params: SamplingParams, run: _Run, token: int):
    if token in params.stop_token_ids and len(run.ids) > params.min_tokens:
        return "stop", token
    if token == EOS and not params.ignore_eos:
        return "stop", None
    if params.max_tokens is not None and len(run.ids) >= params.max_tokens:
        return "length", None
    return None


def _stop_string(params: SamplingParams, run: _Run):
    found = [(at, stop) for stop in params.stop if (at := run.text.find(stop)) >= 0]
    if not found:
        return None
    at, stop = min(found)
    run.text = run.text[: at + len(stop) * params.include_stop_str_in_output]
    return "stop", stop
