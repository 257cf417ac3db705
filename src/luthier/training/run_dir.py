"""A run's directory.

run.yaml            the resolved configuration
data-report.json    what became of every row
metrics.jsonl       a line a step
adapter/            written once, at the end
summary.json        written last: its presence means that the run is finished
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier import config as configs
from luthier import files
from luthier.config import RunConfig
from luthier.errors import ConfigError, UserError


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "run.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def finished(self) -> bool:
        return self.summary_file.is_file() and self.adapter.is_dir()

    def summary(self) -> dict[str, Any]:
        try:
            value = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"{self.summary_file}: cannot be read ({e})", f"delete {self.path} and run again") from None
        return dict(value)

    def config(self) -> RunConfig:
        return configs.load(self.config_file)

    def claim(self, config: RunConfig, identity: dict[str, str]) -> bool:
        """True where the run may start, False where this very run is finished already.

        identity: digests of data and base model, which a configuration only names.
        Raises ConfigError, with the differences, where the directory holds another finished run.
        """
        files.ensure_dir(self.path)
        if not self.finished:
            return True
        differ = configs.differences(_what_matters(self.config()), _what_matters(config))
        old = self.summary().get("identity", {})
        differ += [f"{key}: the content has changed" for key, value in identity.items() if old.get(key) != value]
        if differ:
            raise ConfigError(
                f"{self.path}: holds a finished run with other settings: {'; '.join(differ)}",
                "choose another --output-dir, or delete that one",
            )
        return False

    def start(self, config: RunConfig, report: dict[str, Any]) -> None:
        files.write_text(
            self.config_file, yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True, width=120)
        )
        files.write_json(self.path / "data-report.json", report)

    def finish(self, summary: dict[str, Any]) -> None:
        files.write_json(self.summary_file, summary)


def _what_matters(config: RunConfig) -> dict[str, Any]:
    values = config.dump()
    values.pop("output_dir")
    return values
