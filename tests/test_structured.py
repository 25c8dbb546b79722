"""Answers have the form that was asked for: every one that ends by itself, whatever else is in the batch, and in spite of preemption.

JAXLLM_SCHEMAS=300 asks for so many schemas, JAXLLM_TOKENIZER=FOLDER for another tokenizer than the default model's.
"""

import json
import os
import re
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import jsonschema
import pytest
from engines import Gather, answer, finish
from server_fixtures import STORIES
from structured import ROWS, UniformRunner, plan, schema, uniform

import jaxllm
from jaxllm import grammar
from jaxllm.core import Core, Refusal
from jaxllm.grammar import Grammars, Matcher
from jaxllm.mask import banned, words
from jaxllm.request import Limits, OverloadedError, Request, RequestError, SamplingParams, StructuredOutputs
from jaxllm.text import Tokenizer

SCHEMAS = int(os.environ.get("JAXLLM_SCHEMAS", "60"))
DEFAULT = Path(jaxllm.__file__).parent / "default_model"
# Neither date (February has 29 days in every year) nor time (which needs another package to be checked).
FORMATS = jsonschema.FormatChecker(["ipv4", "ipv6", "uuid", "email"])


@cache
def tokenizer(folder: str = str(DEFAULT)) -> Tokenizer:
    return Tokenizer.load(folder)


def eos(words: Tokenizer) -> int:
    assert words.eos_token_id is not None
    return words.eos_token_id


def core(longest: int = 512, **changes) -> Core:
    return uniform(tokenizer(), eos(tokenizer()), longest, **changes)


def asked(name: str = "r", prompt: tuple[int, ...] = (5,), max_tokens: int = 400, seed: int = 0, **how) -> Request:
    """A request for a form, given by its field of StructuredOutputs; other fields go to SamplingParams."""
    form = {field: how.pop(field) for field in ("json", "regex", "choice", "grammar", "json_object") if field in how}
    params = SamplingParams(max_tokens=max_tokens, seed=seed, structured_outputs=StructuredOutputs(**form), **how)
    return Request(name, prompt, params, stream=False)


def texts(gather: Gather) -> list[str]:
    return [c.text for _, c in sorted((c.index, c) for o in gather.outputs for c in o.outputs)]


def text(gather: Gather) -> str:
    (only,) = texts(gather)
    return only


def reasons(gather: Gather) -> list[str | None]:
    return [c.finish_reason for _, c in sorted((c.index, c) for o in gather.outputs for c in o.outputs)]


# ---------------------------------------------------------------------------- forms


def test_answers_to_many_schemas_are_valid():
    """Every one that ends by itself; and nearly all do, of a model that finds every allowed token equally likely."""
    used = tokenizer(os.environ.get("JAXLLM_TOKENIZER", str(DEFAULT)))
    engine = uniform(used, eos(used), 4096)
    requests = [asked(str(i), max_tokens=4000, seed=i, json=schema(i)) for i in range(SCHEMAS)]
    for request in requests:
        engine.check_form(request)
    ended = 0
    for request, gather in zip(requests, answer(engine, *requests), strict=True):
        if reasons(gather) == ["stop"]:
            ended += 1
            jsonschema.Draft202012Validator(schema(int(request.id)), format_checker=FORMATS).validate(json.loads(text(gather)))
        else:
            assert reasons(gather) == ["length"]
    assert ended >= 0.95 * SCHEMAS


@pytest.mark.parametrize(
    ("form", "matches"),
    [
        ({"regex": r"[0-9]{3}-[a-f]{2,4}"}, r"[0-9]{3}-[a-f]{2,4}"),
        ({"regex": "(große|kleine) Stadt(, 日本)?"}, "(große|kleine) Stadt(, 日本)?"),
        ({"choice": ["yes", "no", "a.b", "tab\tq#-&~ ", 'quo"te\\', "日本語"]}, None),
        ({"grammar": 'start: greeting " " NAME "!"\ngreeting: "hi" | "hello"\nNAME: /[A-Z][a-z]{1,5}/'}, "(hi|hello) [A-Z][a-z]{1,5}!"),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
        (
            {"grammar": 'start: "<call>" %json {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]} "</call>"'},
            None,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("folder", [str(DEFAULT), STORIES], ids=["byte-level", "byte-fallback"])
def test_every_kind_of_form(form, matches, folder):
    used = tokenizer(folder)
    (gather,) = answer(uniform(used, eos(used), 512), asked(n=ROWS, **form))
    for found, reason in zip(texts(gather), reasons(gather), strict=True):
        if "choice" in form:
            assert found in form["choice"]
        elif matches is None and reason == "stop":
            json.loads(found.removeprefix("<call>").removesuffix("</call>"))["a"]
        elif matches is not None:
            assert re.fullmatch(matches, found), found
        assert reason == "stop" or (matches is None and "choice" not in form)
    assert len(set(texts(gather))) > 2, "n answers that are one"


def test_special_tokens_are_no_text():
    """A grammar may name one; the text that it is written as is spelled by other tokens."""
    used = tokenizer(STORIES)
    name = used.special_tokens["bos_token"]
    (gather,) = answer(uniform(used, 2, 64), asked(grammar=f'start: "a" {name} "b"', skip_special_tokens=False))
    assert gather.tokens()[1] == used.bos_token_id and texts(gather) == [f"a{name}b"]
    (gather,) = answer(uniform(used, 2, 64), asked(choice=[name], skip_special_tokens=False))
    assert used.bos_token_id not in gather.tokens() and texts(gather) == [name]


def test_free_text_until_a_trigger():
    """What tools want: a grammar alone can say it, by a lexeme that ends where the trigger does."""
    used = tokenizer()
    grammars = Grammars(used, used.vocab_size, frozenset({eos(used)}))
    call = 'call: head %json {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": false} "</call>"'
    lark = f'start: call* tail\n{call}\nhead[lazy]: TEXT "<call>"\ntail: TEXT\nTEXT: /(.|\\n)*/'
    matcher = Matcher(grammars.compiled(StructuredOutputs(grammar=lark)).result())

    def allowed() -> set[bytes]:
        (bits,) = Matcher.allowed([matcher])
        return {used.token_bytes(i) for i in range(used.vocab_size) if bits[i // 32] >> i % 32 & 1}

    free = allowed()
    assert len(free) > 4000
    for token in used.encode("I look it up: <call>", add_special_tokens=False):
        matcher.take(token)
    assert {piece.strip()[:1] for piece in allowed()} <= {b"{", b""}
    for token in used.encode('{"a": 1}</call>', add_special_tokens=False):
        matcher.take(token)
    assert len(allowed()) > 4000 and matcher.fault is None and not matcher.over


def test_a_vocabulary_with_ids_that_are_no_tokens_and_a_model_without_end_token():
    used = tokenizer(STORIES)
    grammars = Grammars(used, used.vocab_size + 45, frozenset())
    matcher = Matcher(grammars.compiled(StructuredOutputs(regex="a+")).result())
    other = Matcher(grammars.compiled(StructuredOutputs(regex="a+")).result())
    bits = Matcher.allowed([matcher, other])[:, : words(used.vocab_size + 45)]
    allowed = {i for i in range(used.vocab_size + 45) if bits[0][i // 32] >> i % 32 & 1}
    assert allowed and all(set(used.token_bytes(i)) == {ord("a")} for i in allowed) and (bits[0] == bits[1]).all()
    engine = Core(UniformRunner(used.vocab_size + 45), plan(64), used.vocab_size + 45, frozenset(), used, 0)
    (gather,) = answer(engine, asked(regex="a{1,3}b"))
    assert re.fullmatch("a{1,3}b", text(gather)) and reasons(gather) == ["stop"]


# ---------------------------------------------------------------------------- ends


def test_a_complete_form_ends_the_answer_without_an_end_token():
    (gather,) = answer(core(), asked(choice=["fixed"], ignore_eos=True, min_tokens=50))
    assert texts(gather) == ["fixed"] and reasons(gather) == ["stop"] and eos(tokenizer()) not in gather.tokens()
    assert gather.outputs[-1].outputs[0].stop_reason is None


def test_an_end_token_comes_only_where_the_form_accepts():
    end = eos(tokenizer())
    for seed in range(8):
        (gather,) = answer(core(favour={end: 12.0}), asked(seed=seed, regex="(ab)+"))
        assert re.fullmatch("(ab)+", text(gather)) and reasons(gather) == ["stop"] and gather.tokens()[-1] == end
    (gather,) = answer(core(favour={end: 12.0}), asked(regex="(ab)+", ignore_eos=True, max_tokens=20))
    assert reasons(gather) == ["length"] and end not in gather.tokens()


def test_limits_and_stops_count_as_ever():
    (gather,) = answer(core(), asked(regex="[a-z]+", max_tokens=5, ignore_eos=True))
    assert reasons(gather) == ["length"] and len(gather.tokens()) == 5
    (gather,) = answer(core(), asked(regex="(a|b)c[xyz]{50,90}", stop=["c"]))
    assert texts(gather)[0] in ("a", "b") and gather.outputs[-1].outputs[0].stop_reason == "c"
    comma = tokenizer().encode(",", add_special_tokens=False)[-1]
    (gather,) = answer(core(favour={comma: 20.0}), asked(regex="a(,a){20,}", stop_token_ids=[comma]))
    assert gather.outputs[-1].outputs[0].stop_reason == comma


def test_a_form_beside_other_masks():
    letters = [tokenizer().encode(letter, add_special_tokens=False)[-1] for letter in "abc"]
    (gather,) = answer(core(), asked(regex="[abc]{8}", allowed_token_ids=letters[:2]))
    assert re.fullmatch("[ab]{8}", text(gather)) and set(gather.tokens()) <= set(letters[:2])
    (gather,) = answer(core(), asked(regex="[ab]{8}", allowed_token_ids=letters, bad_words=["b"]))
    assert texts(gather) == ["aaaaaaaa"]
    (gather,) = answer(core(), asked(regex="[ab]{8}c", allowed_token_ids=letters[:2]))
    end = gather.outputs[-1].outputs[0]
    assert end.finish_reason == "error" and "no token is left" in str(end.stop_reason)


def test_each_of_several_forms_in_one_batch_and_free_rows_beside_them():
    free = Request("free", (5, 6), SamplingParams(max_tokens=30, seed=1, ignore_eos=True))
    (alone,) = answer(core(), free)
    engine = core()
    forms = [asked(f"f{i}", regex=f"{i}[a-z]{{{i + 1}}}", n=2) for i in range(7)]
    beside, *found = answer(engine, free, *forms)
    assert beside.tokens() == alone.tokens()
    for i, gather in enumerate(found):
        assert all(re.fullmatch(f"{i}[a-z]{{{i + 1}}}", found) for found in texts(gather))
    assert engine.stats().generation_tokens == sum(len(g.tokens(i)) for g in (beside, *found) for i in range(2))


def test_a_row_with_a_form_runs_in_every_step():
    """It has a token of each step, as its neighbours do: only the draw waits for the token before."""
    engine = core()
    answer(engine, asked("form", regex="[a-z]{200}", allowed_token_ids=[tokenizer().encode("a", add_special_tokens=False)[-1]]))
    alone = engine._runner.draws  # pyright: ignore[reportAttributeAccessIssue]
    assert 200 <= alone <= 203


def test_preempted_answers_are_those_of_an_engine_with_room():
    """A matcher follows the tokens of its answer, which a preempted row keeps."""
    requests = [asked(f"p{i}", tuple(range(5, 60)), seed=i, regex="([a-z]{3} )*", max_tokens=100, min_tokens=90) for i in range(6)]
    roomy = answer(core(), *requests)
    tight = core(longest=512)
    tight._scheduler.pool.take(tight._scheduler.pool.available - 10)
    gathers = [Gather() for _ in requests]
    for request, gather in zip(requests, gathers, strict=True):
        tight.add(request, gather)
    while tight.turn():
        pass
    assert tight.stats().preemptions > 0
    assert [g.tokens() for g in gathers] == [g.tokens() for g in roomy]
    assert all(re.fullmatch("([a-z]{3} )*[a-z ]*", text(g)) for g in gathers)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "a\\"}, "lone backslash"),
        ({"json": "{"}, "cannot be honoured"),
        ({"json": "[]"}, "must be an object"),
        ({"json": "true"}, "must be an object"),
        ({"json": "\ud800"}, "cannot be honoured"),
        ({"json": '{"a":' * 20_000}, "cannot be honoured"),
        ({"json": {"type": "str"}}, "Invalid type"),
        ({"json": {"uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"x-guidance": {"lenient": True}, "contains": {}}}, "contains"),
        ({"json": {"properties": {"a": {"type": "string", "nullable": True}}}}, "nullable"),
        ({"json": {"type": "string", "format": "nonsense"}}, "nonsense"),
        ({"json": {"$ref": "http://127.0.0.1:9/schema"}}, "retrieving it failed"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
        ({"json": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}}, "oneOf"),
        ({"grammar": "start: undefined"}, "undefined"),
        ({"grammar": "start: <|no_such_token|>"}, "no_such_token"),
        ({"grammar": ""}, "cannot be honoured"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_forms_that_cannot_be_honoured(form, says):
    engine = core()
    request = asked(**form)
    with pytest.raises(RequestError, match=re.escape(says)) as caught:
        engine.check_form(request)
    assert caught.value.param == "structured_outputs" and str(caught.value).startswith(f"structured_outputs.{next(iter(form))} cannot")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    with pytest.raises(RequestError, match=re.escape(says)):
        engine.add(request, Gather())
    assert not engine.turn()


@pytest.mark.parametrize("given", [{}, {"json": "{}", "regex": "a"}, {"json_object": False}, {"choice": []}, {"choice": ["a", ""]}])
def test_exactly_one_form(given):
    with pytest.raises(RequestError, match=r"structured_outputs"):
        StructuredOutputs(**given)


def test_a_form_has_a_size_and_needs_a_tokenizer():
    with pytest.raises(RequestError, match="has 200002 characters; at most 200000"):
        StructuredOutputs(regex="a" * 200_002)
    with pytest.raises(RequestError, match="need a tokenizer"):
        Limits(64, 100, 5, has_text=False).check(asked(regex="a"))


def chain(count: int) -> dict:
    """A schema of so many references, one to the next."""
    links = {f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{count}": {"type": "null"}}}


def test_a_form_that_crashes_the_compiler_or_never_ends_is_refused_and_the_next_one_is_not(monkeypatch):
    monkeypatch.setattr("jaxllm.trial.TRIAL_S", 1.5)
    rules = "start: r0\n" + "".join(f'r{i}: r{i + 1} r{i + 1} | "x{i}"\n' for i in range(3000)) + 'r3000: "q"'
    engine = core()
    for request in (asked(grammar=rules), asked(json=chain(3000))):
        with pytest.raises(RequestError, match="nested too deeply"):
            engine.check_form(request)
    with pytest.raises(RequestError, match="takes more than"):
        engine.check_form(asked(json={"type": "integer", "multipleOf": 999_983}))
    monkeypatch.setattr("jaxllm.trial.TRIAL_S", 20)
    (gather,) = answer(engine, asked(json=chain(20) | {"title": "not too long"}, max_tokens=20))
    assert gather.reason in ("stop", "length")


def test_names_that_are_also_keywords_of_old_drafts_are_no_keywords():
    names = {"nullable": {"type": "boolean"}, "extends": {"const": "nullable"}}
    made = {"type": "object", "properties": names, "required": ["nullable", "extends"], "additionalProperties": False}
    (gather,) = answer(core(), asked(json=made | {"default": {"nullable": True}}))
    assert set(json.loads(text(gather))) == set(names)


# ---------------------------------------------------------------------------- compiling


@pytest.fixture
def gate(monkeypatch):
    """Compiling waits until it is set."""
    opened, written = threading.Event(), grammar.written
    monkeypatch.setattr(grammar, "written", lambda asked: opened.wait(100) and written(asked))
    monkeypatch.setattr("jaxllm.core.COMPILE_S", 100)  # a busy machine is no reason to refuse
    yield opened
    opened.set()


def test_nobody_waits_for_a_form_but_who_asked_for_it(gate):
    engine, slow, free = core(), Gather(), Gather()
    engine.add(asked("slow", regex="[0-9]{4}"), slow)
    assert engine.stats().waiting == 1
    engine.add(Request("free", (5,), SamplingParams(max_tokens=10, ignore_eos=True)), free)
    while not free.outputs or not free.outputs[-1].finished:
        assert engine.turn()
    assert not slow.outputs and engine.turn(), "an engine with a form to come has something to do"
    gate.set()
    finish(engine)
    assert re.fullmatch("[0-9]{4}", text(slow))


def test_leaving_while_a_form_is_compiled(gate):
    engine, gone = core(), Gather()
    engine.add(asked("gone", regex="[0-9]{5}", n=3), gone)
    engine.abort("gone")
    assert reasons(gone) == ["abort"] * 3 and gone.outputs[-1].finished and not engine.turn()
    engine.add(asked("gone", regex="[0-9]{5}"), gone)  # its name is free again
    gate.set()
    finish(engine)
    assert gone.reason == "stop"


def test_a_form_that_takes_too_long_is_refused(gate, monkeypatch):
    heard: list = []
    monkeypatch.setattr("jaxllm.core.COMPILE_S", 0.05)
    monkeypatch.setattr("jaxllm.grammar.COMPILE_S", 0.05)
    engine = core()
    engine.add(asked("slow", regex="[0-9]{6}"), heard.append)
    while engine.turn():
        pass
    assert isinstance(heard[0], Refusal) and heard[0].request_id == "slow" and "takes more than" in str(heard[0].error)
    with pytest.raises(RequestError, match="takes more than"):
        engine.check_form(asked(regex="[0-9]{7}"))
    assert engine.stats().waiting == 0


def test_a_compiler_that_fails_fails_one_request(monkeypatch):
    class Panic(BaseException):
        pass

    def written(asked):
        raise Panic

    monkeypatch.setattr(grammar, "written", written)
    engine, heard = core(), []
    engine.add(asked("bad", regex="unlucky"), heard.append)
    while engine.turn():
        pass
    assert [type(each) for each in heard] == [Refusal] and "its compiler failed" in str(heard[0].error)


def test_a_form_that_turns_out_wrong_later_is_refused_later(gate):
    heard: list = []
    engine = core()
    engine.add(asked("bad", regex="[0-9]{4}("), heard.append)
    gate.set()
    while engine.turn():
        pass
    assert [type(each) for each in heard] == [Refusal] and "unclosed group" in str(heard[0].error)


def test_who_waits_for_a_form_waits_in_the_queue(gate):
    engine = Core(UniformRunner(4096), plan(64), 4096, frozenset(), tokenizer(), 0, max_queued=1)
    engine.add(asked("a", regex="a{3}", n=ROWS + 1), Gather())
    with pytest.raises(OverloadedError, match="the queue is full"):
        engine.add(asked("b", regex="a{3}"), Gather())


def test_forms_are_compiled_once_and_the_oldest_forgotten(monkeypatch):
    grammars, count = Grammars(tokenizer(), 4096, frozenset({1})), []
    written = grammar.written
    monkeypatch.setattr(grammar, "written", lambda asked: count.append(asked) or written(asked))
    monkeypatch.setattr(grammar, "KEPT", 2)
    for regex in ("a", "b", "a", "c", "a", "b", "a"):
        grammars.check(StructuredOutputs(regex=regex))
    assert [form.regex for form in count if form.regex in ("a", "b", "c")] == ["a", "b", "c", "b"]


def test_a_form_that_gets_out_of_hand_ends_its_answer_and_no_other():
    """Each step's work is limited: an expression whose states explode meets the limit, and says so."""
    engine = core()
    wild, tame = answer(engine, asked("wild", regex="((a{1,100}){1,100}){1,100}", ignore_eos=True), asked("tame", regex="[a-z]{40}"))
    end = wild.outputs[-1].outputs[0]
    assert end.finish_reason == "error" and "structured_outputs could not be followed to the end" in str(end.stop_reason)
    assert re.fullmatch("[a-z]{40}", text(tame)) and engine.stats().ended == {"error": 1, "stop": 1}


def test_llguidance_is_imported_by_the_first_request_that_needs_it():
    code = "import sys, jaxllm.mask, jaxllm.trial, serving.protocol; assert 'llguidance' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_form_allows_is_asked_together_or_alone():
    used = tokenizer()
    form = Grammars(used, used.vocab_size, frozenset({eos(used)})).compiled(StructuredOutputs(regex="[ab]c*")).result()
    base = core()
    base.add(asked(regex="[ab]c*"), Gather())
    (live,) = base._live.values()
    mask = live.answers[0].sequence.mask
    assert mask is not None
    masks = [mask.following(form) for _ in range(3)]
    masks[1].take(used.encode("a", add_special_tokens=False)[-1])
    together = banned([(mask, ()) for mask in masks])
    assert all((together[i] == mask.banned(())).all() for i, mask in enumerate(masks))
    assert (together[0] == together[2]).all() and (together[0] != together[1]).any()
