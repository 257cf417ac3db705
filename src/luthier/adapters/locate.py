"""Resolve paths to a base model and an adapter: a run, an adapter directory, a base model, or both named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from luthier._util.files import user_path
from luthier.adapters import directory as adapters
from luthier.adapters.directory import Adapter
from luthier.adapters.run_dir import RunDir
from luthier.config import ModelConfig, RunConfig
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.models.chat_format import ChatFormat, load_chat_format
from luthier.models.directory import fingerprint, refuse_run
from luthier.models.tokenizer.chat_template import read_templates


@dataclass(frozen=True, slots=True)
class TunedModel:
    """A checked adapter, the directory of its base model, and the configuration of its run, if it has one."""

    adapter: Adapter
    base: Path
    config: RunConfig | None = None

    def chat_format(self) -> ChatFormat:
        """Read the chat format used in training. Raises AdapterError if ``base`` is not the adapter's base model.

        A stock PEFT adapter may have a chat template beside it; else the base model's own is used.
        """
        facts = self.adapter.facts
        if facts is None:
            return load_chat_format(self.base, own_template=read_templates(self.adapter.path).get("default"))
        chat_format = load_chat_format(self.base, described=facts.template, rope_theta=facts.rope_theta)
        base = fingerprint(self.base, chat_format.config)
        adapters.check_base(self.adapter, self.base, base, chat_format.tokenizer.digest())
        return replace(chat_format, stop_ids=facts.stop_ids)

    @property
    def model_settings(self) -> ModelConfig:
        """How to open the base model: as in training, if the run is known."""
        return self.config.model if self.config else ModelConfig.model_validate({"path": self.base})

    @property
    def system(self) -> str | None:
        """The system prompt of the training."""
        return self.adapter.facts.system if self.adapter.facts else None

    @property
    def rope_theta(self) -> float | None:
        """The rotary base of the training, if it differs from the published one."""
        return self.adapter.facts.rope_theta if self.adapter.facts else None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A resolved path. base: directory of the base model. tuned: the adapter, None for a base model without one."""

    base: Path
    tuned: TunedModel | None = None


def locate(path: Path | str | None, model: Path | str | None = None, adapter: Path | str | None = None) -> ModelSource:
    """Resolve a path, or ``model`` with ``adapter``, to a base model and its adapter, if any. Raises UserError."""
    if model is not None or adapter is not None:
        if path is not None or model is None or adapter is None:
            raise ConfigError(
                "--model and --adapter must be given together, without another directory", "give both, or only a RUN"
            )
        return _source(TunedModel(adapters.load(_adapter_dir(user_path(adapter))), user_path(model)))
    if path is None:
        raise ConfigError("no directory was given", "give a run or model directory, or --model BASE --adapter DIR")
    path = user_path(path)
    run, directory = RunDir(path), _adapter_dir(path)
    if not (directory / adapters.CONFIG).is_file():
        if not (path / "config.json").is_file():
            refuse_run(path)
        return ModelSource(path)
    if not (directory / adapters.META).is_file():
        raise AdapterError(
            f"{directory}: does not name its base model (no {adapters.META})",
            f"--model BASE --adapter {directory}",
        )
    loaded = adapters.load(directory)
    config = run.config() if run.config_file.is_file() else None
    base = config.model.path if config else Path(loaded.base_path)
    if not base.is_dir():
        raise ModelError(
            f"{base}: the base model of {directory} does not exist",
            f"move it back to this path, or use --model BASE --adapter {directory}",
        )
    return _source(TunedModel(loaded, base, config))


def locate_tuned(
    path: Path | str | None, model: Path | str | None = None, adapter: Path | str | None = None
) -> TunedModel:
    """Resolve a path to an adapter as ``locate`` does. Raises ConfigError for a base model without one."""
    source = locate(path, model, adapter)
    if source.tuned is None:
        raise ConfigError(f"{source.base}: holds no adapter", "give a run, or --model BASE --adapter DIR")
    return source.tuned


def _adapter_dir(path: Path) -> Path:
    """Return the adapter of a run, or the path itself."""
    adapter = RunDir(path).adapter
    return adapter if (adapter / adapters.CONFIG).is_file() else path


def _source(tuned: TunedModel) -> ModelSource:
    return ModelSource(tuned.base, tuned)
