"""The directory of a run.

run.yaml            the resolved configuration
data-report.json    what became of every row
metrics.jsonl       one line per logged step
checkpoints/        from which an interrupted run resumes
adapter/            written once, at the end
summary.json        written last; a run with it is finished
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NotRequired, TypedDict

import yaml

from luthier._util import files
from luthier._util.validation import parse_yaml, read_yaml
from luthier.adapters import directory as adapters
from luthier.config import RunConfig
from luthier.config import load as load_config
from luthier.errors import ConfigError, UserError, listed
from luthier.types import Log

LOCK = ".luthier-lock"
_SEAL = "# Written by luthier to resume this run; for other settings, edit a copy. Settings: sha256 "


class Summary(TypedDict):
    """The content of ``summary.json``. losses: per step, in nats per trained token. held_out: scores by model."""

    steps: int
    rows: Mapping[str, int]
    tokens: int
    supervised_tokens: int
    train_seconds: float
    tokens_per_s: float
    peak_rss_bytes: int
    losses: list[float]
    trainable_parameters: int
    parameters: int
    dtype: str
    quantised: str | None
    device: str
    target_modules: list[str]
    template: str
    identity: NotRequired[dict[str, str]]
    held_out: NotRequired[dict[str, dict[str, object]]]


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths of a run's files, and the rules for writing them."""

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
        """Whether the run has both a summary and an adapter."""
        return self.summary_file.is_file() and self.adapter.is_dir()

    def summary(self) -> Summary:
        """Read ``summary.json``. Raises UserError if it cannot be read."""
        try:
            summary: Summary = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"{self.summary_file}: cannot be read ({e})", f"delete {self.path} and run again") from None
        return summary

    def config(self) -> RunConfig:
        """Read ``run.yaml``. Raises ConfigError."""
        return load_config(self.config_file)

    @contextmanager
    def locked(self, log: Log) -> Iterator[None]:
        """Create the directory, and lock it for this process; without files at the end, it is deleted again.

        Raises UserError if another training holds the lock. Without locks (Windows, some network file systems) the
        training goes on with a note.
        """
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        owner = f"process {os.getpid()} on {platform.node()}, started {datetime.now():%Y-%m-%d %H:%M:%S}"
        try:
            with ExitStack() as stack:
                try:
                    supported = stack.enter_context(files.locked(self.path / LOCK, owner))
                except BlockingIOError as e:
                    raise UserError(
                        f"{self.path}: is in use by another training ({e.strerror})",
                        "wait for it or stop it, or choose another --output-dir",
                    ) from None
                if not supported:
                    log(f"note: {self.path}: cannot be locked here; do not start a second training in it")
                yield
        finally:
            if new and self.path.is_dir() and not any(self.path.iterdir()):
                with suppress(OSError):  # another process has begun to use it
                    for folder in new:
                        folder.rmdir()

    def refuse_foreign_files(self) -> None:
        """Raise ConfigError if there are files, hidden ones apart, and the directory is not that of a run."""
        names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        names = [name for name in names if not name.startswith(".")]
        if names and not _is_a_runs(self.config_file):
            raise ConfigError(
                f"{self.path}: holds files that luthier did not write for a run: {listed(names)}",
                "choose a directory for this run only, as --output-dir runs/NAME",
            )

    def claim(self, config: RunConfig) -> None:
        """Raise ConfigError if the directory holds a run with other settings, or files that luthier did not write."""
        if (self.path / "config.json").exists():
            raise ConfigError(f"{self.path}: is a model directory", "choose another --output-dir")
        self.refuse_foreign_files()
        if self.adapter.exists() and not (self.adapter / adapters.META).is_file():
            raise ConfigError(f"{self.adapter}: was not written by luthier", "choose another --output-dir")
        if not self.config_file.exists():
            return
        try:
            old = self.config()
        except ConfigError as e:
            raise ConfigError(
                f"{self.config_file}: cannot be read as the settings of a run: {e.message}",
                "undo the changes to this file, or choose another --output-dir",
            ) from None
        changes = differences(_comparable(old), _comparable(config))
        saved = any(path.exists() for path in (self.adapter, self.checkpoints, self.summary_file))
        if self._edited() and (saved or changes):
            raise ConfigError(
                f"{self.config_file}: was edited after the run had started",
                f"luthier train {self.config_file} --output-dir runs/NAME trains with these settings; to resume the "
                "run, undo the changes",
            )
        if saved:  # otherwise it failed before the first checkpoint, so nothing is lost
            self._refuse(changes)

    def _edited(self) -> bool:
        """Whether ``run.yaml`` has other settings than when it was written; false for runs of earlier versions."""
        seal = self.config_file.read_text(encoding="utf-8-sig").partition("\n")[0]
        return seal.startswith(_SEAL) and seal != _seal(read_yaml(self.config_file))

    def same_identity(self, old: Mapping[str, str], new: Mapping[str, str]) -> None:
        """Raise ConfigError if the content of the data or the base model has changed since the run started."""
        self._refuse([f"{k}: the content has changed" for k, v in new.items() if old.get(k) != v])

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            kind, further = "an unfinished", ", or delete that one"
            if self.finished:
                kind = "a finished"
                further = (
                    "; to train its result further, use the model that this command writes to the directory merged: "
                    f"luthier merge {self.path} --output-dir merged"
                )
            raise ConfigError(
                f"{self.path}: holds {kind} run with other settings: {'; '.join(differences)}",
                f"choose another --output-dir{further}",
            )

    def start(self, config: RunConfig, report: Mapping[str, object]) -> None:
        """Write ``run.yaml`` and the data report; delete the adapter of an earlier, unfinished attempt."""
        files.ensure_dir(self.path)
        self.summary_file.unlink(missing_ok=True)
        shutil.rmtree(self.adapter, ignore_errors=True)
        values = config.dump()
        text = _yaml(values)
        if self.config_file.exists() and read_yaml(self.config_file) == values:
            text = self.config_file.read_text(encoding="utf-8-sig")  # with the user's comments
            text = text.partition("\n")[2] if text.startswith(_SEAL) else text
        files.write_text(self.config_file, f"{_seal(values)}\n{text}")
        files.write_json(self.path / "data-report.json", report)

    def finish(self, summary: Summary) -> None:
        """Write the summary, which marks the run as finished."""
        files.write_json(self.summary_file, summary)


def _yaml(values: object) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _seal(values: Mapping[str, object]) -> str:
    """Return the first line of ``run.yaml``: a digest of its settings, by which later changes are detected.

    Paths may be corrected after a move, since the content of the files is compared; ``generation`` is for chats.
    """
    training = {key: value for key, value in values.items() if key not in ("generation", "output_dir")}
    for section, *paths in (("model", "path"), ("data", "train", "eval")):
        settings = training.get(section)
        if isinstance(settings, dict):
            training[section] = {key: value for key, value in settings.items() if key not in paths}
    return _SEAL + hashlib.sha256(json.dumps(training, sort_keys=True, default=str).encode()).hexdigest()


def _is_a_runs(file: Path) -> bool:
    """Whether a ``run.yaml`` was written for a run: it has the seal, or the form that earlier versions wrote."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = None if text.startswith(_SEAL) else parse_yaml(text, str(file))
    except (OSError, ValueError, ConfigError):
        return False
    complete = isinstance(values, dict) and values.keys() >= {"model", "data", "lora", "train", "output_dir"}
    return text.startswith(_SEAL) or (complete and text == _yaml(values))


def absolute(config: RunConfig) -> RunConfig:
    """Make every path absolute, so that the run can be read from any directory. Raises UserError."""

    def full_path(path: Path) -> Path:
        return files.require_utf8(Path(os.path.abspath(path)))  # noqa: PTH100 - resolve() would follow links

    data = {"train": tuple(map(full_path, config.data.train)), "eval": tuple(map(full_path, config.data.eval))}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": full_path(config.model.path)}),
            "data": config.data.model_copy(update=data),
            "output_dir": full_path(config.output_dir) if config.output_dir else None,
        }
    )


def _comparable(config: RunConfig) -> dict[str, object]:
    """Return the settings that decide the result of a run: all but its directory."""
    return {key: value for key, value in config.dump().items() if key != "output_dir"}


def differences(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> list[str]:
    """List every key that differs, such as ``train.seed: 1 -> 2``."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines
