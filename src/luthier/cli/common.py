"""What the verbs' modules share: options and how they become a configuration, printing, progress, Ctrl-C.

Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.errors import ConfigError, UserError

if TYPE_CHECKING:
    from luthier.training.metrics import StepRecord

File = Annotated[Path | None, typer.Argument(metavar="FILE", help="A run.yaml, as luthier init writes it.")]
Model = Annotated[Path | None, typer.Option("--model", metavar="DIR", help="Directory of the base model.")]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data", metavar="FILE", help="A data file (JSON, JSONL, CSV, Parquet; *.jsonl too); may be repeated."
    ),
]
OutputDir = Annotated[Path | None, typer.Option("--output-dir", metavar="RUN", help="The run's directory.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, as train.learning_rate=1e-4.")
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="A shipped configuration: baichuan2-7b-chat, deepseek-7b-chat-qlora, glm-4-9b-chat, "
        "phi-3-mini-4k-instruct or yi-6b-chat.",
    ),
]
Rename = Annotated[
    list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="Read a key of the rows under another name.")
]
Adapter = Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter for --model; PEFT's too.")]
Checkpoint = Annotated[int | None, typer.Option("--checkpoint", metavar="N", help="A step of the run's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def config(
    model: Path | None,
    data: list[Path] | None,
    output_dir: Path | None,
    settings: list[str] | None,
    rename: list[str] | None = None,
    file: Path | None = None,
    recipe: str | None = None,
) -> Any:
    """A validated RunConfig: recipe or file, then options, then --set. Raises ConfigError with every mistake."""
    from luthier.config import build, parse_overrides
    from luthier.config import read as read_file
    from luthier.recipes import read as read_recipe

    if recipe is not None and file is not None:
        raise ConfigError(
            f"{file} and --recipe {recipe} both give the settings",
            f"give one: luthier init --recipe {recipe} --to FILE writes the recipe as a file that you can change",
        )
    values: dict[str, Any] = read_file(file) if file else read_recipe(recipe) if recipe is not None else {}
    if model is not None:
        values["model"] = {**values.get("model", {}), "path": str(model)}
    if data:
        values["data"] = {**values.get("data", {}), "train": [str(p) for p in data]}
    if output_dir is not None:
        values["output_dir"] = str(output_dir)
    overrides = parse_overrides(settings or [])
    for pair in rename or []:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise ConfigError(f"--rename {pair}: is not OLD=NEW", "write --rename OLD=NEW")
        overrides.setdefault("data.rename", {})[old] = new
    return build(values, overrides)


# --- printing ---------------------------------------------------------------------------------------------------------


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
