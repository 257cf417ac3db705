"""What a server offers: the adapters of its runs over the one base that they share, and that base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier import adapter as adapters
from luthier.config import ModelConfig
from luthier.errors import ConfigError, TemplateError
from luthier.generate import Generator, Sampling
from luthier.located import Located, locate
from luthier.lora import detach
from luthier.models.base import open_base, quantisation
from luthier.models.directory import fingerprint, read_config
from luthier.models.load import pick_device, pick_dtype
from luthier.preflight import Voice, voice
from luthier.serving.adapters import Routes, install
from luthier.training.run_dir import RunDir

Say = Callable[[str], None]


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
class Place:
    """A directory that is to be served, before a weight is read. located: None for a plain model directory."""

    name: str
    base: Path
    located: Located | None = None

    @property
    def settings(self) -> ModelConfig:
        """How the base is opened."""
        if self.located and self.located.config:
            return self.located.config.model
        return ModelConfig.model_validate({"path": self.base})

    @property
    def rope_theta(self) -> float | None:
        facts = self.located.adapter.facts if self.located else None
        return facts.rope_theta if facts else None


def places(
    paths: Sequence[Path | str], model: Path | str | None = None, adapter: Path | str | None = None
) -> list[Place]:
    """Every directory found and named, tuned ones first, the base last. Raises UserError unless they share a base."""
    found = [_place(p, locate(p)) for p in paths]
    if model is not None or adapter is not None:
        found.append(_place(adapter or "", locate(None, model, adapter)))
    if not found:
        raise ConfigError("no directory was given", "give a run or model directory, or --model BASE --adapter DIR")
    tuned = [p for p in found if p.located]
    first = (tuned or found)[0]
    for other in found:
        if why := _another_base(first, other):
            raise ConfigError(
                f"{other.name} and {first.name} do not share a base: {why}", "serve them apart, each at its own --port"
            )
    everything = [*tuned, Place(_name(first.base), first.base)]
    names = [p.name for p in everything]
    double = next((n for n in names if names.count(n) > 1), None)
    if double is not None:
        raise ConfigError(f"two models would be called {double}", "rename one of the directories")
    return everything


def open_models(served: Sequence[Place], dtype: str = "auto") -> tuple[Any, Routes, list[Served]]:
    """Load the base once and every adapter over it. served: as ``places`` returned it."""
    first = served[0]
    device = pick_device()
    kind = torch.float32 if dtype == "auto" and device.type == "cpu" else pick_dtype(dtype, device)
    voices = [p.located.voice() if p.located else _own_voice(p, first) for p in served]
    model = open_base(first.settings, kind, device, voices[0].config)
    updates = []
    for place, found in zip(served, voices, strict=True):
        if place.located:
            layers = adapters.apply(model, place.located.adapter, found.modules())
            detach(model, layers)
            updates.append((place.name, layers))
    routes = install(model, updates, model.dtype)
    return model, routes, [_served(p, v, model) for p, v in zip(served, voices, strict=True)]


def _served(place: Place, found: Voice, model: Any) -> Served:
    generator = Generator(model, found.tokenizer, found.template, found.stop_ids)
    if place.located is None:
        return Served(place.name, None, generator)
    config = place.located.config
    sampling = Sampling.of(config.generation) if config else Sampling()
    if place.located.system:
        generator.check(place.located.system, "the system prompt")
    return Served(place.name, place.name, generator, place.located.system, sampling)


def _own_voice(base: Place, first: Place) -> Voice:
    """The base's own; one published without a chat template is spoken to as the first run was."""
    try:
        return voice(base.base, rope_theta=first.rope_theta)
    except TemplateError:
        if first.located is None:
            raise
        return first.located.voice()


def _place(path: Path | str, found: Located | Path) -> Place:
    if isinstance(found, Path):
        return Place(_name(found), found)
    path = Path(path)
    inside = path.name == "adapter" and RunDir(path.absolute().parent).config_file.is_file()
    return Place(_name(path.absolute().parent if inside else path), found.base, found)


def _name(path: Path) -> str:
    return path.absolute().name or "model"


def _another_base(one: Place, other: Place) -> str | None:
    """Why two places cannot be served over one model in memory."""
    if _weights(one) != _weights(other):
        return f"{one.base} and {other.base} are different models"
    if other.located is None:
        return None
    if quantisation(one.settings) != quantisation(other.settings):
        return "they were trained on differently quantised weights"
    if one.rope_theta != other.rope_theta:
        return f"their rope_theta is {one.rope_theta} and {other.rope_theta}"
    return None


def _weights(place: Place) -> str:
    facts = place.located.adapter.facts if place.located else None
    if facts:
        return facts.base.weights
    return fingerprint(place.base, read_config(place.base)).weights
