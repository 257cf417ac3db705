"""A conversation with a model: its history, its system prompt, the adapter on or off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from luthier._util import files
from luthier.config import RunConfig
from luthier.data.formats import RowProblem, parse_messages
from luthier.errors import ConfigError, DataError
from luthier.inference.generation import Generator, Reply, Sampling
from luthier.lora.layers import LoraLinear, plain
from luthier.models.chat_format import ChatFormat
from luthier.types import Message

GIVE_ADAPTER = "give a run, or --model BASE --adapter DIR"


@dataclass(slots=True)
class Chat:
    """A conversation with a base model, or with a run's adapter as it was trained.

    layers: the adapter's layers by module name, empty for a base model. config: the run's, where there is one.
    sampling: how replies are drawn where ``send`` is given nothing else.
    base: the adapter is switched off, so that its base model answers.
    """

    generator: Generator
    system: str | None = None
    layers: dict[str, LoraLinear] = field(default_factory=dict)
    config: RunConfig | None = None
    history: list[Message] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    base: bool = False

    def send(self, text: str, sampling: Sampling | None = None, on_text: Callable[[str], None] | None = None) -> Reply:
        """Add a user's message and the model's reply to the conversation; returns the reply."""
        self.generator.chat_format.check_text(text, "the message")
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
        check_system(self.generator.chat_format, system)
        self.system = system
        self.reset()

    def toggle(self) -> None:
        """Switch the adapter off, or on again; the conversation goes on. Raises ConfigError where there is none."""
        if not self.layers:
            raise ConfigError("this is a base model: there is no adapter to switch off", GIVE_ADAPTER)
        self.base = not self.base

    def beside(self) -> Chat:
        """The base model in a conversation of its own, with the same weights in memory."""
        return replace(self, base=True, history=[])

    def save(self, path: Path, over: bool = False) -> None:
        """Write the conversation as a row of messages that training reads. over: replace a file that is there."""
        row = {"messages": [{"role": m.role, "content": m.content} for m in self.messages()]}
        try:
            parse_messages(row)
        except RowProblem as e:
            raise DataError(f"this would be no row to train on: {e.reason}", "talk first, then save") from None
        if path.suffix.lower() in (".csv", ".tsv"):
            raise ConfigError(f"{path}: would be read as a table, but holds JSONL", "choose a name such as talk.jsonl")
        if path.exists() and not over:
            raise ConfigError(f"{path}: is there already, so nothing was saved", "choose another name, or delete it")
        files.write_text(path, json.dumps(row, ensure_ascii=False) + "\n")


def check_system(chat_format: ChatFormat, system: str | None) -> None:
    """Raise UserError if the model would not accept this system prompt, seen from a prompt with it."""
    if system:
        chat_format.check_text(system, "the system prompt")
        chat_format.prompt_text([Message("system", system), Message("user", "a")])
