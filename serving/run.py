"""Runs the application: binds the address, serves in this process or in several, says when it is ready.

Several API processes (`--api-server-count`) each listen on a socket of their own at the same port, and the kernel deals
the connections out. They share nothing but the engine process; the one that started them ends when any of them does.
"""

import asyncio
import logging
import math
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxllm.request import ConfigError, EngineDeadError
from serving.options import ServerOptions

if TYPE_CHECKING:
    from serving.protocol import EngineLike

log = logging.getLogger("jaxllm.server")

KEEP_ALIVE_S = 75  # above the 60 s after which common load balancers drop an idle connection, so that they do it and not we
WATCH_S = 0.2
TELL_S = 2  # for the last words to those whose time is over
DEATH_S = 1  # how long /health says 503 after the engine died, before nothing answers


def bind(options: ServerOptions) -> socket.socket:
    """A socket with the address taken, not listening yet. Raises ConfigError if the address cannot be had."""
    host, port = options.host, options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if options.api_server_count > 1:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host} port {port}: {error.strerror or error}; choose another --host or --port") from None
    return listener


def url(options: ServerOptions, listener: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(options.host, options.host)
    scheme = "https" if options.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def say_ready(engine: "EngineLike", options: ServerOptions, listener: socket.socket, start: float) -> None:
    address = url(options, listener)
    print(f"ready in {time.perf_counter() - start:.1f} s: {engine.model_name} at {address}/v1", flush=True)
    if not options.disable_page:
        log.info("chat page at %s", address)


def serve(engine: "EngineLike", options: ServerOptions, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until a signal or the engine's death; calls `ready` once it listens.

    Raises SystemExit, as uvicorn does, if the first request failed, EngineDeadError if the engine died.
    """
    import uvicorn

    from serving.app import build_app
    from serving.connection import Connection
    from serving.context import Context

    app = build_app(engine, options, getattr(engine, "memory", None))
    context: Context = app.state.context

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)  # runs the first request, then listens
            if self.started:
                ready()

        async def on_tick(self, counter: int) -> bool:
            if not engine.healthy:
                await asyncio.sleep(DEATH_S)
                return True
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(options.shutdown_timeout, context.deadline.set)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http=type("TimedConnection", (Connection,), {"receive_timeout": options.receive_timeout}),
        ws="none",
        access_log=False,
        log_config=None,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(options.shutdown_timeout + TELL_S),
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ssl-certfile and --ssl-keyfile cannot be used: {error}") from None
    Server(config).run([listener])
    if not engine.healthy:
        raise EngineDeadError("the engine has died")


def serve_in_processes(engine: "EngineLike", options: ServerOptions, listener: socket.socket, start: float) -> None:
    """Serves from `api_server_count` processes until a signal. Raises SystemExit if one ended, EngineDeadError if the engine died."""
    from serving.api_process import Job
    from serving.remote_engine import RemoteEngine

    assert isinstance(engine, RemoteEngine)
    here = replace(options, port=listener.getsockname()[1])
    job = Job(engine.config, here, engine.process.address, engine.process.pid)
    workers = [job.start() for _ in range(options.api_server_count)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if not worker.stdout.readline():
                raise SystemExit(1)  # it has said why
        say_ready(engine, options, listener, start)
        while all(worker.poll() is None for worker in workers) and engine.healthy:
            time.sleep(WATCH_S)
        if engine.healthy:
            raise SystemExit(1)
        time.sleep(DEATH_S)
        raise EngineDeadError("the engine has died")
    finally:
        _end(workers, options.shutdown_timeout + TELL_S)


def _end(workers: list[subprocess.Popen], timeout: float) -> None:
    for worker in workers:
        if worker.poll() is None:
            os.kill(worker.pid, signal.SIGTERM)
    for worker in workers:
        try:
            worker.wait(timeout + 5)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
