"""The options and output of ``luthier demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier._util.files import user_path
from luthier.cli.common import importing, print_stderr, step_progress, stopping

if TYPE_CHECKING:
    from luthier.verbs.demo import DemoResult

_SHOWN = 6


def run(
    output_dir: Annotated[Path, typer.Option("--output-dir", metavar="RUN", help="The run's directory.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train a small chat model to play a character in a few minutes, and compare it with the base model."""
    with importing():
        from luthier.verbs.demo import demo
        from luthier.verbs.train import Stopped

    try:
        with stopping() as stop, step_progress() as on_step:
            result = demo(user_path(output_dir), on_step, print_stderr, stop)
    except Stopped as e:
        print_stderr(f"{e}\n  to resume: run the same command again")
        raise typer.Exit(130) from None
    _print(result, user_path(output_dir))


def _print(result: DemoResult, output_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Questions that were not in the training data", show_lines=True, expand=True)
    table.add_column("question", ratio=2)
    table.add_column("before", ratio=4)
    table.add_column("after", ratio=4)
    stride = max(1, len(result.prompts) // _SHOWN)
    for i in range(0, len(result.prompts), stride):
        before, after = result.base_replies[i].text, result.tuned_replies[i].text
        table.add_row(result.prompts[i], _shortened(before), _shortened(after))
    console = Console(highlight=False)
    console.print(table)
    n = len(result.prompts)
    ended = sum(r.stopped for r in result.tuned_replies)
    base_ended = sum(r.stopped for r in result.base_replies)
    console.print(
        f"held-out loss: {result.base_loss:.3f} before, {result.tuned_loss:.3f} after ({-result.loss_fall:+.0%})\n"
        f"replies that end with a stop token within 200 tokens: {base_ended} of {n} before, {ended} of {n} after\n"
        f"training took {result.summary['train_seconds']:.0f} s ({result.summary['tokens_per_s']:.0f} tokens/s)\n"
        f"chat with it: luthier chat {output_dir}",
        soft_wrap=True,
    )


def _shortened(text: str, limit: int = 320) -> str:
    return text if len(text) <= limit else text[:limit].rstrip() + " ..."
