"""A model that is ready to be talked to: a run, one of its checkpoints, an adapter directory, or a base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier import adapter as adapters
from luthier.adapter import Adapter
from luthier.config import RunConfig
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.generate import Generator, Reply, Sampling
from luthier.lora import LoraLinear, attach, resolve
from luthier.models.directory import fingerprint
from luthier.models.load import load_weights, pick_device, pick_dtype
from luthier.preflight import Voice, voice
from luthier.training import checkpoint as checkpoints
from luthier.training.run_dir import RunDir
from luthier.types import Message


@dataclass(slots=True)
class Chat:
    """A conversation with a base model, or with a run's adapter as it was trained.

    layers: the adapter's layers by module name, empty for a base model. config: the run's, where there is one.
    """

    generator: Generator
    voice: Voice
    system: str | None = None
    layers: dict[str, LoraLinear] = field(default_factory=dict)
    config: RunConfig | None = None
    history: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system:
            self.generator.check(self.system, "the system prompt")

    def send(self, text: str, sampling: Sampling | None = None, on_text: Callable[[str], None] | None = None) -> Reply:
        """Add a user's message and the model's reply to the conversation; returns the reply."""
        self.generator.check(text, "the message")
        self.history.append(Message("user", text))
        try:
            reply = self.generator.reply(self.messages(), sampling or Sampling(), on_text)
        except BaseException:
            self.history.pop()
            raise
        self.history.append(Message("assistant", reply.text))
        return reply

    def messages(self) -> list[Message]:
        opening = [Message("system", self.system)] if self.system else []
        return [*opening, *self.history]

    def reset(self) -> None:
        self.history.clear()


def open_chat(
    path: Path | str | None = None,
    system: str | None = None,
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    checkpoint: int | None = None,
) -> Chat:
    """Open a run, an adapter or a base model directory; or ``model`` with ``adapter`` (a stock PEFT directory too).

    system:     system prompt; None: the one of the run's training, if any.
    dtype:      "auto": fp32 on the CPU, so that greedy replies are reproducible; the device's own type elsewhere.
    checkpoint: a step of the run's, in place of its finished adapter.
    """
    device = pick_device()
    kind = torch.float32 if dtype == "auto" and device.type == "cpu" else pick_dtype(dtype, device)
    if model is not None or adapter is not None:
        if path is not None or model is None or adapter is None:
            raise ConfigError(
                "--model and --adapter go together, without another directory", "give both, or a RUN alone"
            )
        return _with_adapter(adapters.load(Path(adapter)), Path(model), None, system, kind, device)
    if path is None:
        raise ConfigError("nothing to talk to", "give a run or model directory, or --model BASE --adapter DIR")
    path = Path(path)
    run = RunDir(path)
    if checkpoint is not None:
        return _at_checkpoint(run, checkpoint, system, kind, device)
    directory = run.adapter if (run.adapter / adapters.CONFIG).is_file() else path
    if not (directory / adapters.CONFIG).is_file():
        if run.config_file.is_file():
            raise ModelError(f"{path}: the run has no adapter yet", "finish it with luthier train")
        found = voice(path)
        return Chat(_generator(load_weights(path, kind, device), found), found, system)
    if not (directory / adapters.META).is_file():
        raise AdapterError(
            f"{directory}: does not say which base model it belongs to (no {adapters.META})",
            f"luthier chat --model BASE --adapter {directory}",
        )
    loaded = adapters.load(directory)
    config = run.config() if run.config_file.is_file() else None
    base = config.model.path if config else Path(loaded.base_path)
    if not base.is_dir():
        raise ModelError(
            f"{base}: the base model of {directory} is not there",
            f"put it back at that place, or use --model BASE --adapter {directory}",
        )
    return _with_adapter(loaded, base, config, system, kind, device)


def _with_adapter(
    adapter: Adapter, base: Path, config: RunConfig | None, system: str | None, kind: torch.dtype, device: torch.device
) -> Chat:
    facts = adapter.facts
    found = voice(base, described=facts.template if facts else None)
    if facts:
        adapters.verify(adapter, base, fingerprint(base, found.config), found.tokenizer.digest())
        found = replace(found, stop_ids=facts.stop_ids)
        system = facts.system if system is None else system
    model = load_weights(base, kind, device)
    layers = adapters.apply(model, adapter)
    return Chat(_generator(model, found), found, system, layers, config)


def _at_checkpoint(run: RunDir, step: int, system: str | None, kind: torch.dtype, device: torch.device) -> Chat:
    there = checkpoints.steps(run.checkpoints)
    chosen = next((p for p in there if int(p.name.removeprefix("step-")) == step), None)
    if chosen is None:
        names = ", ".join(str(int(p.name.removeprefix("step-"))) for p in there) or "none"
        raise ConfigError(f"{run.path}: has no checkpoint {step}", f"its checkpoints are: {names}")
    try:
        saved = checkpoints.read(chosen)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise AdapterError(f"{chosen}: is damaged ({e})", "use another checkpoint") from None
    config = run.config()
    found = voice(config.model.path, config.data.template)
    model = load_weights(config.model.path, kind, device)
    layers = attach(model, config.lora, resolve(model, config.lora.target_modules), seed=0)
    checkpoints.restore_adapter(saved, layers)
    return Chat(
        _generator(model, found), found, (config.data.system or None) if system is None else system, layers, config
    )


def _generator(model: Any, found: Voice) -> Generator:
    return Generator(model, found.tokenizer, found.template, found.stop_ids)
