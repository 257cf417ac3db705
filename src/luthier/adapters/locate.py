"""Which base model and which adapter a path means: a run, an adapter directory, a base model, or both named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from luthier.adapters import directory as adapters
from luthier.adapters.directory import Adapter
from luthier.adapters.run_dir import RunDir
from luthier.config import ModelConfig, RunConfig
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.models.chat_format import ChatFormat, load_chat_format
from luthier.models.directory import fingerprint


@dataclass(frozen=True, slots=True)
class TunedModel:
    """An adapter that was read and found whole, its base's directory, and its run's configuration if it has one."""

    adapter: Adapter
    base: Path
    config: RunConfig | None = None

    def chat_format(self) -> ChatFormat:
        """The base's chat format in training. Raises AdapterError if it is not the adapter's base."""
        facts = self.adapter.facts
        if facts is None:
            return load_chat_format(self.base)
        base = load_chat_format(self.base, described=facts.template, rope_theta=facts.rope_theta)
        adapters.verify(self.adapter, self.base, fingerprint(self.base, base.config), base.tokenizer.digest())
        return replace(base, stop_ids=facts.stop_ids)

    @property
    def model_settings(self) -> ModelConfig:
        """How the base is opened: as in training, if the run is known."""
        return self.config.model if self.config else ModelConfig.model_validate({"path": self.base})

    @property
    def system(self) -> str | None:
        """The system prompt of its training."""
        return self.adapter.facts.system if self.adapter.facts else None

    @property
    def rope_theta(self) -> float | None:
        return self.adapter.facts.rope_theta if self.adapter.facts else None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a path means. base: the base model's directory. tuned: its adapter, None for a base model by itself."""

    base: Path
    tuned: TunedModel | None = None


def locate(path: Path | str | None, model: Path | str | None = None, adapter: Path | str | None = None) -> ModelSource:
    """Read which model is meant; a directory without an adapter is a base model. Raises UserError."""
    if model is not None or adapter is not None:
        if path is not None or model is None or adapter is None:
            raise ConfigError(
                "--model and --adapter go together, without another directory", "give both, or a RUN alone"
            )
        return _source(TunedModel(adapters.load(Path(adapter)), Path(model)))
    if path is None:
        raise ConfigError("no directory was given", "give a run or model directory, or --model BASE --adapter DIR")
    path = Path(path)
    run = RunDir(path)
    directory = run.adapter if (run.adapter / adapters.CONFIG).is_file() else path
    if not (directory / adapters.CONFIG).is_file():
        if run.config_file.is_file():
            raise ModelError(f"{path}: the run has no adapter yet", "finish it with luthier train")
        return ModelSource(path)
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
    return _source(TunedModel(loaded, base, config))


def locate_tuned(
    path: Path | str | None, model: Path | str | None = None, adapter: Path | str | None = None
) -> TunedModel:
    """As ``locate``, for verbs that need an adapter. Raises ConfigError for a base model."""
    source = locate(path, model, adapter)
    if source.tuned is None:
        raise ConfigError(f"{source.base}: holds no adapter", "give a run, or --model BASE --adapter DIR")
    return source.tuned


def _source(tuned: TunedModel) -> ModelSource:
    return ModelSource(tuned.base, tuned)
