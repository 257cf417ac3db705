"""Shared by the modules of the verbs: options and the configuration they make, printing, progress, Ctrl-C.

Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import gc
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.errors import ConfigError, UserError

if TYPE_CHECKING:
    from luthier.config import RunConfig
    from luthier.training.metrics import StepRecord

FileArgument = Annotated[Path | None, typer.Argument(metavar="FILE", help="A run.yaml, as written by luthier init.")]
ModelOption = Annotated[Path | None, typer.Option("--model", metavar="DIR", help="Directory of the base model.")]
DataOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="A data file (JSON, JSONL, CSV, TSV or Parquet) or a pattern such as *.jsonl; may be repeated.",
    ),
]
OutputDirOption = Annotated[Path | None, typer.Option("--output-dir", metavar="RUN", help="The run's directory.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as train.learning_rate=1e-4."),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="A shipped configuration: baichuan2-7b-chat, deepseek-7b-chat-qlora, glm-4-9b-chat, "
        "phi-3-mini-4k-instruct or yi-6b-chat.",
    ),
]
RenameOption = Annotated[
    list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="Read the key OLD of the rows as NEW.")
]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", metavar="DIR", help="Adapter for --model, written by luthier or PEFT.")
]
CheckpointOption = Annotated[
    int | None, typer.Option("--checkpoint", metavar="N", help="Use the run's checkpoint of step N.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="TYPE", help="auto (the fastest whose replies equal fp32's), float32, bfloat16 or float16."
    ),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        metavar="TYPE",
        help="Weights in llama.cpp: f16, q8_0 or q4_0; default: as in training.",
    ),
]
FusedOption = Annotated[
    bool,
    typer.Option("--fused/--no-fused", help="Decode with luthier's compiled layers if they support the model."),
]


def config(
    model: Path | None,
    data: list[Path] | None,
    output_dir: Path | None,
    settings: list[str] | None,
    rename: list[str] | None = None,
    file: Path | None = None,
    recipe: str | None = None,
    required: Iterable[str] = (),
) -> RunConfig:
    """Build the configuration from recipe or file, then options, then --set. Raises ConfigError with every mistake.

    required: as in ``build``.
    """
    from luthier._util.validation import read_yaml
    from luthier.config import build
    from luthier.recipes import read as read_recipe

    if recipe is not None and file is not None:
        raise ConfigError(
            f"{file} and --recipe {recipe} both give the settings",
            f"give one: luthier init --recipe {recipe} --to FILE writes the recipe to a file that you can edit",
        )
    values: dict[str, object] = read_yaml(file) if file else read_recipe(recipe) if recipe is not None else {}
    if model is not None:
        values["model"] = _with(values.get("model", {}), "path", str(model))
    if data:
        values["data"] = _with(values.get("data", {}), "train", [str(p) for p in data])
    if output_dir is not None:
        values["output_dir"] = str(output_dir)
    return build(values, settings=settings or [], rename=rename or [], required=required)


def _with(section: object, key: str, value: object) -> object:
    """Add a key to a section; anything but a mapping is returned unchanged, for ``build`` to refuse."""
    return {**section, key: value} if isinstance(section, Mapping) else section


# --- printing ---------------------------------------------------------------------------------------------------------


def fail(error: UserError) -> None:
    """Print ``error: ...`` and ``  fix: ...`` on stderr."""
    for line in error.message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    print(f"  fix: {error.fix}", file=sys.stderr)


def size_in_bytes(option: str, text: str) -> int:
    """Parse a size such as 2GB, 500MB or 1.5 GB. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?B)", text.strip(), re.IGNORECASE)
    if not match:
        raise ConfigError(f"{option} {text}: is not a size", f"write a number and a unit, such as {option} 2GB")
    return int(float(match[1]) * {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}[match[2].lower()])


def print_stderr(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def importing() -> Iterator[None]:
    """Pause garbage collection while a verb's modules are imported, and leave what they hold out of later collections.

    Otherwise both would take a fifth of the time until the first token, and as much again at the end.
    """
    first = gc.get_freeze_count() == 0
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if first:
            gc.freeze()


class StepLines:
    """Progress in lines, at most one every 5 seconds, for output that is not a terminal (a log file, CI)."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, r: StepRecord) -> None:
        import time

        now = time.monotonic()
        if r.step in (1, r.steps) or now - self._last > 5:
            self._last = now
            print_stderr(f"step {r.step}/{r.steps}  loss {r.loss:.4f}  {r.tokens_per_s:.0f} tokens/s")


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Finish and save the step in progress at the first Ctrl-C; stop at once at the second."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        print_stderr("\nstopping after this step (press Ctrl-C again to stop at once) ...")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def step_progress() -> Iterator[Callable[[StepRecord], None]]:
    """Yield a function that shows every ``StepRecord``: a bar with loss, tokens/s and the time left, or lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield StepLines()
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[record]}"),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task("training", total=None, record="")  # until the first step

        def show(r: StepRecord) -> None:
            record = f"loss {r.loss:.4f} {r.tokens_per_s:.0f} tokens/s"
            bar.update(task, total=r.steps, completed=r.step, record=record)

        yield show
