"""The options and output of ``luthier pull``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import print_stderr


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="smollm2-135m (the embedded default), yi-6b-chat, phi-3-mini-4k-instruct, baichuan2-7b-chat, "
            "glm-4-9b-chat, glm-4-9b-chat-hf, deepseek-llm-7b-chat, or OWNER/NAME of a repository.",
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Directory to write; default: one in the user's cache.")
    ] = None,
    hub: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="HUB",
            help="modelscope or huggingface; default: modelscope if the extra modelscope is installed.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit; default: the hub's default.")
    ] = None,
) -> None:
    """Download a model, check every file, and print its directory. Run it again to resume an interrupted download."""
    from luthier.verbs.pull import pull

    try:
        with byte_progress() as on_progress:
            directory = pull(model, to, hub, revision, print_stderr, on_progress)
    except KeyboardInterrupt:
        print_stderr("stopped; the downloaded part is kept\n  to resume: run the same command again")
        raise typer.Exit(130) from None
    print(directory)


@contextmanager
def byte_progress() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function for (bytes downloaded, bytes in total) that draws a bar; None if stderr is no terminal."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as ProgressBar

    console = Console(
        file=sys.stderr
    )  # the stream itself: sys.stderr is replaced meanwhile to hide the hub client's own bar
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def show(downloaded: int, total: int) -> None:
            bar.update(task, total=total, completed=downloaded, visible=True)

        yield show
