"""What only the operator should reach (--enable-admin-routes): emptying the prefix cache, and JAX's profiler."""

from fastapi import FastAPI
from starlette.responses import Response

from serving import shapes
from serving.context import Context, settled
from serving.errors import ApiError, json_response
from serving.openapi import documented


def add(app: FastAPI, context: Context) -> None:
    engine = context.engine

    @app.post("/reset_prefix_cache", **documented(None, shapes.Nothing, 503))
    async def reset_prefix_cache() -> Response:
        await settled(engine.forget())
        return json_response({})

    @app.post("/start_profile", **documented(None, shapes.Nothing, 409, 503))
    async def start_profile() -> Response:
        return await _profile(context.options.profile_dir)

    @app.post("/stop_profile", **documented(None, shapes.Nothing, 409, 503))
    async def stop_profile() -> Response:
        return await _profile(None)

    async def _profile(folder: str | None) -> Response:
        try:
            await settled(engine.profile(folder))
        except RuntimeError as error:
            raise ApiError(409, f"The profiler refused: {error}") from None
        return json_response({})
