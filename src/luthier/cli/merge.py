"""The options and output of ``luthier merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import AdapterOption, ModelOption, print_stderr


def run(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", metavar="DIR", help="Directory to write the merged model to.")
    ],
    path: Annotated[Path | None, typer.Argument(metavar="RUN|DIR", help="A run or an adapter directory.")] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="LAYOUT",
            help="Tensor names and files: native, or original (as the base model was published).",
        ),
    ] = "native",
    model: ModelOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Merge the adapter into the base model, for stock transformers and other tools, and verify the logits."""
    from luthier.verbs.merge import merge

    merged = merge(path, output_dir, model, adapter, print_stderr, layout)
    print(f"{merged.path}: {merged.tensors} tensors, {merged.changed} of them changed by the adapter")
    print(f"verified: {merged.closeness.summary()}")
    print(f"chat with it: luthier chat {merged.path}")
