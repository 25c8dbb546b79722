"""/openapi.json and /docs: every route with the schema of its body, of its answers and of its errors.

Routes read their bodies themselves, so FastAPI learns here what they take. What is said of answers is checked by tests, not at run time.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse, Response

from serving.errors import TYPES
from serving.protocol import Body

_MODELS: set[type[Body]] = set()
_REFERENCE = "#/components/schemas/{model}"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


def documented(
    body: type[Body] | None = None, answer: type[BaseModel] | None = None, *statuses: int, events: bool = False, text: str | None = None
) -> dict:
    """Keywords of a route's decorator. statuses: what it may answer beside 200 and the errors that any route may give. events: it may
    also stream. text: the type of an answer that is no JSON; without `answer` and `text` it is empty."""
    extra: dict[str, Any] = {}
    if body is not None:
        _MODELS.add(body)
        schema = {"$ref": _REFERENCE.format(model=body.__name__)}
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        statuses = (400, 404, 408, 413, 429, 500, 503, *statuses)
    errors = {status: {"model": Error, "description": TYPES[status]} for status in sorted({401, 431, *statuses})}
    success: dict[str, Any] = {"description": "Success"}
    if answer is not None:
        success["model"] = answer
    if other := "text/event-stream" if events else text:
        success["content"] = {other: {"schema": {"type": "string"}}}
    kind = Response if answer is None else JSONResponse
    return {"openapi_extra": extra, "responses": {200: success, **errors}, "response_model": None, "response_class": kind}


def install(app: FastAPI) -> None:
    """Adds the bodies' schemas to what FastAPI makes by itself."""
    make = app.openapi

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = make()
            _, bodies = models_json_schema([(model, "validation") for model in sorted(_MODELS, key=str)], ref_template=_REFERENCE)
            made["components"]["schemas"] |= bodies["$defs"]
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"key": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = schema  # pyright: ignore[reportAttributeAccessIssue]
