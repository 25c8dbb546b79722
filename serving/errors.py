"""How anything that goes wrong is said: one body, in OpenAI's shape, whatever the route and whatever the fault."""

import json
import logging

from starlette.responses import Response

from jaxllm.request import EngineDeadError, OverloadedError, RequestError

log = logging.getLogger("jaxllm.server")

# Compact, and text as UTF-8 rather than \u escapes. allow_nan=False: NaN is not JSON, and no client could read it.
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

UNFORESEEN = "The server failed to answer this request; its log says why"
RETRY_S = 1  # when to try again after a full queue: a place in it is free as soon as any request ends
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    431: "HeadersTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape. `code` is a word that clients match on; most errors have none."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def body(self) -> dict:
        kind = TYPES.get(self.status, "APIError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_of(error: Exception) -> ApiError:
    """What the client is told about `error`. What we did not foresee is logged here, and its text stays inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(RETRY_S)})
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error) or "The engine has stopped")
    log.error("request failed", exc_info=error)
    return ApiError(500, UNFORESEEN)


def told(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)


def json_response(body: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, media_type="application/json")
