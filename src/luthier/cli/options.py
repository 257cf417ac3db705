"""Options that several verbs share, and how they become a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.errors import ConfigError

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
    from luthier import config as configs
    from luthier import recipes

    if recipe is not None and file is not None:
        raise ConfigError(
            f"{file} and --recipe {recipe} both give the settings",
            f"give one: luthier init --recipe {recipe} --to FILE writes the recipe as a file that you can change",
        )
    values: dict[str, Any] = configs.read(file) if file else recipes.read(recipe) if recipe is not None else {}
    if model is not None:
        values["model"] = {**values.get("model", {}), "path": str(model)}
    if data:
        values["data"] = {**values.get("data", {}), "train": [str(p) for p in data]}
    if output_dir is not None:
        values["output_dir"] = str(output_dir)
    overrides = configs.parse_overrides(settings or [])
    for pair in rename or []:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise ConfigError(f"--rename {pair}: is not OLD=NEW", "write --rename OLD=NEW")
        overrides.setdefault("data.rename", {})[old] = new
    return configs.build(values, overrides)
