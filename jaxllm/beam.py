"""Beam search over an engine that gives log-probabilities: a round asks for one token of every beam; the prefix cache has the rest."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxllm.request import Output, RequestError, SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class BeamSearchParams:
    """With vLLM's names and meanings: a beam's score is its log-probability by its length, prompt included, to the power length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self):
        for name in ("beam_width", "max_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, but it is {getattr(self, name)}", name)
        if self.temperature != 0:
            raise RequestError("a beam search draws nothing, so its temperature must be 0", "temperature")


@dataclass(frozen=True)
class BeamSearchSequence:
    """One beam. tokens: the prompt's too, and the end token if it came. finish_reason: stop, or length."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class BeamSearchOutput:
    """The best beam first."""

    sequences: tuple[BeamSearchSequence, ...]


Ask = Callable[[list[tuple[int, ...]], SamplingParams], list[Output]]


def search(
    prompts: Sequence[tuple[int, ...]], params: BeamSearchParams, ask: Ask, eos_ids: frozenset[int], longest: int
) -> list[list[BeamSearchSequence]]:
    """The `beam_width` best sequences of each prompt. `ask` gives one more token of each of many; none grows over `longest` tokens."""
    one = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2 * params.beam_width)
    ends = frozenset() if params.ignore_eos else eos_ids
    live = [[BeamSearchSequence(tuple(prompt), ())] for prompt in prompts]
    complete: list[list[BeamSearchSequence]] = [[] for _ in prompts]
    for _ in range(params.max_tokens):
        growing = [(i, beam) for i, beams in enumerate(live) for beam in beams if len(beam.tokens) < longest]
        if not growing:
            break
        grown: list[list[BeamSearchSequence]] = [[b for b in beams if len(b.tokens) >= longest] for beams in live]
        for (i, beam), output in zip(growing, ask([beam.tokens for _, beam in growing], one), strict=True):
            for longer in _children(beam, output, ends):
                (complete if longer.finish_reason else grown)[i].append(longer)
        live = [_best(beams, params) for beams in grown]
    return [_best([*done, *beams], params) for done, beams in zip(complete, live, strict=True)]


def _children(beam: BeamSearchSequence, output: Output, ends: frozenset[int]) -> list[BeamSearchSequence]:
    found = output.outputs[0].logprobs
    assert found is not None
    (entry,) = found
    return [
        BeamSearchSequence(
            (*beam.tokens, token.token_id),
            (*beam.logprobs, (token, *entry[1:])),
            beam.cum_logprob + token.logprob,
            finish_reason="stop" if token.token_id in ends else None,
        )
        for token in entry[1:]
    ]


def _best(beams: list[BeamSearchSequence], params: BeamSearchParams) -> list[BeamSearchSequence]:
    def score(beam: BeamSearchSequence) -> float:
        return beam.cum_logprob / (len(beam.tokens) - (beam.finish_reason == "stop")) ** params.length_penalty

    return heapq.nlargest(params.beam_width, beams, key=score)
