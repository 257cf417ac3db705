"""``luthier eval``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.options import Adapter, Checkpoint, Data, Json, Model

if TYPE_CHECKING:
    from luthier.evaluation import Comparison


def run(
    path: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run or adapter directory.")] = None,
    data: Data = None,
    model: Model = None,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="TYPE", help="auto is fp32 on the CPU.")] = "auto",
    as_json: Json = False,
) -> None:
    """Compare base and tuned model on held-out rows: the run's own, or those of --data."""
    from luthier.api import eval as evaluate

    result = evaluate(path, data or (), dtype, model, adapter, checkpoint)
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        _print(result)


def _print(result: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.tuned.held_out.rows} held-out rows, {result.dtype}")
    for name in ("", "base", "tuned"):
        table.add_column(name, justify="left" if not name else "right")
    both = (result.base, result.tuned)
    table.add_row("loss (nats a token)", *(f"{s.held_out.loss:.4f}" for s in both))
    table.add_row("perplexity", *(f"{s.held_out.perplexity:.2f}" for s in both))
    table.add_row("replies that end by themselves", *(f"{s.stop_rate or 0:.0%}" for s in both))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"rows: {result.data}", markup=False)
