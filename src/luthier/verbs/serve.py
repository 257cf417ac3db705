"""``luthier serve``: open the models, verify and start the engine, and run the HTTP application."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.serving import app as http
from luthier.serving.engine import Engine
from luthier.serving.general import verify_batching
from luthier.serving.models import Served, open_models, resolve_models
from luthier.serving.requests import ReplyEngine
from luthier.serving.server import listen, run
from luthier.types import Log


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. port: 0 chooses a free one. api_key: None creates a random one and logs it."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None


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
    memory: int | None = None,
    fused: bool = True,
    log: Log = lambda _: None,
) -> None:
    """Serve runs that share a base model over OpenAI's API, until interrupted. Raises UserError.

    paths:     runs, adapter directories, or a base or merged model; each is served under its directory's name.
    port:      0 chooses a free one. api_key: None creates a random one and passes it to ``log``.
    max_batch: maximum number of replies per batch. max_queue: maximum number of waiting requests.
    memory:    limit in bytes for the keys and values of all requests; None: ``inference.decoding.default_memory``.
    fused:     decode with luthier's compiled layers if they support the model, which is faster.
    """
    http.require()
    named = resolve_models(paths, model, adapter)

    def start() -> tuple[ReplyEngine, list[Served]]:
        opened, routes, models = open_models(named, dtype, fused, log)
        engine = Engine(opened, routes, max_batch, max_queue, memory, compiled=fused, log=log)
        verify_batching(engine.decoding, models[0].adapter)
        return engine, models

    serve_engine(Address(host, port, api_key), start, log)


def serve_engine(address: Address, start: Callable[[], tuple[ReplyEngine, list[Served]]], log: Log) -> None:
    """Listen, create the engine and its models with ``start``, and serve until interrupted. Raises UserError."""
    http.require()
    with listen(address.host, address.port) as listener:
        engine, models = start()
        key = address.api_key or secrets.token_urlsafe(24)
        host, free_port = listener.getsockname()[:2]
        log(f"models: {', '.join(m.name for m in models)}")
        log(f"address: {host}:{free_port}, OpenAI's API under /v1")
        if address.api_key is None:
            log(f"API key: {key}")
        engine.start()
        try:
            run(http.create(models, engine, key), listener)
        except KeyboardInterrupt:
            log("stopped")
        finally:
            engine.close()
