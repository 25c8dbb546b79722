"""Clients that vanish, engines that fail, keys that are wrong: the fake engine behind a real socket, raw sockets where it matters."""

import contextlib
import json
import logging

import openai
import pytest
from fake_engine import FakeEngine
from server_fixtures import read_event, serving, wait_until

from serving.options import ServerOptions

COMPLETION = "/v1/completions"
LONG = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture
def slow():
    """A served engine that takes 10 ms a token: 2 s for a LONG answer."""
    with serving(FakeEngine(step_s=0.01)) as served:
        yield served


def nothing_runs(engine):
    return lambda: not engine.running


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["Once", ["Once", "Twice", "Thrice"]])
def test_a_vanished_client_aborts_its_requests(slow, stream, prompt):
    connection = slow.open(COMPLETION, LONG | {"prompt": prompt, "stream": stream})
    wait_until(lambda: len(slow.engine.running) == len([prompt] if isinstance(prompt, str) else prompt))
    if stream:
        read_event(connection)
    connection.close()
    wait_until(nothing_runs(slow.engine), 0.5)  # at once: by itself it would run for 2 s
    assert len(slow.engine.aborted) == len([prompt] if isinstance(prompt, str) else prompt)


def test_a_client_that_vanishes_before_the_first_token_is_noticed():
    with serving(FakeEngine()) as served:
        served.engine.step_s = 3
        connection = served.open(COMPLETION, LONG | {"stream": True})
        wait_until(lambda: served.engine.running)
        connection.close()
        wait_until(nothing_runs(served.engine), 0.5)
        assert len(served.engine.aborted) == 1


def test_many_clients_vanish_and_others_are_served(slow):
    connections = [slow.open(COMPLETION, LONG | {"stream": True}) for _ in range(50)]
    wait_until(lambda: len(slow.engine.running) == 50)
    with slow.client() as client:
        stream = client.completions.create(model="fake", prompt="Once", max_tokens=30, stream=True, extra_body={"ignore_eos": True})
        next(stream)
        for connection in connections:
            connection.close()
        assert sum(1 for _ in stream) == 29
    wait_until(nothing_runs(slow.engine), 0.5)
    assert len(slow.engine.aborted) == 50


def test_leaving_the_openai_stream_early_aborts(slow):
    with slow.client() as client:
        with client.completions.create(model="fake", prompt="Once", max_tokens=200, stream=True) as stream:
            next(stream)
        wait_until(nothing_runs(slow.engine), 0.5)
    assert len(slow.engine.aborted) == 1


@pytest.mark.parametrize("prompt", ["Once", ["Once", "Twice"]])
def test_an_error_after_the_200_is_an_event_and_the_stream_ends(prompt):
    with serving(FakeEngine()) as served:
        served.engine.fail_at = 3
        *chunks, error, done = served.events(COMPLETION, LONG | {"prompt": prompt})
        assert chunks and done == "[DONE]" and not served.engine.running
        assert json.loads(error)["error"]["message"] == "The engine has stopped"
        with served.client() as client, pytest.raises(openai.APIError, match="The engine has stopped"):
            list(client.completions.create(model="fake", prompt="Once", stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_token_has_its_status(stream):
    with serving(FakeEngine()) as served:
        served.engine.fail_at = 0
        response = served.post(COMPLETION, LONG | {"stream": stream})
        assert response.status_code == 503 and response.json()["error"]["type"] == "ServiceUnavailableError"


class Broken(FakeEngine):
    async def generate(self, request):
        async for output in super().generate(request):
            if request.id != "first-request":
                raise ZeroDivisionError("secret detail")
            yield output


@pytest.mark.parametrize("stream", [True, False])
def test_a_mistake_of_ours_is_a_500_whose_body_says_nothing_of_it(caplog, stream):
    with serving(Broken()) as served:
        response = served.post(COMPLETION, LONG | {"stream": stream})
        assert response.status_code == 500 and response.json()["error"]["type"] == "InternalServerError"
        assert "secret" not in response.text and "Zero" not in response.text
        assert served.post(COMPLETION, {"prompt": []}).status_code == 400  # and it goes on
    assert "secret detail" in caplog.text


def test_without_a_tokenizer_token_ids_are_served():
    engine = FakeEngine()
    engine.tokenizer = None
    with serving(engine) as served:
        assert served.post(COMPLETION, {"prompt": [1, 2], "max_tokens": 3, "logprobs": 1}).json()["usage"]["completion_tokens"] == 3
        for path, body in (
            (COMPLETION, {"prompt": "Hi"}),
            (COMPLETION, {"prompt": [1], "echo": True}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ):
            response = served.post(path, body)
            assert response.status_code == 400 and "without a tokenizer" in response.json()["error"]["message"]


def test_health_is_503_when_the_engine_is_not_well():
    with serving(FakeEngine()) as served:
        assert [request.id for request in served.engine.served] == ["first-request"]
        assert served.http.get("/health").status_code == 200
        served.engine.healthy = False
        response = served.http.get("/health")
        assert response.status_code == 503 and response.json()["error"]["message"] == "The engine has stopped"


@pytest.fixture(scope="module")
def locked():
    with serving(FakeEngine(), ServerOptions(port=0, api_key=("the-key",))) as served:
        yield served


def test_the_key_opens(locked):
    with locked.client() as client:
        assert client.models.list().data


@pytest.mark.parametrize("sent", [None, "Bearer", "Bearer the-ke", "Bearer the-key2", "Basic the-key", "the-key", "Bearer \xff"])
@pytest.mark.parametrize("path", ["/v1/models", "/version", "/nowhere", "/docs"])
def test_nothing_else_opens(locked, sent, path):
    headers = {} if sent is None else {"authorization": sent.encode("latin-1")}
    response = locked.http.get(path, headers=headers)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key" and "the-key" not in response.text


def test_a_wrong_key_is_an_authentication_error(locked):
    with locked.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])


def test_health_needs_no_key(locked):
    assert locked.http.get("/health").status_code == 200


def test_requests_are_logged_when_asked(caplog):
    caplog.set_level(logging.INFO, "jaxllm.server")
    with serving(FakeEngine(step_s=0.01), ServerOptions(port=0, enable_log_requests=True)) as served:
        served.post(COMPLETION, {"prompt": "Hi", "max_tokens": 3})
        served.events(COMPLETION, {"prompt": "Hi", "max_tokens": 4})
        with contextlib.closing(served.open(COMPLETION, LONG | {"stream": True})) as connection:
            read_event(connection)
        wait_until(lambda: "client gone" in caplog.text)
    lines = [record.getMessage() for record in caplog.records if "prompt tokens" in record.getMessage()]
    assert len(lines) == 3
    assert "3 prompt tokens, 3 generated, length" in lines[0] and "3 prompt tokens, 4 generated, length" in lines[1]


def test_requests_are_not_logged_by_default(caplog):
    caplog.set_level(logging.INFO, "jaxllm.server")
    with serving(FakeEngine()) as served:
        served.post(COMPLETION, {"prompt": "Hi"})
    assert "prompt tokens" not in caplog.text
