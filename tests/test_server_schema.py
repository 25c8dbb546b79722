"""Generated requests against our own /openapi.json: no 5xx, no status or answer that it does not tell of, one shape of every error.

`make fuzz` asks for 5,000; the suite for 200.
"""

import os
from collections import Counter

import openai.types as types
import openai.types.chat as chat_types
import openai.types.responses as response_types
import pytest
import schemathesis
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks as standard
from schemathesis.core.result import Ok
from server_fixtures import serving

from serving.openapi import Error
from serving.options import ServerOptions

REQUESTS = int(os.environ.get("JAXLLM_FUZZ", "200"))
CHECKS = [
    standard.not_a_server_error,
    standard.status_code_conformance,
    standard.content_type_conformance,
    standard.response_schema_conformance,
]
OPENAIS = {
    "/v1/completions": types.Completion,
    "/v1/chat/completions": chat_types.ChatCompletion,
    "/v1/responses": response_types.Response,
    "/v1/embeddings": types.CreateEmbeddingResponse,
    "/v1/models": types.Model,
}
seen: Counter[int] = Counter()


@pytest.fixture(scope="module")
def served():
    with serving(FakeEngine(), ServerOptions(enable_admin_routes=True)) as served:
        yield served
    assert not served.engine.running


@pytest.fixture(scope="module")
def operations(served):
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    found = [operation.ok() for operation in schema.get_all_operations() if isinstance(operation, Ok)]
    assert len(found) == sum(1 for _ in schema.get_all_operations()), "an operation that cannot be read"
    return found


def test_generated_requests(served, operations, caplog):
    """As many of every operation that has a body; fewer of those that have none."""
    bodies = [operation for operation in operations if operation.body]
    for operation in operations:
        ask(operation, max(REQUESTS // len(bodies), 2) if operation.body else 2)
    assert seen.total() >= REQUESTS and set(seen) >= {200, 400}, seen
    assert "Traceback" not in caplog.text and "failed to answer" not in caplog.text


def ask(operation, count: int) -> None:
    # Half of what is made is valid by the schema, half is not.
    strategy = operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=REQUESTS == 200,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(case=strategy)
    def run(case):
        response = case.call(timeout=30)
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            Error.model_validate_json(response.content, strict=True)
            assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message", "type", "param", "code"}
        elif (kind := OPENAIS.get(operation.path)) and response.headers["content-type"] == "application/json":
            kind.model_validate(response.json())

    run()
