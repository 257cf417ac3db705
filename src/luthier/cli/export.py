"""The options and output of ``luthier export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import AdapterOption, JsonOption, ModelOption, print_stderr


def run(
    output_dir: Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Directory to write.")],
    path: Annotated[Path | None, typer.Argument(metavar="RUN|DIR", help="A run or an adapter directory.")] = None,
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", help="peft, hf, gguf, gguf-lora (adapter only) or ollama."),
    ] = "peft",
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", metavar="TYPE", help="For gguf and ollama: f16 (the default), q8_0 or q4_0."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            metavar="LAYOUT",
            help="For peft and hf: native, or original (the names of the base model's checkpoint).",
        ),
    ] = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the tuned model in another tool's format and verify the result before reporting success."""
    from luthier.verbs.export import export

    exported = export(path, to, output_dir, layout, model, adapter, quantization, print_stderr)
    if as_json:
        print(json.dumps(exported.as_dict(), ensure_ascii=False))
        return
    print(f"{exported.path}: {', '.join(exported.files)}")
    for line in exported.verification:
        print(f"verified: {line}")
    for note in exported.notes:
        print(f"note: {note}")
    if exported.not_verified:
        print(exported.not_verified)
    if to == "ollama":
        name = next(f for f in exported.files if f.endswith(".gguf")).rpartition("-")[0]
        print(f"run it: ollama create {name} -f {exported.path / 'Modelfile'}")
