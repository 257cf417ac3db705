"""The verb ``serve``: models opened, engine proven and started, a socket bound, and the application run on it."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier.errors import ConfigError
from luthier.serving import app as http
from luthier.serving.engine import Engine, prove
from luthier.serving.models import open_models, places

Say = Callable[[str], None]


def serve(
    paths: Sequence[Path | str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    max_batch: int = 16,
    max_queue: int = 64,
    say: Say = lambda _: None,
) -> None:
    """The verb ``serve``: OpenAI's protocol over runs that share a base, until it is interrupted.

    paths:     runs, adapter directories, or a base or merged model; each is served under its directory's name.
    port:      0 takes a free one. api_key: None makes a random one and says it.
    max_batch: replies that are written together; max_queue: requests that may wait beyond those.
    """
    http.require()
    found = places(paths, model, adapter)
    with bound(host, port) as listener:
        opened, routes, models = open_models(found, dtype)
        engine = Engine(opened, routes, max_batch, max_queue)
        prove(engine, models[0].adapter)
        key = api_key or secrets.token_urlsafe(24)
        address, number = listener.getsockname()[:2]
        say(f"models: {', '.join(m.name for m in models)}")
        say(f"address: {address}:{number}, OpenAI's protocol under /v1")
        if api_key is None:
            say(f"API key: {key}")
        engine.start()
        try:
            run(http.create(models, engine, key), listener)
        except KeyboardInterrupt:
            say("stopped")
        finally:
            engine.close()


def run(app: Any, listener: socket.socket) -> None:
    """Until interrupted; replies in progress get five seconds to end."""
    import uvicorn  # of the extra

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        raise ConfigError(
            f"{host}:{port}: cannot be listened on ({e.strerror or e})", "choose another --port, or another --host"
        ) from None
