"""GET /: the chat page, whose files lie in serving/page, and what it must know of the server that no API route says.

The files hold nothing secret and need no key. Everything the page then asks for does, as from any client.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxllm.request import RequestError, SamplingParams
from serving.context import Context
from serving.errors import ApiError, json_response
from serving.protocol import EngineLike, tokenizer_of

FOLDER = Path(__file__).parent.parent / "page"
# Written here because mimetypes asks the machine, and a machine may say that JavaScript is text/plain.
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.suffix in TYPES))
OPEN = frozenset({"/", *(f"/page/{name}" for name in NAMES)})  # what needs no key
HEADERS = {
    # Nothing from elsewhere, nothing inline, no text of a model made into markup, and no other site around it.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cache-control": "no-cache",  # kept, and asked about each time, so that a new version is seen at once
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
SHOWN = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty")


def add(app: FastAPI, context: Context) -> None:
    files = {name: _File(FOLDER / name) for name in NAMES}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(http: HttpRequest) -> Response:
        return files["index.html"].answer(http)

    @app.get("/page/facts", include_in_schema=False)
    async def facts() -> Response:
        engine = context.engine
        return json_response(
            {
                "model": engine.model_name,
                "max_model_len": engine.max_model_len,
                "chat_refused": _chat_refused(engine),
                "defaults": {name: value for name, value in _defaults(engine).items() if name in SHOWN},
            }
        )

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(http: HttpRequest, name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"There is no route {http.method} {http.url.path}")
        return files[name].answer(http)


def _chat_refused(engine: EngineLike) -> str | None:
    """Why the model cannot chat, in the words with which a chat would be refused; None if it can."""
    try:
        tokenizer_of(engine).chat([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except RequestError as error:
        return str(error)
    return None


def _defaults(engine: EngineLike) -> dict:
    """What a chat that says nothing is sampled with; max_tokens is None where as many as fit."""
    return asdict(SamplingParams(**{"max_tokens": None, **engine.default_params}))


class _File:
    """One file of the page, read once."""

    def __init__(self, path: Path):
        self._data = path.read_bytes()
        self._headers = {**HEADERS, "etag": f'"{hashlib.sha256(self._data).hexdigest()[:32]}"'}
        self._type = TYPES[path.suffix]

    def answer(self, http: HttpRequest) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in http.headers.get("if-none-match", "").split(",")]
        if self._headers["etag"] in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._data, headers=self._headers, media_type=self._type)
