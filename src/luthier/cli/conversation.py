"""An interactive conversation: messages, and commands that start with ``/``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from luthier._util.files import user_path
from luthier.cli.common import fail, print_stderr
from luthier.errors import ConfigError, UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.inference.chat import Chat
    from luthier.inference.generation import Reply

HELP = {
    "/system": "show the system prompt; /system TEXT sets it and starts a new conversation, /system \"\" removes it",
    "/base": "switch the adapter off, so that the base model answers, or on again",
    "/save": "/save FILE writes the conversation as a row for luthier train --data",
    "/reset": "start a new conversation",
    "/help": "show this list; to send a message that starts with /, type // instead",
    "/quit": "end the program (Ctrl-D works too)",
}  # fmt: skip
_WITH_TEXT = ("/system", "/save")


class _Quit(Exception):
    """The user ended the conversation."""


@dataclass(slots=True)
class InteractiveChat:
    """Send messages to ``chat``, and to ``base`` too if both models are compared (see ``Chat.base_chat``)."""

    chat: Chat
    base: Chat | None = None
    saved: set[Path] = field(default_factory=set)

    def run(self) -> None:
        """Read and answer lines until the user ends the conversation."""
        typed = sys.stdin.isatty()  # not read from a file or another program
        if typed:
            print_stderr("Type a message; /help lists the commands, /quit or Ctrl-D ends.")
        while True:
            try:
                text = input(("base> " if self.chat.base else "> ") if typed else "").strip()
            except EOFError:
                if typed:
                    print()
                return
            try:
                self.process_line(text)
            except _Quit:
                return
            except UserError as e:
                fail(e)
            except KeyboardInterrupt:
                print()

    def process_line(self, text: str) -> None:
        """Run a command or send a message; an empty line does nothing. Raises UserError."""
        if command := re.match(r"(/[\w-]*)(?:\s+(.*)|$)", text, re.DOTALL):
            self._run(command[1].lower(), command[2] or "")
        elif text:
            ask(self.chat, text.removeprefix("/") if text.startswith("//") else text, self.base)

    def _run(self, name: str, rest: str) -> None:
        actions: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/base": self._base,
            "/save": self._save,
            "/reset": self._reset,
            "/help": self._help,
            "/quit": self._quit,
            "/exit": self._quit,
        }
        if name not in actions:
            guess = nearest(name, HELP, cutoff=0.4)
            raise ConfigError(
                f"{name} is not a command" + (f"; did you mean {guess}?" if guess else ""),
                "/help lists the commands; to send this as a message, type // instead of /",
            )
        if rest and name not in _WITH_TEXT:
            raise ConfigError(f"{name} accepts no text after it, got {rest!r}", f"type only {name}")
        actions[name](rest)

    def _system(self, text: str) -> None:
        if text:
            system = None if text in ('""', "''") else text
            for chat in self._chats():
                chat.set_system_prompt(system)
            self.saved.clear()
        current = self.chat.system
        shown = (
            f"system prompt: {current}" if current else "no system prompt, except the template's default if it has one"
        )
        print_stderr(f"({'a new conversation, ' if text else ''}{shown})")

    def _base(self, _: str) -> None:
        if self.base:
            raise ConfigError("both models answer here, so there is nothing to switch", "start without --compare")
        self.chat.toggle_adapter()
        print_stderr(f"(the {'base model' if self.chat.base else 'tuned model'} answers)")

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs a file name", "type /save talk.jsonl")
        path = user_path(name).absolute()
        overwrite = path in self.saved
        self.chat.save(path, over=overwrite)
        self.saved.add(path)
        side = ", the tuned model's replies" if self.base else ""
        print_stderr(
            f"({'saved, replacing the earlier save of this conversation' if overwrite else 'saved'}{side}: {path})"
        )

    def _reset(self, _: str) -> None:
        for chat in self._chats():
            chat.reset()
        self.saved.clear()
        print_stderr("(a new conversation)")

    def _help(self, _: str) -> None:
        for name, description in HELP.items():
            print_stderr(f"  {name:8} {description}")

    def _quit(self, _: str) -> None:
        raise _Quit

    def _chats(self) -> list[Chat]:
        return [self.chat, self.base] if self.base else [self.chat]


def ask(chat: Chat, text: str, base: Chat | None = None) -> None:
    """Print the reply while it is generated; two models in columns on a terminal, else one after the other."""
    from rich.console import Console

    if base is None:
        reply = chat.send(text, on_text=lambda part: print(part, end="", flush=True))
        print()
        _warn_if_cut(reply, "")
        return
    console = Console(highlight=False)
    if console.is_terminal:
        with console.status("both models are generating"):
            replies = ask_both(chat, base, text)
        _columns(console, *replies)
    else:
        replies = ask_both(chat, base, text)
        print(f"base:\n{replies[0].text}\n\ntuned:\n{replies[1].text}")
    for name, reply in zip(("base: ", "tuned: "), replies, strict=True):
        _warn_if_cut(reply, name)


def ask_both(chat: Chat, base: Chat, text: str) -> tuple[Reply, Reply]:
    """Return the replies of the base model and the tuned model; if either is interrupted, both histories stay."""
    turns = len(base.history)
    try:
        base_reply = base.send(text)
        return base_reply, chat.send(text)
    except BaseException:
        del base.history[turns:]
        raise


def _columns(console: Console, base: Reply, tuned: Reply) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for name in ("base", "tuned"):
        table.add_column(name, ratio=1)
    table.add_row(Text(base.text), Text(tuned.text))
    console.print(table)


def _warn_if_cut(reply: Reply, name: str) -> None:
    if not reply.stopped:
        print_stderr(f"({name}cut at {reply.reply_tokens} tokens; --max-new-tokens allows more)")
