"""``--engine llama.cpp`` of ``luthier chat`` and ``luthier serve``. Needs the extra ``export``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.errors import ConfigError
from luthier.inference.chat import Chat, check_system
from luthier.serving.llamacpp import LlamaEngine, LlamaGenerator, open_models
from luthier.serving.models import Served, resolve_models
from luthier.serving.requests import ReplyEngine
from luthier.types import Log
from luthier.verbs.chat import no_adapter, run_sampling
from luthier.verbs.serve import Address, serve_engine


def chat(
    path: Path | str | None = None,
    system: str | None = None,
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    sampling: Mapping[str, float | None] | None = None,
    with_adapter: bool = False,
    quantization: str | None = None,
    log: Log = lambda _: None,
) -> Chat:
    """Open a run, an adapter or a base model with llama.cpp. Its files are written and verified on first use.

    quantization: of the base model's weights: f16, q8_0 or q4_0; None: as in training. The other parameters are those
    of ``verbs.chat.chat``. Raises UserError.
    """
    changes = sampling or {}
    if changes.get("no_repeat_ngram_size"):
        raise ConfigError("--no-repeat-ngram-size: llama.cpp has no such setting", "leave --engine llama.cpp out")
    named = resolve_models([] if path is None else [path], model, adapter)
    tuned = named[0].tuned
    if with_adapter and not tuned:
        raise no_adapter(named[0].base)
    config = tuned.config if tuned else None
    settings = run_sampling(config, changes)
    opened, served = open_models(named, quantization, log=log)
    system = served[0].system if system is None else system
    check_system(served[0].chat_format, system)
    generator = LlamaGenerator(opened, served[0].chat_format, served[0].adapter)
    return Chat(generator, system, tuned is not None, config, sampling=settings)


def serve(
    paths: Sequence[Path | str],
    address: Address,
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    max_batch: int = 16,
    max_queue: int = 64,
    memory: int | None = None,
    quantization: str | None = None,
    log: Log = lambda _: None,
) -> None:
    """Serve runs that share a base model with llama.cpp, until interrupted. Raises UserError.

    quantization: as for ``chat``. The other parameters are those of ``verbs.serve.serve``.
    """
    named = resolve_models(paths, model, adapter)

    def start() -> tuple[ReplyEngine, list[Served]]:
        opened, served = open_models(named, quantization, memory, max_batch, log)
        return LlamaEngine(opened, max_batch, max_queue), served

    serve_engine(address, start, log)
