"""The options and output of ``luthier check``."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Annotated

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
    fail,
    importing,
)
from luthier.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from luthier.data.loader import DataReport
    from luthier.models.chat_format import ChatFormat
    from luthier.types import Example
    from luthier.verbs.check import Inspection


def run(
    file: FileArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    settings: SetOption = None,
    rename: RenameOption = None,
    recipe: RecipeOption = None,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Print N rows token by token.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check rows, settings, model files and memory, as luthier train does before it loads weights."""
    try:
        run_config = config(model, data, None, settings, rename, file, recipe)
    except UserError as e:
        if as_json:
            print(json.dumps(_without_rows(e)))
        raise
    with importing():
        from luthier.verbs.check import check

    inspection = check(run_config, show)
    if as_json:
        print(json.dumps(inspection.as_dict()))
    else:
        _print(inspection, show)
    if inspection.error:
        fail(inspection.error)
        raise typer.Exit(2)


def _without_rows(error: UserError) -> dict[str, object]:
    """The report if no row could be read."""
    return {
        "ok": False,
        "rows": {"read": 0, "kept": 0, "dropped": 0, "changed": 0},
        "problems": [],
        "tokens": {"total": 0, "supervised": 0},
        "error": {"message": error.message, "fix": error.fix},
    }


def _print(inspection: Inspection, show: int) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    report, tokens = inspection.rows.report.data_report, inspection.rows.train.stats()
    rows, chat_format = report.rows(), inspection.chat_format
    for file, fmt in report.formats.items():
        console.print(f"{file}: {fmt} rows", markup=False)
    console.print(
        f"rows     {rows['read']} read, {rows['kept']} kept, {rows['dropped']} dropped, {rows['changed']} changed"
    )
    if tokens["total"]:
        console.print(
            f"tokens   {tokens['total']:,} in total, {tokens['supervised']:,} trained "
            f"({tokens['supervised_share']:.0%}); rows have {tokens['shortest']} to {tokens['longest']}, "
            f"median {tokens['median']}"
        )
    if chat_format:
        stop = " ".join(chat_format.template.stop)
        console.print(f"template {chat_format.template.name}; replies end with {stop}", markup=False)
    if inspection.targets:
        console.print(f"LoRA on  {', '.join(inspection.targets.leaves)}", markup=False)
    if expected := inspection.expected:
        console.print(f"memory   {expected.memory()}")
    for note in inspection.model_notes():
        console.print(f"  note: {note}", markup=False)
    _print_rows(report, console)
    if eval_report := inspection.rows.report.eval_report:
        console.print(f"data.eval: {eval_report.counts()}")
        _print_rows(eval_report, console)
    if chat_format and show:
        _show(inspection.rows.report.first, chat_format, console)
    if not inspection.error:
        console.print(
            "ready    every prompt is a prefix of its row, every reply ends with a stop token "
            f"({inspection.seconds:.1f} s)"
        )


def _print_rows(report: DataReport, console: Console) -> None:
    """Print the reasons, each with the number of its rows, and then row by row if some have several rows."""
    lines = report.lines(limit=40)
    for line in lines:
        console.print(f"  {line}", markup=False)
    if len(report.problems) <= len(lines) - len(report.notes):
        return
    for problem in report.problems[:20]:
        console.print(f"  {problem.source}: {problem.outcome}: {problem.reason}", markup=False)
    if len(report.problems) > 20:
        console.print(f"  ... and {len(report.problems) - 20} more (--json lists them all)")


def _show(examples: Sequence[Example], chat_format: ChatFormat, console: Console) -> None:
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    marks = ("", "") if coloured else ("{+", "+}")
    legend = "are green, the other tokens grey" if coloured else "are enclosed in {+ and +}"
    console.print(f"\ntrained tokens {legend}; | separates tokens", markup=False)
    for example in examples:
        console.print(f"\n{example.source}  ({len(example)} tokens, {example.supervised} trained)", markup=False)
        line = Text()
        pieces = zip(chat_format.tokenizer.pieces(example.ids.tolist()), example.trained.tolist(), strict=True)
        for trained, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
            line.append(marks[0] if trained else "")
            for piece, _ in group:
                line.append(piece.replace("\n", "\\n"), style="bold green" if trained else "bright_black")
                line.append("|", style="dim")
            line.append(marks[1] if trained else "")
        console.print(line)
