"""The engine's turn: take what was compiled, dispatch the next step, read the step before it, hand out what is new, draw what waited.

`Core` is synchronous and owns the scheduler and every running request's text; a thread (Engine) or a test calls `turn`.
Step n+1 is dispatched before step n's tokens are read, so a row may run once more after its last token: that late token
is dropped. Every sequence ends exactly once, in `_end`.
"""

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Protocol

from jaxllm.batch import StepResult
from jaxllm.grammar import COMPILE_S, Compiled, Grammars, too_slow
from jaxllm.mask import mask_of
from jaxllm.metrics import Metrics, Times
from jaxllm.pages import ROOT, digest
from jaxllm.patch import Patch
from jaxllm.plan import Plan
from jaxllm.request import (
    MAX_STOP_IDS,
    Completion,
    FinishReason,
    Limits,
    Logprob,
    Output,
    OverloadedError,
    Request,
    RequestError,
    Stats,
    TokenLogprobs,
)
from jaxllm.scheduler import Row, Scheduler, Sequence, Step
from jaxllm.text import Detokenizer, Tokenizer
from jaxllm.vectors import unit

log = logging.getLogger("jaxllm")

FORM_WAIT_S = 0.002  # at a time, with nothing else to do, for a form to be compiled


@dataclass(frozen=True)
class Refusal:
    """What the listener of a request hears that was taken and yet can never be served, because its form cannot be honoured."""

    request_id: str
    error: RequestError


Listener = Callable[[Output | Refusal], None]


class Handle(Protocol):
    """A step under way. `draw` chooses tokens where that waited for those of the step before; `read` waits for what it found out."""

    def draw(self) -> None: ...
    def read(self) -> StepResult: ...


class Runs(Protocol):
    """What Core wants of a runner: the real one, or the token oracle of the tests."""

    def run(self, step: Step) -> Handle: ...


@dataclass
class _Answer:
    """One continuation as it grows, and what of it was not told yet."""

    sequence: Sequence
    detokenizer: Detokenizer | None
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    untold: list[int] = field(default_factory=list)
    last: float | None = None  # when its newest token was read

    def news(self, reason: FinishReason | None = None, stop: str | int | None = None) -> Completion:
        """What came since the last time."""
        logprobs = None if self.sequence.params.logprobs is None else tuple(self.logprobs)
        completion = Completion(self.sequence.index, "".join(self.text), tuple(self.untold), logprobs, reason, stop)
        self.text, self.untold, self.logprobs = [], [], []
        return completion


@dataclass
class _Live:
    """A running request, its answers, and who listens."""

    request: Request
    listener: Listener
    answers: list[_Answer]
    left: int
    prompt_logprobs: dict[int, TokenLogprobs] | None  # by place in the prompt, until they are all there and told
    times: Times
    queued: bool = False  # does the scheduler know of it?
    embedding: tuple[float, ...] | None = None


@dataclass
class _Forming:
    """A request that waits for its form to be compiled, until a time of time.monotonic."""

    live: _Live
    form: Future[Compiled]
    until: float


class Core:
    """eos_ids: the tokens that end an answer unless a request says ignore_eos. patch: the one the runner was compiled with.

    by_priority: see Scheduler. max_queued: how many sequences may wait for a row; None is any number.
    """

    def __init__(
        self,
        runner: Runs,
        plan: Plan,
        vocab_size: int,
        eos_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        seed: int = 0,
        *,
        patch: Patch | None = None,
        by_priority: bool = False,
        max_queued: int | None = None,
    ):
        self.plan, self.eos_ids, self._patch = plan, eos_ids, patch
        self.limits = Limits(plan.max_model_len, vocab_size, plan.max_logprobs, has_text=tokenizer is not None, by_priority=by_priority)
        self._runner, self._tokenizer = runner, tokenizer
        self._scheduler = Scheduler(plan, by_priority)
        self._max_queued = max_queued
        self._metrics = Metrics()
        self._live: dict[str, _Live] = {}
        self._grammars = None if tokenizer is None else Grammars(tokenizer, vocab_size, eos_ids)
        self._forming: dict[str, _Forming] = {}
        self._flight: tuple[Step, Handle] | None = None
        self._seeds = random.Random(seed)
        self._counts = {"prompt_tokens": 0, "generation_tokens": 0}

    # ------------------------------------------------------------------ the door

    def check(self, request: Request) -> None:
        """Raises RequestError for what can never be served; whether its form can be honoured, only compiling it says."""
        self.limits.check(request)
        if request.patch and self._patch is None:
            raise RequestError(
                "the request brings data for a patch, but the engine was started without one: give it patch=Patch(...)", "patch"
            )
        if self._patch is not None:
            self._patch.row(request.patch)

    def check_form(self, request: Request) -> None:
        """Compiles the form that the request asks for, in this thread's time. Raises RequestError if it cannot be honoured."""
        if self._grammars is not None and request.params.structured_outputs is not None:
            self._grammars.check(request.params.structured_outputs)

    def add(self, request: Request, listener: Listener) -> None:
        """Queues a request, once its form is compiled if it asks for one; `listener` gets its outputs, from the thread that calls `turn`.

        Raises OverloadedError if the queue is full.
        """
        self.check(request)
        if request.id in self._live:
            raise RequestError(f"request id {request.id!r} is already running", "request_id")
        self._check_room(request.params.n)
        params = request.params
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        if params.min_tokens and len(stop_ids) > MAX_STOP_IDS:
            raise RequestError(f"min_tokens can hold back at most {MAX_STOP_IDS} stop ids, but there are {len(stop_ids)}", "min_tokens")
        longest = self.plan.max_model_len
        limit = longest if params.max_tokens is None else min(longest, len(request.prompt_token_ids) + params.max_tokens)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        mask = mask_of(params, self.limits.vocab_size, self._tokenizer, self.eos_ids)
        asked, form = params.structured_outputs, None
        if asked is not None and self._grammars is not None and (form := self._grammars.compiled(asked)).done():
            form.result()  # which refuses what it could not compile
        root = ROOT if request.cache_salt is None else digest(request.cache_salt.encode(), ())
        root = root if self._patch is None else digest(root + self._patch.digest(request.patch), ())
        sequences = [Sequence(request, i, seed + i, limit, stop_ids, root) for i in range(params.n)]
        answers = [_Answer(s, self._tokenizer and Detokenizer(self._tokenizer, request.prompt_token_ids, params)) for s in sequences]
        for sequence in sequences:
            sequence.mask = mask
        scores = None if params.prompt_logprobs is None else {}
        live = self._live[request.id] = _Live(request, listener, answers, params.n, scores, self._metrics.arrive())
        if form is None or form.done():
            self._queue(live, form and form.result())
        else:
            self._forming[request.id] = _Forming(live, form, time.monotonic() + COMPILE_S)

    def _queue(self, live: _Live, form: Compiled | None) -> None:
        """Hands the request to the scheduler. Each answer has a matcher of its own, to follow its tokens."""
        live.queued = True
        self._counts["prompt_tokens"] += len(live.request.prompt_token_ids)
        for sequence in [answer.sequence for answer in live.answers]:
            if form is not None and sequence.mask is not None:
                sequence.mask = sequence.mask.following(form)
            self._scheduler.add(sequence)

    def _queue_compiled(self) -> None:
        """Queues the requests whose forms are there, and refuses those whose forms will not be."""
        for request_id, forming in list(self._forming.items()):
            live, form = forming.live, forming.form
            if not form.done() and time.monotonic() < forming.until:
                continue
            del self._forming[request_id]
            asked = live.request.params.structured_outputs
            assert asked is not None
            error = form.exception() if form.done() else too_slow(asked)
            if isinstance(error, RequestError):
                del self._live[request_id]
                live.listener(Refusal(request_id, error))
            else:
                self._queue(live, form.result())

    def _await_form(self) -> bool:
        """Waits a moment for a form that is being compiled. False if none is."""
        if self._forming:
            wait([forming.form for forming in self._forming.values()], FORM_WAIT_S, FIRST_COMPLETED)
        return bool(self._forming)

    def _check_room(self, count: int) -> None:
        forming = sum(forming.live.left for forming in self._forming.values())
        if self._max_queued is not None and (queued := self._scheduler.queued + forming + count) > self._max_queued:
            self._metrics.ended["refused"] += 1
            raise OverloadedError(
                f"the queue is full: with this request {queued} would wait, and at most {self._max_queued} may; try again later"
            )

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """Ends a request now and gives its pages back. Does nothing if it has ended already."""
        self._forming.pop(request_id, None)
        if (live := self._live.get(request_id)) is not None:
            for answer in live.answers:
                if not answer.sequence.finished:
                    self._end(live, answer, reason)

    def abort_all(self, reason: FinishReason) -> None:
        for request_id in list(self._live):
            self.abort(request_id, reason)

    def forget(self) -> None:
        """Empties the prefix cache, for new parameters or because somebody asked. What runs goes on, on the keys and values it has."""
        self._scheduler.forget()

    # ------------------------------------------------------------------ the turn

    def turn(self) -> bool:
        """One step out, one step in. False if there was nothing to do."""
        self._queue_compiled()
        step = self._scheduler.next()
        flight, self._flight = self._flight, None
        if step is not None:
            for sequence in step.admitted:
                self._metrics.begin(self._live[sequence.request.id].times)
            self._flight = step, self._runner.run(step)
        if flight is not None:
            self._take(*flight)
        if self._flight is not None:
            self._flight[1].draw()
        return step is not None or flight is not None or self._await_form()

    def _take(self, step: Step, handle: Handle) -> None:
        result = handle.read()
        self._metrics.read()
        for i, row in enumerate(step.rows):
            if row.sequence.finished:  # a late token
                continue
            live = self._live[row.sequence.request.id]
            if result.prompt is not None:
                self._keep_prompt_logprobs(live, row, result)
            if row.samples:
                answer = live.answers[row.sequence.index]
                if row.sequence.params.logprobs is not None:
                    answer.logprobs.append(self._logprobs(row, i, result))
                if live.request.embed:
                    assert result.hidden is not None
                    live.embedding = unit(result.hidden[i].tolist())
                self._take_tokens(live, answer, result.tokens[i])
                if row.sequence.slot is not None:
                    self._scheduler.publish(row.sequence)
        self._metrics.flush()

    def _take_tokens(self, live: _Live, answer: _Answer, tokens: list[int]) -> None:
        """What one row drew, up to its end. A stream is told of each token by itself, and of all of them at once."""
        sequence, before, told = answer.sequence, len(answer.sequence.tokens), []
        reason = stop = None
        for token in tokens:
            if (mask := sequence.mask) is not None:
                if token not in sequence.stop_ids:
                    mask.take(token)
                if mask.fault is not None:
                    reason, stop = "error", f"structured_outputs could not be followed to the end: {mask.fault}"
                    log.warning("request %s: %s", live.request.id, stop)
                    break
            sequence.tokens.append(token)
            answer.untold.append(token)
            reason, stop = self._extend(answer, token)
            if reason is not None:
                break
            if live.request.stream:
                told.append(answer.news())
        count = len(sequence.tokens) - before
        sequence.pending -= count
        self._counts["generation_tokens"] += count
        self._metrics.tokens(live.times, answer.last, count)
        answer.last = self._metrics.now
        if reason is not None:
            self._end(live, answer, reason, stop, told)
        elif told:
            self._tell(live, told)

    def _extend(self, answer: _Answer, token: int) -> tuple[FinishReason | None, str | int | None]:
        """Adds the token's text; says whether and why it is the last one. An end token is no text."""
        sequence, detokenizer = answer.sequence, answer.detokenizer
        params = sequence.params
        if token in sequence.stop_ids:
            named = token in params.stop_token_ids
            if detokenizer:
                if named and params.include_stop_str_in_output:
                    answer.text.append(detokenizer.add(token))
                answer.text.append(detokenizer.finish())
            return "stop", token if named else None
        if detokenizer:
            answer.text.append(detokenizer.add(token))
            if detokenizer.stopped is not None:
                return "stop", detokenizer.stopped
        complete = sequence.mask is not None and sequence.mask.over
        if len(sequence.tokens) < sequence.limit and not complete:
            return None, None
        if detokenizer:
            answer.text.append(detokenizer.finish())
        return "stop" if complete else "length", None

    # ------------------------------------------------------------------ telling

    def _end(
        self, live: _Live, answer: _Answer, reason: FinishReason, stop: str | int | None = None, told: Iterable[Completion] = ()
    ) -> None:
        """`told`: what its listener is told before the end."""
        if live.queued:
            self._scheduler.finish(answer.sequence)
        else:
            answer.sequence.finished = True
        live.left -= 1
        if not live.left:
            del self._live[live.request.id]
            self._metrics.end(live.times, reason, len(live.request.prompt_token_ids))
        self._tell(live, (*told, answer.news(reason, stop)))

    def _tell(self, live: _Live, completions: Iterable[Completion]) -> None:
        request = live.request
        live.listener(
            Output(
                request.id,
                request.prompt,
                request.prompt_token_ids,
                tuple(completions),
                finished=not live.left,
                prompt_logprobs=None if live.prompt_logprobs is None else self._whole_prompt_logprobs(live),
                num_cached_tokens=live.answers[0].sequence.cached,
                embedding=live.embedding,
            )
        )

    def _logprobs(self, row: Row, i: int, result: StepResult) -> TokenLogprobs:
        assert result.logprobs is not None
        wanted = row.sequence.params.logprobs or 0
        chosen, rank, values, ids = result.logprobs
        return self._top(result.tokens[i][0], chosen[i], rank[i], values[i], ids[i], wanted)

    def _top(self, token: int, chosen, rank, values, ids, wanted: int) -> TokenLogprobs:
        text = self._tokenizer.token_text if self._tokenizer else lambda token: ""
        top = zip(ids[:wanted].tolist(), values[:wanted].tolist(), itertools.count(1))
        return (
            Logprob(token, float(chosen), int(rank), text(token)),
            *(Logprob(i, value, place, text(i)) for i, value, place in top),
        )

    def _keep_prompt_logprobs(self, live: _Live, row: Row, result: StepResult) -> None:
        assert result.prompt is not None
        if live.prompt_logprobs is None:
            return
        chosen, rank, values, ids = result.prompt
        prompt, wanted = live.request.prompt_token_ids, live.request.params.prompt_logprobs or 0
        for lane in range(row.count):
            place = row.start + lane + 1  # a lane's logits are about the token that follows it
            if place < len(prompt):
                live.prompt_logprobs[place] = self._top(prompt[place], chosen[lane], rank[lane], values[lane], ids[lane], wanted)

    def _whole_prompt_logprobs(self, live: _Live) -> list[TokenLogprobs | None] | None:
        """All of them, once; None before they are complete and afterwards."""
        found, prompt = live.prompt_logprobs, live.request.prompt_token_ids
        if found is None or len(found) < len(prompt) - 1:
            return None
        live.prompt_logprobs = None
        return [found.get(i) for i in range(len(prompt))]

    def stats(self) -> Stats:
        s, pool = self._scheduler, self._scheduler.pool
        return Stats(
            len(s.running),
            len(s.waiting) + sum(forming.live.left for forming in self._forming.values()),
            pool.size,
            pool.free,
            pool.cached,
            pool.held,
            s.preemptions,
            s.cached_tokens,
            **self._counts,
            ended=dict(self._metrics.ended),
            histograms=self._metrics.histograms,
        )
