"""What the clients' programs share: the questions, and a frame that runs their checks one by one and watches what they connect to.

argv: the server's URL, the model's name, then the checks to run. Each check prints a line of JSON.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

URL, MODEL = sys.argv[1:3]
KEY = "any"
QUESTION = "Tell me a story about a dog."
TOOL_QUESTION = "What is the weather in Paris?"
PET_QUESTION = "Describe a brown dog named Max as JSON with name, kind and good."
ENOUGH = 80  # tokens
PET = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kind": {"type": "string", "enum": ["dog", "cat"]}, "good": {"type": "boolean"}},
    "required": ["name", "kind", "good"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    },
}
strangers: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    """Lets nothing connect but to this machine."""
    if event == "socket.connect" and isinstance(arguments[1], tuple) and not str(arguments[1][0]).startswith(("127.", "::1")):
        strangers.append(str(arguments[1]))
        raise PermissionError(f"a connection to {arguments[1]}")
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", b"127.0.0.1", "127.0.0.1", "::1"):
        strangers.append(str(arguments[0]))
        raise PermissionError(f"a look-up of {arguments[0]}")


sys.addaudithook(_watch)


def is_text(value: Any) -> str:
    """The value, which must be a text that says something."""
    assert isinstance(value, str) and value.strip(), repr(value)
    return value


def is_pet(value: Any) -> str:
    """A pet's name, of an object or of its JSON."""
    found = json.loads(value) if isinstance(value, str) else value if isinstance(value, dict) else value.model_dump()
    assert set(found) == {"name", "kind", "good"} and isinstance(found["name"], str), found
    assert found["kind"] in ("dog", "cat") and isinstance(found["good"], bool), found
    return repr(found)


def is_weather(name: Any, arguments: Any) -> str:
    """The call's arguments, as a dict or as JSON."""
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "get_weather" and set(found) == {"city"} and isinstance(found["city"], str), (name, arguments)
    return repr(found)


def run(**checks: Callable[[], str]) -> None:
    """Runs those checks that argv names, and says what became of each."""
    failed = False
    for name in sys.argv[3:]:
        try:
            said = f"ok {checks[name]()}"
        except Exception as error:
            said, failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", True
        print(json.dumps({"check": name, "said": said}), flush=True)
    print(json.dumps({"check": "network", "said": f"tried to reach {', '.join(strangers)}" if strangers else "ok"}), flush=True)
    sys.exit(failed or bool(strangers))
