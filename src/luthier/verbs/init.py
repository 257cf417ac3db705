"""``luthier init``: write a run.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier._util import files
from luthier.errors import ConfigError
from luthier.recipes import blank, filled


def init(
    to: Path | str,
    model: Path | str | None = None,
    data: Sequence[Path | str] = (),
    output_dir: Path | str | None = None,
    recipe: str | None = None,
) -> Path:
    """Write a commented ``run.yaml``, from a recipe if one is named. Raises ConfigError if the file exists."""
    to = Path(to)
    if to.exists():
        raise ConfigError(f"{to}: already exists", "choose another name with --to, or delete it")
    paths = str(model or "MODEL_DIR"), [str(p) for p in data] or ["ROWS.jsonl"], str(output_dir or "run")
    text = filled(recipe, *paths) if recipe is not None else blank(*paths)
    files.write_text(to, text)
    return to
