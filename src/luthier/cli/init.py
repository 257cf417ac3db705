"""The options and output of ``luthier init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import DataOption, ModelOption, OutputDirOption, RecipeOption, importing


def run(
    model: ModelOption = None,
    data: DataOption = None,
    output_dir: OutputDirOption = None,
    recipe: RecipeOption = None,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The file to write.")] = Path("run.yaml"),
) -> None:
    """Write a run.yaml with every setting explained, for luthier train FILE."""
    with importing():
        from luthier.verbs.init import init

    file = init(to, model, data or (), output_dir, recipe)
    print(f"wrote {file}; review it, then run: luthier train {file}")
