"""``luthier serve``: models opened, engine verified and started, the application run on a socket."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from luthier.serving import app as http
from luthier.serving.engine import Engine, prove
from luthier.serving.models import open_models, places
from luthier.serving.server import bound, run
from luthier.types import Say


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
    """Speak OpenAI's protocol over runs that share a base, until it is interrupted.

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
