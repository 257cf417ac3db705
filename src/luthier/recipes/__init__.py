"""Shipped configurations: one for each tutorial, with its numbers; what was wrong in it is put right and said why.

A recipe is a ``run.yaml`` without model, data and output directory. The reasons are comments in the file itself, beside
the line that they concern.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.config import RunConfig, all_keys, build, describe, parse_yaml
from luthier.errors import ConfigError, nearest

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Every recipe's name, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def text(name: str) -> str:
    """The recipe as it is written, comments included. Raises ConfigError with the nearest name."""
    known = names()
    if name not in known:
        guess = nearest(name, known)
        raise ConfigError(
            f"recipe {name!r} is unknown" + (f"; did you mean {guess}?" if guess else ""),
            f"use --recipe {guess}" if guess else f"the recipes are: {', '.join(known)}",
        )
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """The recipe's values, without model.path, data.train and output_dir."""
    return dict(parse_yaml(text(name), name))


def recipe(
    name: str,
    model: Path | str,
    data: Path | str | Sequence[Path | str],
    output_dir: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A configuration that ``luthier.train`` takes; ``overrides`` as {"train.max_steps": 2}."""
    values = read(name)
    values["model"]["path"] = model
    values["data"]["train"] = data
    values["output_dir"] = output_dir
    return build(values, overrides)


def filled(name: str, model: str, data: Sequence[str], output_dir: str) -> str:
    """The recipe's text as a whole ``run.yaml``, comments kept."""
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
    """A commented ``run.yaml``: every key with its default and what it means."""
    values = build({"model": {"path": model}, "data": {"train": list(data)}, "output_dir": output_dir}).dump()
    lines = [
        "# A run of luthier. Start it with: luthier train FILE",
        "# Every setting is here; what you delete keeps its default.",
    ]
    section = None
    for key in all_keys():
        head, _, leaf = key.rpartition(".")
        if head and head != section:
            lines += ["", f"{head}:"]
        elif not head:
            lines.append("")
        section = head
        value: Any = values
        for part in key.split("."):
            value = value[part]
        text = f"{'  ' if head else ''}{leaf}: {json.dumps(value, ensure_ascii=False)}"
        lines.append(f"{text:44}  # {describe(key)}")
    return "\n".join(lines) + "\n"
