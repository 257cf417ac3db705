"""What is printed, and where: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.training.metrics import StepRecord


def fail(error: UserError) -> None:
    """``error: ...`` and ``  fix: ...`` on stderr."""
    for line in error.message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    print(f"  fix: {error.fix}", file=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def importing() -> Iterator[None]:
    """Around a verb's imports: the collector would look through their objects again and again (a fifth of the time)."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class StepLines:
    """Progress where no terminal shows a bar (a log file, CI): a line now and then."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, r: StepRecord) -> None:
        import time

        now = time.monotonic()
        if r.step in (1, r.steps) or now - self._last > 5:
            self._last = now
            say(f"step {r.step}/{r.steps}  loss {r.loss:.4f}  {r.tokens_per_s:.0f} tokens/s")


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C lets the step in progress end and be saved; a second one stops at once."""
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        say("\nstopping after this step (Ctrl-C again: at once) ...")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def step_progress() -> Iterator[Any]:
    """A function to call with every ``StepRecord``: a bar with loss, tokens/s and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield StepLines()
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=None, loss=float("nan"), rate=0.0)

        def show(r: StepRecord) -> None:
            progress.update(task, total=r.steps, completed=r.step, loss=r.loss, rate=r.tokens_per_s)

        yield show
