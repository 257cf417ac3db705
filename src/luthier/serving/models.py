"""What a server offers: the adapters of its runs over the one base that they share, and that base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.adapters import directory as adapters
from luthier.adapters.locate import ModelSource, TunedModel, locate
from luthier.adapters.run_dir import RunDir
from luthier.config import ModelConfig
from luthier.devices.device import pick_device, pick_dtype
from luthier.errors import ConfigError, TemplateError
from luthier.inference.generation import Generator, Sampling
from luthier.lora.layers import detach
from luthier.models.chat_format import ChatFormat, load_chat_format
from luthier.models.directory import fingerprint, read_config
from luthier.models.loader import open_base, quantisation
from luthier.serving.adapters import Routes, install


@dataclass(frozen=True, slots=True)
class Served:
    """One name that a request can ask for.

    adapter: its key in the engine, None for the base. system: of its training, for requests that have none.
    sampling: how replies are drawn where a request does not say: the run's own settings.
    """

    name: str
    adapter: str | None
    generator: Generator
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model that is to be served, before a weight is read. tuned: None for the base by itself."""

    name: str
    base: Path
    tuned: TunedModel | None = None

    @property
    def settings(self) -> ModelConfig:
        """How the base is opened."""
        return self.tuned.model_settings if self.tuned else ModelConfig.model_validate({"path": self.base})

    @property
    def rope_theta(self) -> float | None:
        return self.tuned.rope_theta if self.tuned else None


def places(
    paths: Sequence[Path | str], model: Path | str | None = None, adapter: Path | str | None = None
) -> list[NamedModel]:
    """Every directory found and named, tuned ones first, the base last. Raises UserError unless they share a base."""
    found = [_place(p, locate(p)) for p in paths]
    if model is not None or adapter is not None:
        found.append(_place(adapter or "", locate(None, model, adapter)))
    if not found:
        raise ConfigError("no directory was given", "give a run or model directory, or --model BASE --adapter DIR")
    tuned = [p for p in found if p.tuned]
    first = (tuned or found)[0]
    for other in found:
        if why := _another_base(first, other):
            raise ConfigError(
                f"{other.name} and {first.name} do not share a base: {why}", "serve them apart, each at its own --port"
            )
    everything = [*tuned, NamedModel(_name(first.base), first.base)]
    names = [p.name for p in everything]
    double = next((n for n in names if names.count(n) > 1), None)
    if double is not None:
        raise ConfigError(f"two models would be called {double}", "rename one of the directories")
    return everything


def open_models(served: Sequence[NamedModel], dtype: str = "auto") -> tuple[Any, Routes, list[Served]]:
    """Load the base once and every adapter over it. served: as ``places`` returned it."""
    first = served[0]
    device = pick_device()
    kind = torch.float32 if dtype == "auto" and device.type == "cpu" else pick_dtype(dtype, device)
    formats = [p.tuned.chat_format() if p.tuned else _own_chat_format(p, first) for p in served]
    model = open_base(first.settings, kind, device, formats[0].config)
    updates = []
    for place, found in zip(served, formats, strict=True):
        if place.tuned:
            layers = adapters.apply(model, place.tuned.adapter, found.modules())
            detach(model, layers)
            updates.append((place.name, layers))
    routes = install(model, updates, model.dtype)
    return model, routes, [_served(p, v, model) for p, v in zip(served, formats, strict=True)]


def _served(place: NamedModel, found: ChatFormat, model: Any) -> Served:
    generator = Generator(model, found)
    if place.tuned is None:
        return Served(place.name, None, generator)
    config = place.tuned.config
    sampling = Sampling.of(config.generation) if config else Sampling()
    if place.tuned.system:
        found.check_text(place.tuned.system, "the system prompt")
    return Served(place.name, place.name, generator, place.tuned.system, sampling)


def _own_chat_format(base: NamedModel, first: NamedModel) -> ChatFormat:
    """The base's own; one published without a chat template is spoken to as the first run was."""
    try:
        return load_chat_format(base.base, rope_theta=first.rope_theta)
    except TemplateError:
        if first.tuned is None:
            raise
        return first.tuned.chat_format()


def _place(path: Path | str, source: ModelSource) -> NamedModel:
    if source.tuned is None:
        return NamedModel(_name(source.base), source.base)
    path = Path(path)
    inside = path.name == "adapter" and RunDir(path.absolute().parent).config_file.is_file()
    return NamedModel(_name(path.absolute().parent if inside else path), source.base, source.tuned)


def _name(path: Path) -> str:
    return path.absolute().name or "model"


def _another_base(one: NamedModel, other: NamedModel) -> str | None:
    """Why two places cannot be served over one model in memory."""
    if _weights(one) != _weights(other):
        return f"{one.base} and {other.base} are different models"
    if other.tuned is None:
        return None
    if quantisation(one.settings) != quantisation(other.settings):
        return "they were trained on differently quantised weights"
    if one.rope_theta != other.rope_theta:
        return f"their rope_theta is {one.rope_theta} and {other.rope_theta}"
    return None


def _weights(place: NamedModel) -> str:
    facts = place.tuned.adapter.facts if place.tuned else None
    if facts:
        return facts.base.weights
    return fingerprint(place.base, read_config(place.base)).weights
