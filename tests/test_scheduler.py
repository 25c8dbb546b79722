"""Pages and scheduling against the token oracle: whatever arrives, leaves or is preempted, every answer is the one it would be alone."""

from dataclasses import replace

import pytest
from fake_runner import FakeRunner, expected
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxllm.core import Core
from jaxllm.mask import TokenMask
from jaxllm.pages import OutOfPages, PagePool, chain
from jaxllm.plan import Bucket, Plan
from jaxllm.request import Output, OverloadedError, Request, RequestError, SamplingParams
from jaxllm.scheduler import Scheduler, Sequence

VOCAB, EOS = 50, frozenset({7})


def make_plan(pages=12, rows=4, page_size=4, longest=40, chunk=8, small=4, prefix=True, steps=1) -> Plan:
    buckets = {Bucket(0, r) for r in (1, 2, rows)} | {Bucket(c, r) for c in (small, chunk) for r in (1, rows)}
    return Plan(
        dtype="float32",
        max_model_len=longest,
        page_size=page_size,
        num_pages=pages,
        max_num_seqs=rows,
        buckets=tuple(sorted(buckets)),
        scored=Bucket(small, 1, scored=True),
        enable_prefix_caching=prefix,
        max_logprobs=5,
        tensor_parallel_size=1,
        decode_steps=steps,
    )


def make_core(plan: Plan, **options) -> Core:
    return Core(FakeRunner(plan.page_size, VOCAB), plan, VOCAB, EOS, tokenizer=None, **options)


def request(name: str, prompt, priority: int = 0, cache_salt: str | None = None, **params) -> Request:
    return Request(name, tuple(prompt), SamplingParams(temperature=0, **params), priority=priority, cache_salt=cache_salt)


class Listener:
    def __init__(self, n: int = 1):
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.reasons: list[str | None] = [None] * n
        self.finished = 0
        self.prompt_logprobs: list = []

    def __call__(self, output):
        for c in output.outputs:
            assert self.reasons[c.index] is None, "a sequence spoke after its end"
            self.tokens[c.index] += c.token_ids
            self.reasons[c.index] = c.finish_reason
        self.finished += output.finished
        if output.prompt_logprobs is not None:
            self.prompt_logprobs.append(output.prompt_logprobs)


def run_dry(core: Core, turns: int = 5000) -> None:
    for _ in range(turns):
        if not core.turn():
            return
    raise AssertionError(f"still busy after {turns} turns: {core.stats()}")


class AnyOrder(RuleBasedStateMachine):
    """Adds, aborts and turns in any order, on a cache far too small for what is asked."""

    @initialize(
        pages=st.integers(10, 16),
        rows=st.integers(2, 5),
        size=st.sampled_from([1, 4, 5]),
        small=st.integers(1, 6),
        prefix=st.booleans(),
        by_priority=st.booleans(),
        steps=st.integers(1, 4),
    )
    def start(self, pages, rows, size, small, prefix, by_priority, steps):
        self.plan = make_plan(pages, rows, size, longest=min(40, pages * size), small=small, prefix=prefix, steps=min(steps, size))
        self.core = make_core(self.plan, by_priority=by_priority)
        self.asked: dict[str, tuple[Request, Listener]] = {}

    @rule(
        start=st.integers(0, 3),
        length=st.integers(1, 30),
        answer=st.integers(1, 25),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        ignore_eos=st.booleans(),
        scored=st.sampled_from([None, None, None, 1]),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, None, "a"]),
        waits=st.booleans(),
    )
    def add(self, start, length, answer, n, ignore_eos, scored, priority, salt, waits):
        prompt = [(start + i) % VOCAB for i in range(min(length, self.plan.max_model_len - 1))]  # few beginnings: many shared pages
        name = f"r{len(self.asked)}"
        listener = Listener(n)
        asked = request(name, prompt, max_tokens=answer, n=n, ignore_eos=ignore_eos, prompt_logprobs=scored)
        asked = replace(asked, priority=priority if self.core.limits.by_priority else 0, cache_salt=salt)
        self.core.add(asked, listener)
        for each in self.core._live[name].answers if waits else ():
            each.sequence.mask = TokenMask(None, [(0, 1)], VOCAB)  # the oracle's tokens heed no mask, only its waiting
        self.asked[name] = asked, listener

    @rule(which=st.integers(0, 100))
    def abort(self, which):
        if self.asked:
            self.core.abort(list(self.asked)[which % len(self.asked)])

    @rule(turns=st.integers(1, 6))
    def turn(self, turns):
        for _ in range(turns):
            self.core.turn()

    @invariant()
    def every_page_is_somewhere(self):
        if hasattr(self, "core"):
            s = self.core.stats()
            assert s.free + s.cached + s.held == s.pages

    def teardown(self):
        if not hasattr(self, "core"):
            return
        run_dry(self.core)
        for asked, listener in self.asked.values():
            stop_ids = frozenset() if asked.params.ignore_eos else EOS
            limit = min(self.plan.max_model_len, len(asked.prompt_token_ids) + (asked.params.max_tokens or 0))
            alone = expected(asked.prompt_token_ids, limit, VOCAB, stop_ids)
            assert listener.finished == 1
            for tokens, reason in zip(listener.tokens, listener.reasons, strict=True):
                if reason == "abort":
                    assert tokens == alone[: len(tokens)]
                else:
                    assert tokens == alone
                    assert reason == ("stop" if alone[-1] in stop_ids else "length")
            if asked.params.prompt_logprobs is not None and "abort" not in listener.reasons:
                (given,) = listener.prompt_logprobs
                assert [lp is None for lp in given] == [True] + [False] * (len(asked.prompt_token_ids) - 1)
        s = self.core.stats()
        assert (s.running, s.waiting, s.held) == (0, 0, 0)
        assert s.free + s.cached == s.pages


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def test_the_smallest_priority_is_served_first_and_gives_way_last():
    core = make_core(make_plan(pages=14, rows=2, prefix=False), by_priority=True)
    ended: list[str] = []
    for name, priority in (("a", 5), ("b", 5), ("late", 5), ("first", -1), ("middle", 0)):
        asked = request(name, [1, 2, 3], priority, max_tokens=20, ignore_eos=True)
        core.add(asked, lambda heard: ended.append(heard.request_id) if isinstance(heard, Output) and heard.finished else None)
        core.turn()
    run_dry(core)
    assert ended == ["a", "b", "first", "middle", "late"]
    core = make_core(make_plan(pages=10, rows=4, prefix=False), by_priority=True)
    ended.clear()
    for name, priority in (("low", 1), ("high", 0)):
        asked = request(name, [1, 2, 3], priority, max_tokens=30, ignore_eos=True)
        core.add(asked, lambda heard: ended.append(heard.request_id) if isinstance(heard, Output) and heard.finished else None)
        core.turn()
    run_dry(core)
    assert core.stats().preemptions == 1 and ended == ["high", "low"]


def test_prompts_of_different_salts_share_nothing():
    core = make_core(make_plan(pages=12, rows=4))
    for name, salt, cached in (("a", "x", 0), ("b", "y", 0), ("c", None, 0), ("d", "y", 8)):
        core.add(request(name, range(9), cache_salt=salt, max_tokens=1), Listener())
        before = core.stats().cached_tokens
        run_dry(core)
        assert core.stats().cached_tokens - before == cached
    core.forget()
    core.add(request("e", range(9), cache_salt="y", max_tokens=1), Listener())
    run_dry(core)
    assert core.stats().cached_tokens == 8 and core.stats().cached < 9


def test_a_full_queue_refuses_and_counts_and_later_takes_again():
    core = make_core(make_plan(rows=2), max_queued=1)
    for i in range(3):
        core.add(request(f"r{i}", [1], max_tokens=3, ignore_eos=True), Listener())
    with pytest.raises(OverloadedError, match="2 would wait, and at most 1 may"):
        core.add(request("r3", [1]), Listener())
    run_dry(core)
    with pytest.raises(OverloadedError):
        core.add(request("many", [1], n=4), Listener(4))
    core.add(request("r4", [1], n=3), Listener(3))
    run_dry(core)
    assert core.stats().ended == {"length": 4, "refused": 2}


def test_what_is_counted_of_a_request():
    core = make_core(make_plan())
    core.add(request("a", range(9), max_tokens=5, ignore_eos=True), Listener())
    core.add(request("b", range(3), max_tokens=7, ignore_eos=True, n=2), Listener(2))
    run_dry(core)
    core.add(request("c", range(3), max_tokens=7), Listener())
    core.abort("c")
    stats, found = core.stats(), core.stats().histograms
    assert stats.ended == {"length": 2, "abort": 1} and stats.generation_tokens == 19
    counts = {name: sum(histogram.counts) for name, histogram in found.items()}
    assert counts["time_to_first_token_seconds"] == counts["request_queue_time_seconds"] == counts["request_prefill_time_seconds"] == 2
    assert counts["e2e_request_latency_seconds"] == counts["request_prompt_tokens"] == 3
    assert counts["inter_token_latency_seconds"] == 19 - 3 and found["request_generation_tokens"].total == 19
    assert found["e2e_request_latency_seconds"].total >= found["time_to_first_token_seconds"].total > 0


def test_a_page_that_is_taken_twice_is_caught_by_the_oracle():
    """The oracle can fail: a pool that hands out a held page breaks a row's history."""
    core = make_core(make_plan(pages=10, rows=4))
    core._scheduler.pool.take = lambda count: list(range(1, count + 1))
    for i in range(3):
        core.add(request(f"r{i}", [i] * 9, max_tokens=10, ignore_eos=True), Listener())
    with pytest.raises(AssertionError, match="does not follow"):
        run_dry(core)


def test_preemption_happens_and_changes_nothing():
    core = make_core(make_plan(pages=10, rows=4, prefix=False))
    listeners = [Listener() for _ in range(4)]
    for i, listener in enumerate(listeners):
        core.add(request(f"r{i}", [i, 1, 2], max_tokens=30, ignore_eos=True), listener)
    run_dry(core)
    assert core.stats().preemptions > 0
    for i, listener in enumerate(listeners):
        assert listener.tokens[0] == expected((i, 1, 2), 33, VOCAB)


def test_several_tokens_come_of_one_dispatch_when_nobody_waits():
    """Counted in dispatches; the tokens are the oracle's whatever is repeated."""

    def dispatches(steps: int, *asked: Request) -> int:
        core = make_core(make_plan(pages=40, steps=steps))
        listeners = [Listener() for _ in asked]
        for each, listener in zip(asked, listeners, strict=True):
            core.add(each, listener)
            if each.id == "waits":
                core._live[each.id].answers[0].sequence.mask = TokenMask(None, [(0, 1)], VOCAB)
        run_dry(core)
        for each, listener in zip(asked, listeners, strict=True):
            limit = len(each.prompt_token_ids) + (each.params.max_tokens or 0)
            assert listener.tokens == [expected(each.prompt_token_ids, limit, VOCAB)]
        return core._runner.steps  # pyright: ignore[reportAttributeAccessIssue]

    long, short = (request(name, [1, 2, 3], ignore_eos=True, max_tokens=count) for name, count in (("long", 21), ("short", 8)))
    assert dispatches(1, long) == 21
    assert dispatches(4, long) == 6, "one for the prompt, then four tokens at a time"
    assert dispatches(4, long, short) == 6, "a row that ends inside of one does not hold the others up"
    assert dispatches(4, request("fits", [1], ignore_eos=True, max_tokens=4)) == 4, "nothing is repeated for fewer tokens than it gives"
    assert dispatches(4, long, request("edited", [5], ignore_eos=True, max_tokens=21, min_tokens=2)) == 21
    waits = request("waits", [6], ignore_eos=True, max_tokens=6)
    assert dispatches(4, waits) == 6 and dispatches(4, long, waits) == 6, "a token of one that waits, beside four of one that need not"
    assert dispatches(4, long, waits, request("fixed", [6], max_tokens=21, ignore_eos=True, allowed_token_ids=range(VOCAB))) == 21
    assert dispatches(4, *(request(f"r{i}", [i], ignore_eos=True, max_tokens=9) for i in range(6))) > 10, "some wait for a row"


def test_a_shared_prefix_is_computed_once():
    core = make_core(make_plan(pages=12, rows=4))
    first, second = Listener(), Listener()
    core.add(request("a", range(17), max_tokens=2, ignore_eos=True), first)
    run_dry(core)
    core.add(request("b", range(17), max_tokens=2, ignore_eos=True), second)
    run_dry(core)
    assert core.stats().cached_tokens == 16
    assert first.tokens == second.tokens


def test_requests_in_one_step_share_what_that_step_writes():
    core = make_core(make_plan(pages=12, rows=4, chunk=32))
    for name in "ab":
        core.add(request(name, range(17), max_tokens=2, ignore_eos=True), Listener())
    core.turn()
    assert core.stats().held == 6  # four shared pages, and one each for the last token
    run_dry(core)


def test_aborting_at_any_moment_gives_everything_back():
    for turns in range(12):
        core = make_core(make_plan())
        listener = Listener(2)
        core.add(request("a", range(20), max_tokens=15, n=2, ignore_eos=True), listener)
        for _ in range(turns):
            core.turn()
        core.abort("a")
        core.abort("a")
        run_dry(core)
        assert core.stats().held == 0
        assert listener.finished == 1
        assert listener.reasons == ["abort", "abort"]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        (range(40), {}, "maximum context length is 40 tokens. However, your prompt contains 40 input tokens"),
        ([VOCAB], {}, "prompt holds token id 50, but the vocabulary has ids 0 to 49"),
        ([1], {"logit_bias": {99: 1.0}}, "logit_bias holds token id 99"),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids holds token id -1"),
        ([1], {"logprobs": 6}, "logprobs is 6, but this server gives at most 5"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
    ],
)
def test_what_can_never_be_served_is_refused(prompt, params, message):
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        make_core(make_plan()).add(request("a", [i % 60 for i in prompt], **params), Listener())


def test_the_same_id_twice_is_refused():
    core = make_core(make_plan())
    core.add(request("a", [1]), Listener())
    with pytest.raises(RequestError, match="'a' is already running"):
        core.add(request("a", [1]), Listener())


def test_pool_takes_all_or_nothing():
    pool = PagePool(3)
    pages = pool.take(2)
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 3 available"):
        pool.take(2)
    assert (pool.free, pool.held) == (1, 2)
    pool.release(pages)
    assert sorted(pool.take(3)) == [1, 2, 3]


def test_pool_evicts_the_oldest_and_leaves_of_a_chain_first():
    pool = PagePool(3)
    names = chain(range(12), 4)
    pages = pool.take(3)
    for page, name in zip(pages, names, strict=True):
        pool.publish(page, name)
    pool.release(pages)
    assert (pool.free, pool.cached, pool.held) == (0, 3, 0)
    assert pool.take(1) == [pages[2]]
    assert pool.share(names) == pages[:2]


def test_digests_depend_on_everything_before_them():
    assert chain([1, 2, 3, 4], 2)[1] != chain([9, 2, 3, 4], 2)[1]
    assert chain([1, 2, 3, 4, 5], 2) == chain([1, 2, 3, 4], 2)


@pytest.mark.parametrize(("stream", "chunks"), [(True, [8, 4, 4, 4]), (False, [8, 8, 4])])
def test_a_streamed_answer_is_not_kept_waiting_by_large_chunks(stream, chunks):
    """Prompts of 4 and 16 tokens: once the first answer has begun, each step takes at most 4 tokens of the other prompt."""
    plan = replace(make_plan(pages=40, rows=2, chunk=8, small=4, prefix=False), streamed_chunk=4)
    scheduler = Scheduler(plan)
    for name, length in (("first", 4), ("second", 16)):
        made = replace(request(name, range(length), max_tokens=20), stream=stream)
        scheduler.add(Sequence(made, 0, 0, 40))
    seen = []
    while sum(seen) < 20:
        step = scheduler.next()
        assert step is not None
        seen.append(sum(row.count for row in step.rows if row.chunked))
    assert seen == chunks
