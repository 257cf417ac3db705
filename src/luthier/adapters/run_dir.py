"""A run's directory.

run.yaml            the resolved configuration
data-report.json    what became of every row
metrics.jsonl       a line a step
checkpoints/        what an interrupted run goes on from
adapter/            written once, at the end
summary.json        written last: its presence means that the run is finished
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier._util import files
from luthier.adapters import directory as adapters
from luthier.config import RunConfig
from luthier.config import load as load_config
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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

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
        return load_config(self.config_file)

    def claim(self, config: RunConfig) -> None:
        """Raise ConfigError where the directory holds another run (with the differences), or other people's files."""
        if self.path.exists():
            files.ensure_dir(self.path)
        if self.adapter.exists() and not (self.adapter / adapters.META).is_file():
            raise ConfigError(f"{self.adapter}: was not written by luthier", "choose another --output-dir")
        if not self.config_file.exists():
            return
        try:
            old = self.config()
        except ConfigError as e:
            raise ConfigError(f"{e.message}: not a run of luthier's", "choose another --output-dir") from None
        if not self.adapter.exists() and not self.checkpoints.exists():
            return  # it never came to anything worth keeping
        self._refuse(differences(_what_matters(old), _what_matters(config)))

    def same_identity(self, old: Mapping[str, str], new: Mapping[str, str]) -> None:
        """Raise ConfigError where data or base model, which a configuration only names, are not what they were."""
        self._refuse([f"{k}: the content has changed" for k, v in new.items() if old.get(k) != v])

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            what = "a finished" if self.finished else "an unfinished"
            raise ConfigError(
                f"{self.path}: holds {what} run with other settings: {'; '.join(differences)}",
                "choose another --output-dir, or delete that one",
            )

    def start(self, config: RunConfig, report: dict[str, Any]) -> None:
        """Write what is known before the first step; an adapter of an earlier, unfinished try is removed."""
        files.ensure_dir(self.path)
        self.summary_file.unlink(missing_ok=True)
        shutil.rmtree(self.adapter, ignore_errors=True)
        text = yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True, width=120)
        files.write_text(self.config_file, text)
        files.write_json(self.path / "data-report.json", report)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, the sign of a finished run."""
        files.write_json(self.summary_file, summary)


def _what_matters(config: RunConfig) -> dict[str, Any]:
    values = config.dump()
    values.pop("output_dir")
    return values


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``train.seed: 1 -> 2`` for every key that differs."""
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found
