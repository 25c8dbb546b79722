"""What the server says of itself: models, health, version, load, metrics."""

import hashlib
import time

from fastapi import FastAPI
from starlette.responses import Response

from jaxllm import __version__
from serving import exposition, shapes
from serving.context import Context, settled
from serving.errors import ApiError, json_response
from serving.openapi import documented
from serving.protocol import check_model


def add(app: FastAPI, context: Context) -> None:
    engine, created = context.engine, int(time.time())

    def model_card() -> dict:
        return {
            "id": engine.model_name,
            "object": "model",
            "created": created,
            "owned_by": "jaxllm",
            "root": str(engine.model_path),
            "parent": None,
            "max_model_len": engine.max_model_len,
            "permission": [_permission(engine.model_name, created)],
        }

    @app.get("/v1/models", **documented(None, shapes.Models))
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card()]})

    @app.get("/v1/models/{name:path}", **documented(None, shapes.Model, 404))  # path: a Hub id has a slash
    async def model(name: str) -> Response:
        check_model(engine, name)
        return json_response(model_card())

    @app.get("/health", **documented(None, None, 503))
    @app.get("/ping", **documented(None, None, 503))
    @app.post("/ping", **documented(None, None, 503))
    async def health() -> Response:
        if not engine.healthy:
            raise ApiError(503, "The engine has stopped")
        return Response()

    @app.get("/version", **documented(None, shapes.VersionAnswer))
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/load", **documented(None, shapes.LoadAnswer, 503))
    async def load() -> Response:
        stats = await settled(engine.stats())
        return json_response({"server_load": stats.running + stats.waiting})

    @app.get("/metrics", **documented(None, None, 503, text="text/plain"))
    async def metrics() -> Response:
        stats = await settled(engine.stats())
        return Response(exposition.text(stats, engine.model_name), headers={"content-type": exposition.CONTENT_TYPE})


def _permission(model: str, created: int) -> dict:
    return {
        "id": f"modelperm-{hashlib.sha256(model.encode()).hexdigest()[:32]}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
