"""Ship one recipe per tutorial: a configuration with the tutorial's settings and its mistakes corrected.

A recipe is a ``run.yaml`` without model, data and output directory. Comments in the file explain each correction, next
to the setting that it concerns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier._util.validation import parse_yaml
from luthier.config import RunConfig, all_keys, build, describe
from luthier.errors import ConfigError, nearest

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def text(name: str) -> str:
    """Return the text of a recipe, comments included. Raises ConfigError with the nearest name if it is unknown."""
    known = names()
    if name not in known:
        guess = nearest(name, known)
        raise ConfigError(
            f"recipe {name!r} is unknown" + (f"; did you mean {guess}?" if guess else ""),
            f"use --recipe {guess}" if guess else f"the recipes are: {', '.join(known)}",
        )
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def read(name: str) -> dict[str, object]:
    """Return a recipe's settings, without model.path, data.train and output_dir. Raises ConfigError."""
    return {**_sections(name)}


def _sections(name: str) -> dict[str, dict[str, object]]:
    sections = parse_yaml(text(name), name)
    assert isinstance(sections, dict)
    return {section: dict(settings) for section, settings in sections.items()}


def recipe(
    name: str,
    model: Path | str,
    data: Path | str | Sequence[Path | str],
    output_dir: Path | str | None = None,
    overrides: Mapping[str, object] | None = None,
) -> RunConfig:
    """Build a recipe's configuration, for ``luthier.train``. Raises ConfigError.

    overrides: as {"train.max_steps": 2}.
    """
    sections = _sections(name)
    sections["model"]["path"] = model
    sections["data"]["train"] = data
    return build({**sections, "output_dir": output_dir}, overrides)


def filled(name: str, model: str, data: Sequence[str], output_dir: str) -> str:
    """Return a recipe as a complete ``run.yaml``, comments included."""
    lines = [f"# From the recipe {name}. Start it with: luthier train FILE"]
    added = {
        "model:": f"  path: {json.dumps(model, ensure_ascii=False)}",
        "data:": f"  train: {json.dumps(list(data), ensure_ascii=False)}",
    }
    for line in text(name).splitlines():
        lines.append(line)
        if line in added:
            lines.append(added[line])
    lines += ["", f"output_dir: {json.dumps(output_dir, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


def blank(model: str, data: Sequence[str], output_dir: str) -> str:
    """Return a commented ``run.yaml`` with every key, its default and its meaning."""
    values = build({"model": {"path": model}, "data": {"train": list(data)}, "output_dir": output_dir}).dump()
    lines = [
        "# A run of luthier. Start it with: luthier train FILE",
        "# All settings are listed; a setting that you delete gets its default.",
    ]
    section = None
    for key in all_keys():
        head, _, leaf = key.rpartition(".")
        if head and head != section:
            lines += ["", f"{head}:"]
        elif not head:
            lines.append("")
        section = head
        value: object = values
        for part in key.split("."):
            assert isinstance(value, Mapping)
            value = value[part]
        text = f"{'  ' if head else ''}{leaf}: {json.dumps(value, ensure_ascii=False)}"
        lines.append(f"{text:44}  # {describe(key)}")
    return "\n".join(lines) + "\n"
