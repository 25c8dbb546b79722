"""A runner without a network: the next token is a function of the row's whole history, read back from shadow pages.

Every page slot remembers the history of the token written there. A row that reads a page it should not, or one that was
overwritten, finds a broken chain at once; and its tokens could not equal `expected`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from jaxllm.batch import StepResult
from jaxllm.scheduler import Step


def history(before: bytes, token: int) -> bytes:
    return hashlib.blake2b(before + token.to_bytes(8, "little"), digest_size=8).digest()


def choose(seen: bytes, vocab: int) -> int:
    return int.from_bytes(seen, "little") % vocab


def expected(prompt: tuple[int, ...], limit: int, vocab: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
    """What one request alone must give, at most up to `limit` tokens in all."""
    seen = b""
    for token in prompt:
        seen = history(seen, token)
    made: list[int] = []
    while len(prompt) + len(made) < limit:
        made.append(choose(seen, vocab))
        if made[-1] in stop_ids:
            break
        seen = history(seen, made[-1])
    return made


@dataclass
class _Done:
    step: Step
    result: StepResult

    def draw(self) -> None:
        for row in self.step.rows:
            waits = row.samples and row.sequence.masked and not row.sequence.finished
            assert not waits or row.sequence.pending == 1, "a row draws before its last token is known"

    def read(self) -> StepResult:
        return self.result


class FakeRunner:
    def __init__(self, page_size: int, vocab: int):
        self.page_size, self.vocab = page_size, vocab
        self.tables: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}
        self.memory: dict[tuple[int, int], tuple[bytes, bytes]] = {}  # (page, place) -> history before and after its token
        self.steps = 0

    def run(self, step: Step) -> _Done:
        self.steps += 1
        assert len(step.rows) <= step.bucket.rows
        assert sum(r.count for r in step.rows if r.chunked) <= step.bucket.chunk
        assert len({r.slot for r in step.rows}) == len(step.rows), "two rows share a slot"
        for sequence in step.admitted:
            assert sequence.slot is not None
            self.tables[sequence.slot] = list(sequence.pages)
        for row in step.rows:
            self._write(row)
        tokens = [[] for _ in range(step.bucket.rows)]
        for i, row in enumerate(step.rows):
            for again in range(row.samples):
                if again:  # on the token just drawn
                    self._remember(row, row.start + again, [self.last[row.slot]])
                self.last[row.slot] = choose(self._read(row, (row.count if row.chunked else 1) + again), self.vocab)
                tokens[i].append(self.last[row.slot])
            if not row.samples:
                self._read(row, row.count)
        prompt = None
        if step.bucket.scored:
            lanes = step.bucket.chunk
            prompt = (np.zeros(lanes), np.ones(lanes, np.int32), np.zeros((lanes, 1)), np.zeros((lanes, 1), np.int32))
        return _Done(step, StepResult(tokens, None, prompt))

    def _write(self, row) -> None:
        table = self.tables[row.slot]
        if row.new_page:
            assert row.start <= len(table) * self.page_size < row.start + row.count
            table.append(row.new_page)
        if row.chunked:
            tokens = row.sequence.tokens[row.start : row.start + row.count]
        else:
            tokens = [self.last[row.slot] if row.token is None else row.token]
        assert len(tokens) == (row.count if row.chunked else 1) and (row.chunked or row.count == max(row.samples, 1))
        self._remember(row, row.start, tokens)

    def _remember(self, row, start: int, tokens: list[int]) -> None:
        table = self.tables[row.slot]
        for place, token in enumerate(tokens, start):
            before = self._at(row, place - 1)[1] if place else b""
            assert table[place // self.page_size] != 0, "a sequence writes to the trash page"
            self.memory[table[place // self.page_size], place % self.page_size] = before, history(before, token)

    def _read(self, row, count: int) -> bytes:
        seen = b""
        for place in range(row.start + count):
            before, after = self._at(row, place)
            assert before == seen, f"position {place} of slot {row.slot} does not follow what is before it"
            seen = after
        return seen

    def _at(self, row, place: int) -> tuple[bytes, bytes]:
        return self.memory[self.tables[row.slot][place // self.page_size], place % self.page_size]
