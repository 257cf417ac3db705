"""``luthier estimate``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import Data, File, Json, Model, Recipe, Rename, Set, config, importing

_NO_ROWS = Path("rows.jsonl")  # stands for a file that is not read


def run(
    file: File = None,
    model: Model = None,
    data: Data = None,
    settings: Set = None,
    rename: Rename = None,
    recipe: Recipe = None,
    length: Annotated[
        int | None, typer.Option("--length", metavar="N", min=2, help="Tokens of a row, where there is no --data.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Memory and time of a run before it starts, at every precision; reads no weights."""
    with_rows = bool(data or file)
    wanted = config(model, data if with_rows else [_NO_ROWS], None, settings, rename, file, recipe)
    with importing():
        from luthier.verbs.estimate import estimate

    found = estimate(wanted, with_rows=with_rows, length=length)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    from luthier.training.resources import table

    print(
        f"{found.parameters:,} parameters, {found.trainable:,} of them train; {found.available / 1e9:.1f} GB are free"
    )
    print("\n".join(table(found.rows)))
    print(found.line())
    for fix in found.fixes:
        print(f"to make it fit: {fix}")
