"""``luthier pull``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.console import say


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m, the embedded default.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Directory to put it in; default: the user's cache.")
    ] = None,
) -> None:
    """Download a model, check it, and print its directory."""
    from luthier.hub import pull  # not through api: this verb often needs no torch

    print(pull(model, to, say=say))
