"""Options that several verbs share, and how they become a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[Path | None, typer.Option("--model", metavar="DIR", help="Directory of the base model.")]
Data = Annotated[
    list[Path] | None, typer.Option("--data", metavar="FILE", help="A data file (JSON or JSONL); may be repeated.")
]
OutputDir = Annotated[Path | None, typer.Option("--output-dir", metavar="RUN", help="The run's directory.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, as train.learning_rate=1e-4.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def config(model: Path | None, data: list[Path] | None, output_dir: Path | None, settings: list[str] | None) -> Any:
    """A validated RunConfig. Raises ConfigError with every mistake."""
    from luthier import config as configs

    values: dict[str, Any] = {}
    if model is not None:
        values["model"] = {"path": str(model)}
    if data:
        values["data"] = {"train": [str(p) for p in data]}
    if output_dir is not None:
        values["output_dir"] = str(output_dir)
    return configs.build(values, configs.parse_overrides(settings or []))
