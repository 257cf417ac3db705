"""``luthier check``"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import fail, importing
from luthier.cli.options import Data, File, Json, Model, Recipe, Rename, Set, config
from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.preflight import Inspection


def run(
    file: File = None,
    model: Model = None,
    data: Data = None,
    settings: Set = None,
    rename: Rename = None,
    recipe: Recipe = None,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Print so many rows token by token.")] = 0,
    as_json: Json = False,
) -> None:
    """Prove data, template, stop tokens and target modules before anything is trained. Reads no weights."""
    try:
        wanted = config(model, data, None, settings, rename, file, recipe)
    except UserError as e:
        if as_json:
            print(json.dumps(_nothing(e)))
        raise
    with importing():
        from luthier.api import check

    found = check(wanted, show)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _print(found, show)
    if found.error:
        fail(found.error)
        raise typer.Exit(2)


def _nothing(error: UserError) -> dict[str, Any]:
    """The report when not even a row could be read."""
    return {
        "ok": False,
        "rows": {"read": 0, "kept": 0, "dropped": 0, "changed": 0},
        "problems": [],
        "tokens": {"total": 0, "supervised": 0},
        "error": {"message": error.message, "fix": error.fix},
    }


def _print(found: Inspection, show: int) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    report, rows, tokens = found.report, found.report.rows(), found.train.stats()
    for file, fmt in report.formats.items():
        console.print(f"{file}: {fmt} rows", markup=False)
    console.print(
        f"rows     {rows['read']} read, {rows['kept']} kept, {rows['dropped']} dropped, {rows['changed']} changed"
    )
    if tokens["total"]:
        console.print(
            f"tokens   {tokens['total']:,} in all, {tokens['supervised']:,} trained "
            f"({tokens['supervised_share']:.0%}); a row has {tokens['shortest']} to {tokens['longest']}, "
            f"half at most {tokens['median']}"
        )
    if found.voice:
        ends = " ".join(found.voice.template.stop)
        console.print(f"template {found.voice.template.name}; replies end by {ends}", markup=False)
    if found.targets:
        console.print(f"LoRA on  {', '.join(found.targets.leaves)}", markup=False)
    for note in found.model_notes():
        console.print(f"  note: {note}", markup=False)
    for problem in report.problems[:20]:
        console.print(f"  {problem.source}: {problem.outcome}: {problem.reason}", markup=False)
    if len(report.problems) > 20:
        console.print(f"  ... and {len(report.problems) - 20} more (--json lists them all)")
    for note, count in report.notes.items():
        console.print(f"  note: {note} ({count} rows)", markup=False)
    if found.voice and show:
        _show(found, console)
    if not found.error:
        console.print(
            f"ready    every prompt is a prefix of its row, every reply ends by a stop token ({found.seconds:.1f} s)"
        )


def _show(found: Inspection, console: Any) -> None:
    from rich.text import Text

    assert found.voice
    console.print("\ntrained tokens are green, what the model only sees is grey; | parts tokens")
    for example in found.first:
        console.print(f"\n{example.source}  ({len(example)} tokens, {example.supervised} trained)", markup=False)
        line = Text()
        pieces = found.voice.tokenizer.pieces(example.ids.tolist())
        for piece, trained in zip(pieces, example.trained.tolist(), strict=True):
            line.append(piece.replace("\n", "\\n"), style="bold green" if trained else "bright_black")
            line.append("|", style="dim")
        console.print(line)
