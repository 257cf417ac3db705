"""``luthier pull``"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.common import say


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
        Path | None, typer.Option("--to", metavar="DIR", help="Directory to put it in; default: the user's cache.")
    ] = None,
    hub: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="HUB",
            help="modelscope or huggingface; default: modelscope where luthier[modelscope] is installed.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit; default: the hub's own.")
    ] = None,
) -> None:
    """Download a model, check every file, and print its directory. Interrupted, the same command goes on."""
    from luthier.verbs.pull import pull

    try:
        with byte_progress() as progress:
            found = pull(model, to, hub, revision, say, progress)
    except KeyboardInterrupt:
        say("stopped; what has arrived is kept\n  to go on: run the same command again")
        raise typer.Exit(130) from None
    print(found)


@contextmanager
def byte_progress() -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with (bytes here, bytes in all): a bar on a terminal, None elsewhere."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=sys.stderr)  # this very stream: a client's own bar is kept off sys.stderr meanwhile
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def show(here: int, whole: int) -> None:
            bar.update(task, total=whole, completed=here, visible=True)

        yield show
