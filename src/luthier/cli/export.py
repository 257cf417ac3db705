"""``luthier export``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import Adapter, Json, Model, say


def run(
    output_dir: Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Where it goes.")],
    path: Annotated[Path | None, typer.Argument(metavar="RUN|DIR", help="A run or an adapter directory.")] = None,
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", help="peft, hf, gguf, gguf-lora (the adapter alone) or ollama."),
    ] = "peft",
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", metavar="TYPE", help="Of gguf and ollama: f16 (as if left out), q8_0 or q4_0."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="LAYOUT", help="Of peft and hf: native names, or original (the base's own)."),
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Write the tuned model in another tool's format, proven before it is called done."""
    from luthier.verbs.export import export

    done = export(path, to, output_dir, layout, model, adapter, quantization, say)
    if as_json:
        print(json.dumps(done.as_dict(), ensure_ascii=False))
        return
    print(f"{done.path}: {', '.join(done.files)}")
    for line in done.proof:
        print(f"proof: {line}")
    for note in done.notes:
        print(f"note: {note}")
    if done.unproven:
        print(done.unproven)
    if to == "ollama":
        name = next(f for f in done.files if f.endswith(".gguf")).rpartition("-")[0]
        print(f"run it: ollama create {name} -f {done.path / 'Modelfile'}")
