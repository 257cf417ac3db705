"""``luthier serve``: open the models, verify and start the engine, and run the HTTP application."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from luthier.serving import app as http
from luthier.serving import llamacpp
from luthier.serving.engine import Engine
from luthier.serving.general import verify_batching
from luthier.serving.models import open_models, resolve_models
from luthier.serving.requests import ReplyEngine
from luthier.serving.server import listen, run
from luthier.types import Log


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
    engine: str = "luthier",
    quantization: str | None = None,
) -> None:
    """Serve runs that share a base model over OpenAI's API, until interrupted. Raises UserError.

    paths:     runs, adapter directories, or a base or merged model; each is served under its directory's name.
    port:      0 chooses a free one. api_key: None creates a random one and passes it to ``log``.
    max_batch: maximum number of replies per batch. max_queue: maximum number of waiting requests.
    memory:    limit in bytes for the keys and values of all requests; None: ``inference.decoding.default_memory``.
    fused:     decode with luthier's compiled layers if they support the model, which is faster.
    engine, quantization: as for ``luthier.chat``.
    """
    llamacpp.check_options(engine, dtype, fused, quantization)
    http.require()
    named = resolve_models(paths, model, adapter)
    with listen(host, port) as listener:
        running: ReplyEngine
        if engine == "llama.cpp":
            loaded, models = llamacpp.open_models(named, quantization, memory, max_batch, log)
            running = llamacpp.LlamaEngine(loaded, max_batch, max_queue)
        else:
            opened, routes, models = open_models(named, dtype, fused, log)
            running = own = Engine(opened, routes, max_batch, max_queue, memory, compiled=fused, log=log)
            verify_batching(own.decoding, models[0].adapter)
        key = api_key or secrets.token_urlsafe(24)
        address, free_port = listener.getsockname()[:2]
        log(f"models: {', '.join(m.name for m in models)}")
        log(f"address: {address}:{free_port}, OpenAI's API under /v1")
        if api_key is None:
            log(f"API key: {key}")
        running.start()
        try:
            run(http.create(models, running, key), listener)
        except KeyboardInterrupt:
            log("stopped")
        finally:
            running.close()
