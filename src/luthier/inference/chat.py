"""Hold a conversation with a model: history, system prompt, and the adapter switched on or off."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from luthier._util import files
from luthier.config import RunConfig
from luthier.data.formats import parse_messages
from luthier.data.keys import RowProblem
from luthier.errors import ConfigError, DataError
from luthier.inference.generation import Reply
from luthier.inference.sampling import Sampling
from luthier.lora.layers import LoraLinear
from luthier.models.chat_format import ChatFormat
from luthier.types import Message, as_dict

GIVE_ADAPTER = "give a run, or --model BASE --adapter DIR"


class ReplyGenerator(Protocol):
    """Generates replies in a chat format: ``inference.generation.Generator``, or another engine."""

    chat_format: ChatFormat

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        base: bool = False,
    ) -> Reply:
        """Generate one reply. on_text: called with each new piece of text. base: with the adapter switched off."""
        ...


@dataclass(slots=True)
class Chat:
    """A conversation with a base model, or with a base model and an adapter.

    tuned:    whether there is an adapter.
    layers:   its layers by module name, if the replies are luthier's own.
    config:   the configuration of the run that trained the adapter, if known.
    sampling: how replies are sampled, unless ``send`` is called with other settings.
    base:     true while the adapter is switched off, so that the base model answers.
    """

    generator: ReplyGenerator
    system: str | None = None
    tuned: bool = False
    layers: dict[str, LoraLinear] = field(default_factory=dict)
    config: RunConfig | None = None
    history: list[Message] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    base: bool = False

    def send(self, text: str, sampling: Sampling | None = None, on_text: Callable[[str], None] | None = None) -> Reply:
        """Send a user message, and add it and the reply to the conversation. Returns the reply.

        on_text: called with each new piece of the reply. If the reply fails, the history does not change.
        Raises UserError if the message contains a control token or the prompt is too long.
        """
        self.generator.chat_format.check_text(text, "the message")
        self.history.append(Message("user", text))
        try:
            reply = self.generator.reply(self.messages(), sampling or self.sampling, on_text, self.base)
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

    def set_system_prompt(self, system: str | None) -> None:
        """Start a new conversation with another system prompt, or with none.

        Raises UserError if the chat template does not accept it; the old conversation then continues.
        """
        check_system(self.generator.chat_format, system)
        self.system = system
        self.reset()

    def toggle_adapter(self) -> None:
        """Switch the adapter off or on again; the conversation continues. Raises ConfigError if there is none."""
        if not self.tuned:
            raise ConfigError("this is a base model: there is no adapter to switch off", GIVE_ADAPTER)
        self.base = not self.base

    def base_chat(self) -> Chat:
        """Return a separate, empty conversation with the base model that shares the weights in memory."""
        return replace(self, base=True, history=[])

    def save(self, path: Path, over: bool = False) -> None:
        """Write the conversation to ``path`` as one training row (JSONL). over: overwrite an existing file.

        Raises DataError if the conversation is not a valid row, ConfigError if ``path`` cannot be used.
        """
        path = files.user_path(path)
        row = {"messages": list(map(as_dict, self.messages()))}
        try:
            parse_messages(row)
        except RowProblem as e:
            raise DataError(
                f"this conversation is not a valid training row: {e.reason}", "send a message first, then save"
            ) from None
        if path.suffix.lower() in (".csv", ".tsv"):
            raise ConfigError(
                f"{path}: would be read as a table, but is saved as JSONL", "choose a name such as talk.jsonl"
            )
        if path.exists() and not over:
            raise ConfigError(f"{path}: already exists, so nothing was saved", "choose another name, or delete it")
        files.write_text(path, json.dumps(row, ensure_ascii=False) + "\n")


def check_system(chat_format: ChatFormat, system: str | None) -> None:
    """Render a short prompt with this system prompt; raises UserError if the chat template refuses it."""
    if system:
        chat_format.check_text(system, "the system prompt")
        chat_format.prompt_text([Message("system", system), Message("user", "a")])
