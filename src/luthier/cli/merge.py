"""``luthier merge``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import Adapter, Model, say


def run(
    output_dir: Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Where the merged model goes.")],
    path: Annotated[Path | None, typer.Argument(metavar="RUN|DIR", help="A run or an adapter directory.")] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout", metavar="LAYOUT", help="Names and files: native, or original (as the base was published)."
        ),
    ] = "native",
    model: Model = None,
    adapter: Adapter = None,
) -> None:
    """Write base and adapter as one plain model, for stock transformers and other tools, and prove it by its logits."""
    from luthier.verbs.merge import merge

    done = merge(path, output_dir, model, adapter, say, layout)
    print(f"{done.path}: {done.tensors} tensors, {done.changed} of them changed by the adapter")
    print(f"proof: {done.proof.told()}")
    print(f"talk to it: luthier chat {done.path}")
