"""A model that is ready to be talked to: a run, one of its checkpoints, an adapter directory, or a base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier import adapter as adapters
from luthier import files
from luthier.config import ModelConfig, RunConfig
from luthier.data import messages as message_rows
from luthier.data.rows import RowProblem
from luthier.errors import AdapterError, ConfigError, DataError
from luthier.generate import Generator, Reply, Sampling, check_text, prompt_text
from luthier.located import locate
from luthier.lora import LoraLinear, attach, plain, resolve
from luthier.models.base import open_base
from luthier.models.directory import must_be_directory
from luthier.models.load import empty_model, load_weights, pick_device, pick_dtype
from luthier.preflight import Voice, voice, voice_of
from luthier.training import checkpoint as checkpoints
from luthier.training.run_dir import RunDir
from luthier.types import Message

_GIVE_ADAPTER = "give a run, or --model BASE --adapter DIR"


@dataclass(slots=True)
class Chat:
    """A conversation with a base model, or with a run's adapter as it was trained.

    layers: the adapter's layers by module name, empty for a base model. config: the run's, where there is one.
    sampling: how replies are drawn where ``send`` is given nothing else.
    base: the adapter is switched off, so that its base model answers.
    """

    generator: Generator
    voice: Voice
    system: str | None = None
    layers: dict[str, LoraLinear] = field(default_factory=dict)
    config: RunConfig | None = None
    history: list[Message] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    base: bool = False

    def send(self, text: str, sampling: Sampling | None = None, on_text: Callable[[str], None] | None = None) -> Reply:
        """Add a user's message and the model's reply to the conversation; returns the reply."""
        self.generator.check(text, "the message")
        self.history.append(Message("user", text))
        try:
            with plain(self.layers if self.base else {}):
                reply = self.generator.reply(self.messages(), sampling or self.sampling, on_text)
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

    def instruct(self, system: str | None) -> None:
        """A new conversation under another system prompt, or under none. Raises UserError where it is refused."""
        _check_system(self.voice, system)
        self.system = system
        self.reset()

    def toggle(self) -> None:
        """Switch the adapter off, or on again; the conversation goes on. Raises ConfigError where there is none."""
        if not self.layers:
            raise ConfigError("this is a base model: there is no adapter to switch off", _GIVE_ADAPTER)
        self.base = not self.base

    def beside(self) -> Chat:
        """The base model in a conversation of its own, with the same weights in memory."""
        return replace(self, base=True, history=[])

    def save(self, path: Path, over: bool = False) -> None:
        """Write the conversation as a row of messages that training reads. over: replace a file that is there."""
        row = {"messages": [{"role": m.role, "content": m.content} for m in self.messages()]}
        try:
            message_rows.parse(row)
        except RowProblem as e:
            raise DataError(f"this would be no row to train on: {e.reason}", "talk first, then save") from None
        if path.suffix.lower() in (".csv", ".tsv"):
            raise ConfigError(f"{path}: would be read as a table, but holds JSONL", "choose a name such as talk.jsonl")
        if path.exists() and not over:
            raise ConfigError(f"{path}: is there already, so nothing was saved", "choose another name, or delete it")
        files.write_text(path, json.dumps(row, ensure_ascii=False) + "\n")


def open_chat(
    path: Path | str | None = None,
    system: str | None = None,
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    checkpoint: int | None = None,
    sampling: Mapping[str, float | None] | None = None,
    with_adapter: bool = False,
) -> Chat:
    """Open a run, an adapter or a base model directory; or ``model`` with ``adapter`` (a stock PEFT directory too).

    system:       system prompt; None: the one of the run's training, if any.
    dtype:        "auto": fp32 on the CPU, so that greedy replies are reproducible; the device's own type elsewhere.
    checkpoint:   a step of the run's, in place of its finished adapter.
    sampling:     fields of ``Sampling`` that take the place of the run's own; None is not given.
    with_adapter: refuse a base model.

    What can be refused is, before weights are read. Raises UserError.
    """
    device = pick_device()
    kind = torch.float32 if dtype == "auto" and device.type == "cpu" else pick_dtype(dtype, device)
    given = sampling or {}
    if checkpoint is not None:
        if path is None or model is not None or adapter is not None:
            raise ConfigError("--checkpoint: is a step of a run's, not of --model and --adapter", "give the RUN alone")
        return _at_checkpoint(RunDir(Path(path)), checkpoint, system, kind, device, given)
    place = locate(path, model, adapter)
    if isinstance(place, Path):
        if with_adapter:
            must_be_directory(place)
            raise ConfigError(f"{place}: there is no adapter to compare with its base", _GIVE_ADAPTER)
        found = voice(place)
        _check_system(found, system)
        drawn = _sampling(None, given)
        return Chat(_generator(load_weights(place, kind, device), found), found, system, sampling=drawn)
    found = place.voice()
    system = place.system if system is None else system
    _check_system(found, system)
    drawn = _sampling(place.config, given)
    settings = place.config.model if place.config else ModelConfig.model_validate({"path": place.base})
    base = open_base(settings, kind, device, found.config)
    layers = adapters.apply(base, place.adapter, found.modules())
    return Chat(_generator(base, found), found, system, layers, place.config, sampling=drawn)


def _at_checkpoint(
    run: RunDir,
    step: int,
    system: str | None,
    kind: torch.dtype,
    device: torch.device,
    given: Mapping[str, float | None],
) -> Chat:
    there = checkpoints.steps(run.checkpoints)
    chosen = next((p for p in there if int(p.name.removeprefix("step-")) == step), None)
    if chosen is None:
        names = ", ".join(str(int(p.name.removeprefix("step-"))) for p in there)
        fix = f"its checkpoints are: {names}" if names else "leave --checkpoint out"
        raise ConfigError(f"{run.path}: has no checkpoint {step}", fix)
    try:
        saved = checkpoints.read(chosen)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise AdapterError(f"{chosen}: is damaged ({e})", "use another checkpoint") from None
    config = run.config()
    found = voice_of(config)
    system = (config.data.system or None) if system is None else system
    _check_system(found, system)
    drawn = _sampling(config, given)
    model = open_base(config.model, kind, device, found.config)
    targets = resolve(empty_model(found.config), config.lora.target_modules, found.modules())
    layers = attach(model, config.lora, targets, seed=0)
    checkpoints.restore_adapter(saved, layers)
    return Chat(_generator(model, found), found, system, layers, config, sampling=drawn)


def _check_system(found: Voice, system: str | None) -> None:
    """Raise UserError where the model would not take this system prompt; told from a prompt with it."""
    if system:
        check_text(system, "the system prompt", found.tokenizer, found.template)
        prompt_text(found.template, [Message("system", system), Message("user", "a")])


def _sampling(config: RunConfig | None, given: Mapping[str, float | None]) -> Sampling:
    own = Sampling.of(config.generation) if config else Sampling()
    return own.changed(**given)


def _generator(model: Any, found: Voice) -> Generator:
    return Generator(model, found.tokenizer, found.template, found.stop_ids)
