"""Write docs/configuration.md from config.py: ``python -m tests.helpers.make_reference``."""

from __future__ import annotations

import json
from pathlib import Path

from luthier import config as configs
from luthier.config import RunConfig

TARGET = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """# Settings

Given with `--set KEY=VALUE` (values are read as YAML). `run.yaml` in a run's directory holds them all, resolved. An
unknown key is an error that names the nearest one. This page is made by `python -m tests.helpers.make_reference`.

| key | default | |
|---|---|---|
"""


def default(key: str) -> str:
    values = configs.build({"model": {"path": "-"}, "data": {"train": "-"}}).dump()
    for part in key.split("."):
        values = values[part]
    if key in ("model.path", "data.train"):
        return "(required)"
    return f"`{json.dumps(values)}`"


def text() -> str:
    rows = [f"| `{key}` | {default(key)} | {configs.describe(key)} |" for key in configs.all_keys()]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(f"{TARGET} ({len(RunConfig.model_fields)} sections)")
