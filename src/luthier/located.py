"""Which adapter and which base a directory means: a run, an adapter directory, or both named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from luthier import adapter as adapters
from luthier.adapter import Adapter
from luthier.config import RunConfig
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.models.directory import fingerprint
from luthier.preflight import Voice, voice
from luthier.training.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Located:
    """An adapter that was read and found whole, its base's directory, and its run's configuration if it has one."""

    adapter: Adapter
    base: Path
    config: RunConfig | None = None

    def voice(self) -> Voice:
        """The base as it was spoken to in training. Raises AdapterError where it is not the adapter's base."""
        facts = self.adapter.facts
        if facts is None:
            return voice(self.base)
        found = voice(self.base, described=facts.template, rope_theta=facts.rope_theta)
        adapters.verify(self.adapter, self.base, fingerprint(self.base, found.config), found.tokenizer.digest())
        return replace(found, stop_ids=facts.stop_ids)

    @property
    def system(self) -> str | None:
        """The system prompt of its training."""
        return self.adapter.facts.system if self.adapter.facts else None


def locate(
    path: Path | str | None, model: Path | str | None = None, adapter: Path | str | None = None
) -> Located | Path:
    """What is meant; a directory without an adapter is returned as it is (a base model). Raises UserError."""
    if model is not None or adapter is not None:
        if path is not None or model is None or adapter is None:
            raise ConfigError(
                "--model and --adapter go together, without another directory", "give both, or a RUN alone"
            )
        return Located(adapters.load(Path(adapter)), Path(model))
    if path is None:
        raise ConfigError("no directory was given", "give a run or model directory, or --model BASE --adapter DIR")
    path = Path(path)
    run = RunDir(path)
    directory = run.adapter if (run.adapter / adapters.CONFIG).is_file() else path
    if not (directory / adapters.CONFIG).is_file():
        if run.config_file.is_file():
            raise ModelError(f"{path}: the run has no adapter yet", "finish it with luthier train")
        return path
    if not (directory / adapters.META).is_file():
        raise AdapterError(
            f"{directory}: does not say which base model it belongs to (no {adapters.META})",
            f"--model BASE --adapter {directory}",
        )
    loaded = adapters.load(directory)
    config = run.config() if run.config_file.is_file() else None
    base = config.model.path if config else Path(loaded.base_path)
    if not base.is_dir():
        raise ModelError(
            f"{base}: the base model of {directory} is not there",
            f"put it back at that place, or use --model BASE --adapter {directory}",
        )
    return Located(loaded, base, config)


def locate_adapter(
    path: Path | str | None, model: Path | str | None = None, adapter: Path | str | None = None
) -> Located:
    """As ``locate``, where a base model alone will not do."""
    found = locate(path, model, adapter)
    if isinstance(found, Path):
        raise ConfigError(f"{found}: holds no adapter", "give a run, or --model BASE --adapter DIR")
    return found
