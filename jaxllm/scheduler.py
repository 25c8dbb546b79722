"""What runs next. Owns the queues, the row slots and, through PagePool, who holds which page. Host ints only, no JAX.

Each turn `next()` gives one Step: every running sequence that has one token to run gets it (decodes first), then
prompt chunks fill what the bucket has left. If pages run out, the newest sequence gives its pages back and waits to
be computed again. Sequences advance when a step is handed out, not when its tokens are read, so that step n+1 can be
dispatched before step n is read; `pending` counts the tokens that are sampled but not read.

A page may be taken again as soon as it is released: the device runs steps in the order they were dispatched, so a
late write of a finished row comes before the first write of the page's next holder.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxllm.mask import TokenMask
from jaxllm.pages import ROOT, PagePool, chain
from jaxllm.plan import Bucket, Plan
from jaxllm.request import Request

NEVER = 2**31  # more pages than any sequence fills: nothing of it is published


class Sequence:
    """One continuation of one request: its tokens so far, and how far the cache has come."""

    def __init__(self, request: Request, index: int, seed: int, limit: int, stop_ids: frozenset[int] = frozenset(), root: bytes = ROOT):
        self.request = request
        self.stop_ids = stop_ids  # any of them ends it
        self.params = request.params
        self.index = index
        self.seed = seed
        self.limit = limit  # prompt and answer together end here
        self.tokens = list(request.prompt_token_ids)
        self.pending = 0  # sampled by dispatched steps, not yet read
        self.length = len(self.tokens)  # tokens and pending together
        self.computed = 0  # tokens whose K and V the dispatched steps write
        self.cached = 0  # prompt tokens that the first admission found in the cache
        self.pages: list[int] = []
        self.root = root  # the parent of the first page's digest: sequences of different roots share nothing
        self.names: list[bytes] = []  # digests of the full pages of `tokens`, as far as they were needed
        self.published = 0
        self.scored = request.params.prompt_logprobs is not None and index == 0  # must its prompt run in scored steps?
        self.slot: int | None = None
        self.finished = False
        self.order: tuple[int, int] = (0, 0)  # (priority, arrival): who comes first
        self.mask: TokenMask | None = None  # what it must not draw

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def masked(self) -> bool:
        """Does what it may draw depend on the tokens it has produced?"""
        return self.mask is not None and self.mask.changes

    @property
    def todo(self) -> int:
        """Tokens to run before the next one can be sampled. 0 once the last allowed one has been."""
        return self.length - self.computed if self.length < self.limit else 0


class Row(NamedTuple):
    """`count` tokens of one sequence, from position `start`. `token` is the first to run, or None if only the device has it.

    samples: tokens it draws: none if it does not reach the end of what is known; several, each run to draw the next, if it decodes in a
    step that is repeated.
    """

    sequence: Sequence
    slot: int
    start: int
    count: int
    samples: int
    token: int | None = None
    new_page: int = 0  # the page of its last position, if a decode needed one more
    chunked: bool = False  # runs in chunk lanes; one that decodes runs in its row's own lane


@dataclass(frozen=True)
class Step:
    rows: list[Row]
    bucket: Bucket
    admitted: list[Sequence] = field(default_factory=list)  # their row state goes to the device before the step runs

    @property
    def turns(self) -> int:
        """How often the step runs."""
        return max([row.samples for row in self.rows], default=0) or 1


class Scheduler:
    """by_priority: the smallest Request.priority first, whoever came first among equals; otherwise only who came first."""

    def __init__(self, plan: Plan, by_priority: bool = False):
        self.plan, self.by_priority = plan, by_priority
        self.pool = PagePool(plan.num_pages)
        self.waiting: deque[Sequence] = deque()  # the next one first
        self.running: list[Sequence] = []  # the last one gives way first
        self._arrivals = 0
        self.preemptions = 0
        self.cached_tokens = 0
        self._slots = list(range(plan.max_num_seqs - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.order = (sequence.request.priority if self.by_priority else 0, self._arrivals)
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        if not self.waiting or sequence.order > self.waiting[-1].order:  # nearly always: a newcomer
            self.waiting.append(sequence)
        else:
            insort(self.waiting, sequence, key=lambda s: s.order)

    @property
    def queued(self) -> int:
        """Sequences that wait although every row is taken, or would be if the waiting ones got the free rows."""
        return len(self.waiting) - len(self._slots)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is. Rows of it that are still on the device are dropped when they are read."""
        sequence.finished = True
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.publish(sequence)
            self._leave(sequence)

    def forget(self) -> None:
        """After the parameters changed: no page is found again, nor what a running sequence wrote or will write beside it."""
        self.pool.forget()
        for sequence in self.running:
            sequence.published = NEVER

    def publish(self, sequence: Sequence) -> None:
        """Makes the pages findable that are full of known tokens."""
        if not self.plan.enable_prefix_caching:
            return
        full = min(len(sequence.tokens), sequence.computed) // self.plan.page_size
        if full <= sequence.published:
            return
        self._name(sequence, full)
        for i in range(sequence.published, full):
            self.pool.publish(sequence.pages[i], sequence.names[i])
        sequence.published = full

    def next(self) -> Step | None:
        """The next step, or None if nothing can run before something is read, added or finished."""
        if (scored := self._scored_step()) is not None:
            return scored
        if repeated := self._repeated():
            return Step(repeated, self.plan.bucket(len(repeated), 0))
        rows = [self._decode(s) for s in list(self.running) if s.slot is not None and s.todo == 1 and self._has_page(s)]
        # A sequence further down may have been preempted for one further up only before its own turn, never after.
        admitted: list[Sequence] = []
        room = self.plan.largest
        left = self._chunk(rows)
        for sequence in self.running:
            if left and len(rows) < room.rows and sequence.todo > 1:
                rows.append(row := self._row(sequence, min(sequence.todo, left)))
                left -= row.count
        while left and self.waiting and len(rows) < room.rows and self._admit(self.waiting[0]):
            admitted.append(sequence := self.waiting.popleft())
            if sequence.scored:
                break  # its prompt runs alone, in the next step
            rows.append(row := self._row(sequence, min(sequence.todo, left)))
            left -= row.count if row.chunked else 0
        if not rows:
            return self._scored_step(admitted)
        return Step(rows, self.plan.bucket(len(rows), sum(r.count for r in rows if r.chunked)), admitted)

    def _repeated(self) -> list[Row]:
        """Every running sequence with several tokens to draw in one dispatch; nothing if somebody waits, or if one of them cannot.

        What edits a row's logits, and an embedding, needs each token by itself. A row whose mask depends on its tokens has one in a
        dispatch, beside those that have several. Nobody is preempted for this.
        """
        most, size = self.plan.decode_steps, self.plan.page_size
        if most == 1 or self.waiting or not self.running:
            return []
        drawing = [s for s in self.running if s.length < s.limit]
        if any(s.todo != 1 or s.params.edits or s.request.embed or (s.mask is not None and not s.masked) for s in drawing):
            return []
        counts = [1 if s.masked else min(most, s.limit - s.length) for s in drawing]
        pages = sum(s.computed + count > len(s.pages) * size for s, count in zip(drawing, counts, strict=True))
        if max(counts, default=0) < most or pages > self.pool.available:
            return []
        return [self._decode(s, count) for s, count in zip(drawing, counts, strict=True)]

    def _chunk(self, rows: list[Row]) -> int:
        """How many prompt tokens may run beside `rows`, which decode: fewer if somebody waits for the next token of one."""
        most, paced = self.plan.largest.chunk, self.plan.streamed_chunk
        prompts = self.waiting or len(rows) < len(self.running)
        return paced if paced and prompts and any(row.sequence.request.stream for row in rows) else most

    def _scored_step(self, admitted: list[Sequence] | None = None) -> Step | None:
        """A prompt whose log-probabilities are wanted runs by itself: the logits of all its tokens must fit."""
        for sequence in self.running:
            if sequence.scored:
                row = self._row(sequence, min(sequence.prompt_len - sequence.computed, self.plan.scored.chunk), chunked=True)
                sequence.scored = sequence.computed < sequence.prompt_len
                return Step([row], self.plan.scored, admitted or [])
        return None

    def _has_page(self, sequence: Sequence) -> bool:
        """Makes sure that the next token has a page, at the cost of newer sequences. False if it was the newest itself."""
        if sequence.computed < len(sequence.pages) * self.plan.page_size:
            return True
        while not self.pool.available:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.computed = 0
        sequence.published = 0
        self._wait(sequence)
        self.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.pool.release(sequence.pages)
        sequence.slot, sequence.pages = None, []

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a slot and all pages of the known tokens, or nothing."""
        if not self._slots or sequence.pending:  # a preempted one whose last token is not read yet
            return False
        size = self.plan.page_size
        # The last token is always run: its logits choose the next one.
        shareable = 0 if not self.plan.enable_prefix_caching or sequence.scored else (len(sequence.tokens) - 1) // size
        self._name(sequence, shareable)
        shared = self.pool.share(sequence.names[:shareable])
        wanted = -(-len(sequence.tokens) // size) - len(shared)
        # One page is left for each running sequence, or a newcomer would be preempted as soon as they grow.
        if self.running and wanted + len(self.running) > self.pool.available:
            self.pool.release(shared)
            return False
        sequence.pages = shared + self.pool.take(wanted)
        sequence.published = len(shared)
        sequence.computed = len(shared) * size
        if sequence.length == sequence.prompt_len:
            sequence.cached = sequence.computed
            self.cached_tokens += sequence.computed
        sequence.slot = self._slots.pop()
        insort(self.running, sequence, key=lambda s: s.order)
        return True

    def _name(self, sequence: Sequence, count: int) -> None:
        have, size = len(sequence.names), self.plan.page_size
        if count > have:
            parent = sequence.names[-1] if have else sequence.root
            sequence.names += chain(sequence.tokens[have * size : count * size], size, parent)

    def _decode(self, sequence: Sequence, count: int = 1) -> Row:
        new_page = 0
        if sequence.computed + count > len(sequence.pages) * self.plan.page_size:
            (new_page,) = self.pool.take(1)
            sequence.pages.append(new_page)
        return self._advance(sequence, count, count, new_page, chunked=False)

    def _row(self, sequence: Sequence, count: int, chunked: bool = False) -> Row:
        samples = sequence.computed + count == sequence.length
        return self._advance(sequence, count, int(samples), chunked=chunked or count > 1)

    def _advance(self, sequence: Sequence, count: int, samples: int, new_page: int = 0, *, chunked: bool) -> Row:
        assert sequence.slot is not None
        start = sequence.computed
        token = sequence.tokens[start] if start < len(sequence.tokens) else None
        row = Row(sequence, sequence.slot, start, count, samples, token, new_page, chunked)
        sequence.computed += count
        sequence.pending += samples
        sequence.length += samples
        if chunked:  # what decodes publish is known only once they are read
            self.publish(sequence)
        return row
