"""Bodies as they should not be: each is refused with a 4xx in the one error shape, naming the field, and the server goes on."""

import json

import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fixtures import serving

from jaxllm.request import RequestError, SamplingParams
from serving.errors import TYPES, ApiError
from serving.protocol import fit, parse, sampling_params
from serving.routes.chat import ChatBody
from serving.routes.completions import CompletionBody

ROUTES = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
}
COMPLETIONS, CHAT = ROUTES


@pytest.fixture(scope="module")
def served():
    with serving(FakeEngine()) as served:
        yield served


def post(served, path, raw, kind="application/json"):
    return served.http.post(path, content=raw, headers={"content-type": kind} if kind else {})


def refused(response, status=400):
    """The error, after checking that it has the one shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and isinstance(body["error"]["message"], str)
    assert body["error"]["type"] == TYPES[status]
    return body["error"]


MALFORMED = {
    "empty": b"",
    "no JSON": b"hello",
    "cut off": b'{"prompt": "a',
    "a list": b"[]",
    "a string": b'"prompt"',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "very deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a 5000-digit number": b'{"seed": ' + b"9" * 5000 + b"}",
    "nothing": b"null",
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bodies(served, path, raw):
    refused(post(served, path, raw))
    assert served.post(path, ROUTES[path]).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_the_body_must_be_sent_as_json(served, kind):
    assert "application/json" in refused(post(served, COMPLETIONS, json.dumps(ROUTES[COMPLETIONS]).encode(), kind))["message"]


def test_json_with_a_charset_is_fine(served):
    assert post(served, COMPLETIONS, b'{"prompt": "a"}', "application/json; charset=utf-8").status_code == 200


WRONG = {
    "max_tokens": ["5", 1.5, True, -1, 10**400, [], {}],
    "temperature": ["1", -0.1, 2.1, float("nan"), float("inf"), True, 10**400],
    "top_p": [0, -1, 1.1, "x"],
    "top_k": [-2, 1.5, 2**63],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1, "0"],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1],
    "n": [0, -1, 129, 2**64, "2"],
    "seed": [2**63, 0.5, "7"],
    "min_tokens": [-1, 10],
    "stop": [5, [5], {}, [""], "", ["x"] * 33, ["a", None]],
    "stop_token_ids": [5, ["a"], [260], [-1], [10**30]],
    "logit_bias": [5, {"a": 1}, {"5": "x"}, {"5": 101}, {"5": float("nan")}, {"260": 1}, {"-1": 1}],
    "logprobs": [-1, 21, "x", 1.5],
    "prompt_logprobs": [-1, 21],
    "ignore_eos": ["yes", 1],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, 5],
    "model": [5, ["a"]],
    "skip_special_tokens": ["no"],
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values], ids=lambda v: repr(v)[:30])
def test_wrong_values_are_refused_by_name(served, path, field, value):
    if path == CHAT and field == "logprobs":
        value = "x"  # a boolean there
    error = refused(post(served, path, json.dumps(ROUTES[path] | {field: value}).encode()))
    assert error["param"] == field and field in error["message"], error


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], ["a", 1], [1, "a"], [[1], "a"], [[[1]]], {}, [True], [-1], [1.5], [2**31], [260], [[1], []], ["a"] * 1025]
)
def test_prompts_that_are_none(served, prompt):
    assert refused(served.post(COMPLETIONS, {"prompt": prompt}))["param"] == "prompt"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "at least one message"),
        ([], "at least one message"),
        ("Hi", "messages"),
        (["Hi"], "messages"),
        ([{}], "messages[0].role"),
        ([{"role": 5, "content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["Hi"]}], "text only"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text only"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], "image_url"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [{}]}], "messages[1].tool_calls"),
        ([{"role": "ghost", "content": "Hi"}], "ghost"),
    ],
)
def test_messages_that_are_none(served, messages, says):
    error = refused(served.post(CHAT, {"messages": messages}))
    assert says in error["message"] and error["param"].startswith("messages")


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_fields_we_know_and_do_not_honour(kind):
    """Every row of the table: something else than its neutral values is refused by name, its neutral values and null are not."""
    for name, neutral in kind.refused.items():
        with pytest.raises(RequestError, match=f"`{name}` is not supported") as caught:
            parse(kind, json.dumps({name: {"some": ["thing"]}}).encode())
        assert caught.value.param == name
        for value in (None, *neutral):
            assert parse(kind, json.dumps({name: value}).encode())[1] == []


@pytest.mark.parametrize(
    "options",
    [
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "auto"},
        {"functions": []},
        {"top_logprobs": 1},
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"self": "x"}},
        {"stream": True, "prompt_logprobs": 1},
        {"stream": True, "stream_options": {"continuous_usage_stats": "yes"}},
        {"stream": True, "stream_options": {"include_usage": "yes"}},
    ],
)
def test_chat_options_that_are_refused(served, options):
    refused(served.post(CHAT, ROUTES[CHAT] | options))


def test_harmless_options_are_accepted(served):
    harmless = {
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "ann",
        "store": False,
        "n": None,
        "stop": None,
    }
    response = served.post(CHAT, ROUTES[CHAT] | harmless)
    assert response.status_code == 200 and "x-jaxllm-ignored-fields" not in response.headers


def test_best_of_must_be_n(served):
    assert served.post(COMPLETIONS, ROUTES[COMPLETIONS] | {"best_of": 1}).status_code == 200
    assert "2 != 1" in refused(served.post(COMPLETIONS, ROUTES[COMPLETIONS] | {"best_of": 2}))["message"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
def test_unknown_fields_are_accepted_and_named(served, path, stream, caplog):
    body = ROUTES[path] | {"stream": stream, "tempratur": 1, "x\r\ny: ü": 2, f"only{path}{stream}": 3}
    for _ in range(2):
        response = served.post(path, body)
        assert response.status_code == 200
        named = response.headers["x-jaxllm-ignored-fields"]
        assert named.startswith("tempratur, x??y???, only")
    assert caplog.text.count(f"{stream} ignored") == 1  # logged once


def test_unknown_stream_options_are_named(served):
    response = served.post(COMPLETIONS, ROUTES[COMPLETIONS] | {"stream": True, "stream_options": {"include_obfuscation": False}})
    assert response.headers["x-jaxllm-ignored-fields"] == "stream_options.include_obfuscation"


def test_routes_and_methods_that_are_not(served):
    assert "/v1/nothing" in refused(served.http.get("/v1/nothing"), 404)["message"]
    refused(served.http.get("/v1/models/"), 404)
    response = served.http.get(f"{COMPLETIONS}")
    assert "GET" in refused(response, 405)["message"] and response.headers["allow"] == "POST"
    assert refused(served.http.get("/v1/models/org/none"), 404)["param"] == "model"


def test_one_bad_prompt_starts_none(served):
    before = len(served.engine.served)
    refused(served.post(COMPLETIONS, {"prompt": [[1], [2], [260]]}))
    assert len(served.engine.served) == before


def test_a_long_text_is_encoded_and_refused_with_both_numbers(served):
    message = refused(served.post(COMPLETIONS, {"prompt": "a" * 100_000}))["message"]
    assert "100001 tokens" in message and "256 tokens" in message


def test_the_models_defaults_lie_beneath_the_request():
    engine = FakeEngine()
    engine.default_params = {"temperature": 0.5, "top_k": 7, "max_tokens": 3}
    body, _ = parse(CompletionBody, b'{"prompt": "a", "temperature": 0.25, "top_p": null}')
    assert sampling_params(engine, body, 3, None) == SamplingParams(temperature=0.25, top_k=7, max_tokens=3)


def test_the_models_own_limit_counts_when_the_request_has_none():
    engine = FakeEngine()
    engine.default_params = {"max_tokens": 3}
    with serving(engine) as served:
        for path, body in ROUTES.items():
            answer = served.post(path, body | {"max_tokens": None, "ignore_eos": True}).json()
            assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("prompt", "asked", "fits"), [(1, None, 255), (1, 16, 16), (250, 16, 6), (255, None, 1)])
def test_fit(prompt, asked, fits):
    assert fit(FakeEngine(), prompt, asked) == fits


def test_nothing_fits():
    with pytest.raises(ApiError, match=r"256 tokens.*256 tokens.*at most 255"):
        fit(FakeEngine(), 256, 1)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(LEAVES, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=3), of, max_size=3), max_leaves=6)
FIELDS = st.sampled_from(sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *ChatBody.refused, "unknown"}))


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(sorted(ROUTES)), fields=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_no_body_breaks_the_server(served, path, fields):
    response = post(served, path, json.dumps(ROUTES[path] | fields).encode())
    if response.status_code != 200:
        refused(response, 404 if response.status_code == 404 else 400)
