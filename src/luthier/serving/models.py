"""Find and load the models of a server: the adapters of several runs, and the base model that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier._util.files import user_path
from luthier.adapters import directory as adapters
from luthier.adapters.locate import ModelSource, TunedModel, locate
from luthier.adapters.run_dir import RunDir
from luthier.config import ModelConfig
from luthier.devices.device import pick_device
from luthier.errors import ConfigError, TemplateError
from luthier.evaluation.dtype import Subject, reply_dtype, tuned_subject
from luthier.inference.sampling import Sampling
from luthier.lora.layers import detach
from luthier.models.chat_format import ChatFormat, load_chat_format
from luthier.models.directory import fingerprint, read_config
from luthier.models.loader import open_base, quantisation
from luthier.models.protocols import CausalLM
from luthier.serving.adapters import Routes, install
from luthier.types import Log


@dataclass(frozen=True, slots=True)
class Served:
    """A model that requests can ask for by name.

    adapter:  its name in the engine, None for the base model.
    system:   the system prompt of its training, used for requests that have none.
    sampling: the settings of its run, used for what a request does not set.
    """

    name: str
    adapter: str | None
    chat_format: ChatFormat
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model to be served, before its weights are loaded. tuned: None for the base model itself."""

    name: str
    base: Path
    tuned: TunedModel | None = None

    @property
    def settings(self) -> ModelConfig:
        """The settings with which the base model is loaded."""
        return self.tuned.model_settings if self.tuned else ModelConfig.model_validate({"path": self.base})

    @property
    def rope_theta(self) -> float | None:
        return self.tuned.rope_theta if self.tuned else None

    @property
    def sampling(self) -> Sampling:
        """The generation settings of its run, used for what a request does not set."""
        config = self.tuned.config if self.tuned else None
        return Sampling.of(config.generation) if config else Sampling()


def resolve_models(
    paths: Sequence[Path | str],
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    distinct: bool = True,
) -> list[NamedModel]:
    """Locate and name the models to serve: tuned ones first, their base model last.

    paths: run, adapter or model directories. model, adapter: a base model and a PEFT adapter for it.
    distinct: refuse two models of the same name.
    Raises UserError if a directory is not a model, or if they do not share a base model.
    """
    models = [_named_model(p, locate(p)) for p in map(user_path, paths)]
    if model is not None or adapter is not None:
        models.append(_named_model(adapter or "", locate(None, model, adapter)))
    if not models:
        raise ConfigError("no directory was given", "give a run or model directory, or --model BASE --adapter DIR")
    tuned = [m for m in models if m.tuned]
    first = (tuned or models)[0]
    for other in models:
        if why := _another_base(first, other):
            raise ConfigError(
                f"{other.name} and {first.name} do not share a base model: {why}",
                "serve them separately, each on its own --port",
            )
    served = [*tuned, NamedModel(_name(first.base), first.base)]
    names = [m.name for m in served]
    duplicate = next((n for n in names if names.count(n) > 1), None)
    if distinct and duplicate is not None:
        raise ConfigError(f"two models would have the name {duplicate}", "rename one of the directories")
    return served


def open_models(
    served: Sequence[NamedModel], dtype: str = "auto", fused: bool = True, log: Log = lambda _: None
) -> tuple[CausalLM, Routes, list[Served]]:
    """Load the base model once, and install every adapter on it. served: as returned by ``resolve_models``.

    dtype, fused, log: as for ``reply_dtype``; of the base model, only if it is served alone.
    Returns the model, the routes that select adapters, and what requests can ask for. Raises UserError.
    """
    first = served[0]
    device = pick_device()
    formats = chat_formats(served)
    subjects = [tuned_subject(m.tuned, f) for m, f in zip(served, formats, strict=True) if m.tuned]
    kind = reply_dtype(dtype, device, subjects or [Subject(first.settings, formats[0])], fused, log)
    log(f"dtype: {str(kind).removeprefix('torch.')}")
    model = open_base(first.settings, kind, device, formats[0].config, log)
    updates = []
    for named, chat_format in zip(served, formats, strict=True):
        if named.tuned:
            layers = adapters.apply(model, named.tuned.adapter, chat_format.modules())
            detach(model, layers)
            updates.append((named.name, layers))
    routes = install(model, updates, model.dtype)
    return model, routes, served_models(served, formats)


def chat_formats(served: Sequence[NamedModel]) -> list[ChatFormat]:
    """Return the chat format of each model. Raises UserError."""
    return [m.tuned.chat_format() if m.tuned else _base_chat_format(m, served[0]) for m in served]


def served_models(models: Sequence[NamedModel], formats: Sequence[ChatFormat]) -> list[Served]:
    """Return what requests can ask for. Raises DataError if a system prompt of a training cannot be used."""
    served = []
    for named, chat_format in zip(models, formats, strict=True):
        if named.tuned is None:
            served.append(Served(named.name, None, chat_format))
            continue
        if named.tuned.system:
            chat_format.check_text(named.tuned.system, "the system prompt")
        served.append(Served(named.name, named.name, chat_format, named.tuned.system, named.sampling))
    return served


def _base_chat_format(base: NamedModel, first: NamedModel) -> ChatFormat:
    """Return the base model's own chat format, or that of the first run if the base model has no chat template."""
    try:
        return load_chat_format(base.base, rope_theta=first.rope_theta)
    except TemplateError:
        if first.tuned is None:
            raise
        return first.tuned.chat_format()


def _named_model(path: Path | str, source: ModelSource) -> NamedModel:
    if source.tuned is None:
        return NamedModel(_name(source.base), source.base)
    path = Path(path)
    inside = path.name == "adapter" and RunDir(path.absolute().parent).config_file.is_file()
    return NamedModel(_name(path.absolute().parent if inside else path), source.base, source.tuned)


def _name(path: Path) -> str:
    return path.absolute().name or "model"


def _another_base(one: NamedModel, other: NamedModel) -> str | None:
    """Return why two models cannot share one base model in memory, or None if they can."""
    if _weights(one) != _weights(other):
        return f"{one.base} and {other.base} are different models"
    if other.tuned is None:
        return None
    if quantisation(one.settings) != quantisation(other.settings):
        return "they were trained on differently quantised weights"
    if one.rope_theta != other.rope_theta:
        return f"their rope_theta is {one.rope_theta} and {other.rope_theta}"
    return None


def _weights(named: NamedModel) -> str:
    facts = named.tuned.adapter.facts if named.tuned else None
    if facts:
        return facts.base.weights
    return fingerprint(named.base, read_config(named.base)).weights
