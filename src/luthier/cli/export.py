"""``luthier export``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Adapter, Json, Model


def run(
    output_dir: Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Where it goes.")],
    path: Annotated[Path | None, typer.Argument(metavar="RUN|DIR", help="A run or an adapter directory.")] = None,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="peft.")] = "peft",
    layout: Annotated[
        str,
        typer.Option("--layout", metavar="LAYOUT", help="Module names: native, or original (the checkpoint's own)."),
    ] = "native",
    model: Model = None,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Write the adapter in another tool's format, read back and compared before it is called done."""
    from luthier.api import export

    done = export(path, to, output_dir, layout, model, adapter)
    print(
        json.dumps({"path": str(done), "format": to, "layout": layout})
        if as_json
        else f"{done}: written, and read back equal"
    )
