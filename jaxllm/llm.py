"""LLM: prompts in, finished outputs out, in the order they were given. A thin face over Engine for scripts and notebooks."""

import itertools
import queue
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from tqdm import tqdm

from jaxllm.beam import BeamSearchOutput, BeamSearchParams, BeamSearchSequence, search
from jaxllm.config import EngineConfig
from jaxllm.engine import Engine
from jaxllm.patch import Patch
from jaxllm.request import Completion, Output, Request, RequestError, SamplingParams
from jaxllm.vectors import cosine, shortened
from jaxllm.weights import Params

Prompt = str | Sequence[int]


class LLM:
    """A model in this process. Options are EngineConfig's; `model=None` is the one that ships in the package, `patch` as in Engine.

    llm = LLM("path/or/hub-id")
    for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=50)):
        print(output.outputs[0].text)
    """

    def __init__(self, model: str | None = None, *, patch: Patch | None = None, **options: Any):
        self.engine = Engine(EngineConfig(model=model, **options), patch=patch)
        self._ids = itertools.count()

    @property
    def tokenizer(self):
        return self.engine.tokenizer

    def default_params(self) -> SamplingParams:
        """What generation_config.json asks for, else vLLM's defaults."""
        return SamplingParams(**self.engine.default_params)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        patch: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[Output]:
        """Every prompt continued, in input order.

        prompts: one or many, each a text or a list of token ids. sampling_params, and what is brought for the engine's patch: one
        for all, or one each. Raises RequestError, before anything runs, for a prompt or parameter that cannot be served.
        """
        many = _as_list(prompts)
        params = self._params(sampling_params, len(many))
        patches = _one_each(patch, len(many), "patch data")
        requests = [self._request(*each) for each in zip(many, params, patches, strict=True)]
        for request in requests:
            self.engine.check(request)
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        patch: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[Output]:
        """Answers to one conversation, or to many; `template` goes to the chat template."""
        if self.tokenizer is None:
            raise RequestError("chat needs a tokenizer, and this engine runs without one; name one with tokenizer=...")
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self.tokenizer.chat(c, **template) for c in conversations]
        return self.generate(prompts, sampling_params, patch=patch, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt that a beam search finds, in input order. Raises RequestError as `generate` does."""
        most = self.engine.plan.max_logprobs
        if 2 * params.beam_width > most:
            wanted = f"{2 * params.beam_width} log-probabilities a token, but this engine gives at most {most}"
            raise RequestError(f"beam_width {params.beam_width} needs {wanted}: start it with max_logprobs={2 * params.beam_width}")
        ids = [self._request(prompt, SamplingParams()).prompt_token_ids for prompt in _as_list(prompts)]
        engine = self.engine
        found = search(ids, params, lambda many, one: self.generate(many, one, use_tqdm=use_tqdm), engine.eos_ids, engine.max_model_len)
        return [BeamSearchOutput(tuple(self._told(beam) for beam in beams)) for beams in found]

    def _told(self, beam: BeamSearchSequence) -> BeamSearchSequence:
        """With its text, and why it ended."""
        text = None if self.tokenizer is None else self.tokenizer.decode(beam.tokens)
        return replace(beam, text=text, finish_reason=beam.finish_reason or "length")

    def update_params(self, params: Params) -> None:
        """Serves these parameters from now on, as Engine.update_params says."""
        self.engine.update_params(params)

    def embed(self, prompts: Prompt | Sequence[Prompt], *, dimensions: int | None = None, use_tqdm: bool = True) -> list[tuple[float, ...]]:
        """A vector of length 1 for every prompt: the final hidden state of its last token.

        dimensions: keep the first so many numbers, and make the length 1 again. Raises RequestError as `generate` does.
        """
        params = SamplingParams(max_tokens=1, temperature=0.0)
        requests = [replace(self._request(prompt, params), embed=True) for prompt in _as_list(prompts)]
        for request in requests:
            self.engine.check(request)
        vectors = [output.embedding or () for output in self._run(requests, use_tqdm)]
        return vectors if dimensions is None else [shortened(vector, dimensions) for vector in vectors]

    def score(self, text_1: Prompt | Sequence[Prompt], text_2: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[float]:
        """The cosine of each pair's embeddings: one text with each of several, or each with its partner."""
        left, right = _as_list(text_1), _as_list(text_2)
        if len(left) not in (1, len(right)):
            raise RequestError(f"{len(left)} texts cannot be paired with {len(right)}: give as many, or one first text")
        vectors = self.embed([*left, *right], use_tqdm=use_tqdm)
        ones = vectors[:1] * len(right) if len(left) == 1 else vectors[: len(left)]
        return [cosine(a, b) for a, b in zip(ones, vectors[len(left) :], strict=True)]

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        return _one_each(given or self.default_params(), count, "sampling params")

    def _request(self, prompt: Prompt, params: SamplingParams, patch: Mapping[str, Any] | None = None) -> Request:
        request_id = f"llm-{next(self._ids)}"
        if not isinstance(prompt, str):
            return Request(request_id, tuple(int(i) for i in prompt), params, stream=False, patch=patch)
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer, and this engine runs without one; give token ids")
        return Request(request_id, tuple(self.tokenizer.encode(prompt)), params, prompt, stream=False, patch=patch)

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[Output]:
        events: queue.SimpleQueue[Output | Exception] = queue.SimpleQueue()
        gathered = {request.id: _Gathered(request) for request in requests}
        for request in requests:
            self.engine.submit(request, events.put)
        left = len(requests)
        with _Bar(len(requests), use_tqdm) as bar:
            while left:
                item = events.get()
                if isinstance(item, Exception):
                    for request in requests:
                        self.engine.abort(request.id)
                    raise item
                gathered[item.request_id].add(item)
                if item.finished:
                    left -= 1
                    bar.done(gathered[item.request_id])
        return [g.whole() for g in gathered.values()]


class _Gathered:
    """A request's answers, which come one by one, each whole."""

    def __init__(self, request: Request):
        self.request = request
        self.answers: dict[int, Completion] = {}
        self.first: Output | None = None

    def add(self, output: Output) -> None:
        if self.first is None or output.prompt_logprobs is not None:
            self.first = output
        self.answers |= {completion.index: completion for completion in output.outputs}

    @property
    def tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.answers.values())

    def whole(self) -> Output:
        assert self.first is not None
        return msgspec.structs.replace(self.first, outputs=tuple(self.answers[i] for i in sorted(self.answers)), finished=True)


class _Bar:
    """tqdm's bar with the two speeds people look for."""

    def __init__(self, total: int, shown: bool):
        self._bar = tqdm(total=total, desc="Processed prompts", disable=not shown, dynamic_ncols=True)
        self._in = self._out = 0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def done(self, gathered: _Gathered) -> None:
        self._in += len(gathered.request.prompt_token_ids)
        self._out += gathered.tokens
        seconds = self._bar.format_dict["elapsed"] or 1e-9
        self._bar.set_postfix_str(
            f"est. speed input: {self._in / seconds:.2f} toks/s, output: {self._out / seconds:.2f} toks/s", refresh=False
        )
        self._bar.update(1)


def _one_each(given: Any, count: int, what: str) -> list[Any]:
    """`given` for each of `count` prompts, unless it is a list of them."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise RequestError(f"{count} prompts were given with {len(given)} {what}; give one, or one each")
    return list(given)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and isinstance(many[0], int) else many
