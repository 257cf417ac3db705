"""The options and output of ``luthier estimate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import (
    DataOption,
    FileArgument,
    JsonOption,
    ModelOption,
    RecipeOption,
    RenameOption,
    SetOption,
    config,
    importing,
)

_NO_ROWS = Path("rows.jsonl")  # a placeholder, never read


def run(
    file: FileArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    settings: SetOption = None,
    rename: RenameOption = None,
    recipe: RecipeOption = None,
    length: Annotated[
        int | None, typer.Option("--length", metavar="N", min=2, help="Tokens per row, if --data is not given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory and time of a run at every precision, before it starts. Reads no weights."""
    with_rows = bool(data or file)
    run_config = config(model, data if with_rows else [_NO_ROWS], None, settings, rename, file, recipe)
    with importing():
        from luthier.verbs.estimate import estimate

    result = estimate(run_config, with_rows=with_rows, length=length)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    from luthier.training.resources import table

    print(
        f"{result.parameters:,} parameters, {result.trainable:,} of them trainable; "
        f"{result.available / 1e9:.1f} GB of memory available"
    )
    for note in result.notes:
        print(f"note: {note}")
    print("\n".join(table(result.by_precision)))
    print(result.line())
    if not result.chosen.fits:
        print("this run does not fit, so luthier train refuses it without --force")
    for fix in result.fixes:
        print(f"to make it fit: {fix}")
