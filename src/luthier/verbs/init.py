"""``luthier init``: write a run.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier._util import files
from luthier._util.validation import parse_yaml
from luthier.adapters.run_dir import RunDir
from luthier.config import build
from luthier.errors import ConfigError, UserError
from luthier.recipes import blank, filled
from luthier.verbs.estimate import estimate


def init(
    to: Path | str,
    model: Path | str | None = None,
    data: Sequence[Path | str] = (),
    output_dir: Path | str | None = None,
    recipe: str | None = None,
) -> Path:
    """Write a commented ``run.yaml``, from a recipe if one is named.

    Raises ConfigError if the file exists, or if ``output_dir`` holds other files than a run's.
    """
    to = files.user_path(to)
    if to.exists():
        raise ConfigError(f"{to}: already exists", "choose another name with --to, or delete it")
    run = RunDir(files.user_path(output_dir or "run"))
    if to.absolute().is_relative_to(run.path.absolute()):
        raise ConfigError(
            f"{to}: would be in the directory of the run, {run.path}, which luthier fills itself",
            "choose a directory for this run only, as --output-dir runs/NAME",
        )
    run.refuse_foreign_files()
    paths = (
        str(files.user_path(model or "MODEL_DIR")),
        [str(files.user_path(p)) for p in data] or ["ROWS.jsonl"],
        str(run.path),
    )
    text = filled(recipe, *paths) if recipe is not None else blank(*paths)
    first, _, rest = text.partition("\n")
    comment = _estimate(text) if model and data else "luthier estimate FILE predicts memory and time"
    files.write_text(to, f"{first}\n# {comment}\n{rest}")
    return to


def _estimate(text: str) -> str:
    """Predict memory and time of the run, in one line; if it is not possible yet, say why."""
    values = parse_yaml(text, "run.yaml")
    assert isinstance(values, dict)
    try:
        return (
            f"Estimate for this machine and these settings: {estimate(build(values)).line().removeprefix('estimate: ')}"
        )
    except (UserError, OSError) as e:
        why = " ".join((e.message if isinstance(e, UserError) else str(e)).split())[:200]
        why = "".join(c if c.isprintable() else "?" for c in why)  # others are not allowed in YAML
        return f"luthier estimate FILE predicts memory and time; not possible yet: {why}"
