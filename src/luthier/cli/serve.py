"""The options and output of ``luthier serve``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import (
    AdapterOption,
    DtypeOption,
    FusedOption,
    ModelOption,
    QuantizationOption,
    importing,
    print_stderr,
    size_in_bytes,
)
from luthier.errors import ConfigError


def run(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN|DIR...", help="Runs or adapters that share one base model; or a base or merged model."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Address to listen on; 0.0.0.0: all interfaces.")
    ] = ("127.0.0.1"),
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen on; 0: any free port.")
    ] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="Key that clients must send; default: a random one.")
    ] = None,
    dtype: DtypeOption = "auto",
    max_batch: Annotated[
        int, typer.Option("--max-batch", metavar="N", min=1, help="Maximum number of replies per batch.")
    ] = 16,
    max_queue: Annotated[
        int, typer.Option("--max-queue", metavar="N", min=1, help="Maximum number of waiting requests; more get a 429.")
    ] = 64,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="Memory for keys and values of all requests, such as 2GB or 500MB."
        ),
    ] = None,
    fused: FusedOption = True,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="luthier, llama.cpp (its file is written on first use), or vllm.",
        ),
    ] = "luthier",
    quantization: QuantizationOption = None,
    only_print: Annotated[bool, typer.Option("--print", help="Print the vLLM command and exit.")] = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Serve runs and the base model that they share to clients of OpenAI's API.

    A request selects a model by name: the directory name of a run or of the base model. Prompts have the format of
    the training. Concurrent requests are decoded in one batch.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: is not a dtype", "use auto, float32, bfloat16 or float16")
    if engine not in ("luthier", "llama.cpp", "vllm"):
        raise ConfigError(f"--engine {engine}: is not an engine", "use luthier, llama.cpp or vllm")
    if only_print and engine != "vllm":
        raise ConfigError("--print would be ignored: only vLLM is started with a command", "add --engine vllm")
    limit = None if memory is None else size_in_bytes("--memory", memory)
    if engine == "vllm":
        _refuse_for_vllm(
            {"--memory": memory is not None, "--no-fused": not fused, "--quantization": bool(quantization)}
        )
        from luthier.serving.vllm import hand_over

        hand_over(paths or [], host, port, api_key, dtype, model, adapter, only_print, print_stderr)
        return
    with importing():
        from luthier.verbs.serve import serve

    listen_at, batch = (host, port, api_key), (max_batch, max_queue, limit)
    serve(paths or [], *listen_at, dtype, model, adapter, *batch, fused, print_stderr, engine, quantization)


def _refuse_for_vllm(used: Mapping[str, bool]) -> None:
    """Raise ConfigError for options that vLLM would not get. used: whether each one was given."""
    for option in (name for name, was_given in used.items() if was_given):
        raise ConfigError(f"{option} would be ignored: it is a setting of other engines", f"leave {option} out")
