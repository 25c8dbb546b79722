"""A client of any OpenAI server, for the terminal: its first model, and an answer as a stream of pieces. From the standard library alone,
because it must be there within the blink in which `jaxllm chat` starts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

CONNECT_S = 10  # to be connected; how long an answer takes is for whoever waits to decide


class ServerError(Exception):
    """What went wrong, as a sentence for whoever sits at the terminal."""


@dataclass(frozen=True)
class Piece:
    """What one event brought. tokens: of the whole answer, where the server said so."""

    text: str = ""
    reasoning: str = ""
    tokens: int | None = None


class Client:
    """`url` ends where the routes begin, usually in /v1. Each call is a connection of its own. Raises ServerError for all that fails."""

    def __init__(self, url: str, key: str | None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"--url must look like http://127.0.0.1:8000/v1, but it is {url!r}")
        self._url, self._host, self._path = url, parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def model(self) -> str:
        """The first model that the server offers."""
        connection = self._connect()
        try:
            answer = json.loads(self._ask(connection, "GET", "/models").read())
            return answer["data"][0]["id"]
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise ServerError(f"{self._url}/models does not list a model ({error!r}): name one with --model-name") from None
        finally:
            connection.close()

    def stream(self, route: str, body: dict[str, Any]) -> Iterator[Piece]:
        """The answer as it comes. Closing this early closes the connection, at which the server ends the request."""
        connection = self._connect()
        try:
            response = self._ask(connection, "POST", route, json.dumps(body | {"stream": True}).encode())
            for line in response:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data == b"[DONE]":
                    return
                if data:
                    yield _piece(data)
        except (OSError, HTTPException) as error:
            raise ServerError(f"The connection to {self._url} broke off: {error!r}") from None
        finally:
            connection.close()

    def _connect(self) -> HTTPConnection:
        try:
            connection = self._kind(self._host, timeout=CONNECT_S)
            connection.connect()
        except (OSError, HTTPException) as error:
            why = getattr(error, "strerror", None) or error
            raise ServerError(
                f"No server answers at {self._url} ({why}): start one with jaxllm serve, or name another with --url"
            ) from None
        connection.sock.settimeout(None)
        return connection

    def _ask(self, connection: HTTPConnection, method: str, route: str, body: bytes | None = None) -> HTTPResponse:
        connection.request(method, self._path + route, body, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(f"{self._url}{route} answered {response.status}: {_told(response.read(65536))}")
        return response


def _told(raw: bytes) -> str:
    """What an error's body says: OpenAI's shape where it has it, or its beginning."""
    try:
        found = json.loads(raw)
        found = found.get("error") or found.get("detail") or found
        return str(found["message"] if isinstance(found, dict) and "message" in found else found)
    except (ValueError, AttributeError):
        return raw[:200].decode(errors="replace") or "nothing"


def _piece(data: bytes) -> Piece:
    try:
        event = json.loads(data)
        if "error" in event:
            raise ServerError(_told(data))
        usage = event.get("usage") or {}
        choice = (event.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        return Piece(choice.get("text") or delta.get("content") or "", reasoning, usage.get("completion_tokens"))
    except (ValueError, AttributeError, LookupError, TypeError):
        raise ServerError(f"The server sent an event that is none of OpenAI's: {data[:200]!r}") from None
