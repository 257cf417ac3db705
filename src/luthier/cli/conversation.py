"""A conversation typed by hand: messages, and commands that begin with ``/``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.common import fail, say
from luthier.errors import ConfigError, UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.inference.chat import Chat
    from luthier.inference.generation import Reply

HELP = {
    "/system": "shows the system prompt; /system TEXT sets it and starts anew, /system \"\" goes without one",
    "/base": "switches the adapter off, so that the base model answers, or on again",
    "/save": "/save FILE writes the conversation as a row that luthier train --data reads",
    "/reset": "starts anew",
    "/help": "shows this list; a message that begins with / is typed with //",
    "/quit": "ends (Ctrl-D too)",
}  # fmt: skip
_TAKES_TEXT = ("/system", "/save")


class _Ended(Exception):
    """The user wants no more."""


@dataclass(slots=True)
class Conversation:
    """What is typed goes to ``talk``; where ``beside`` is given (``Chat.beside``), to the base model too."""

    talk: Chat
    beside: Chat | None = None
    saved: set[Path] = field(default_factory=set)

    def run(self) -> None:
        """Ask and answer until the user ends it."""
        say("Type a message; /help lists the commands, /quit ends (Ctrl-D too).")
        while True:
            try:
                text = input("base> " if self.talk.base else "> ").strip()
            except EOFError:
                print()
                return
            try:
                self.take(text)
            except _Ended:
                return
            except UserError as e:
                fail(e)
            except KeyboardInterrupt:
                print()

    def take(self, text: str) -> None:
        """One line: a command, a message, or nothing. Raises UserError."""
        if command := re.match(r"(/[\w-]*)(?:\s+(.*)|$)", text, re.DOTALL):
            self._command(command[1].lower(), command[2] or "")
        elif text:
            ask(self.talk, text.removeprefix("/") if text.startswith("//") else text, self.beside)

    def _command(self, name: str, rest: str) -> None:
        does: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/base": self._base,
            "/save": self._save,
            "/reset": self._reset,
            "/help": self._help,
            "/quit": self._quit,
            "/exit": self._quit,
        }
        if name not in does:
            guess = nearest(name, HELP, cutoff=0.4)
            raise ConfigError(
                f"{name} is not a command" + (f"; did you mean {guess}?" if guess else ""),
                "/help lists them; to send it as a message, type / twice",
            )
        if rest and name not in _TAKES_TEXT:
            raise ConfigError(f"{name} takes nothing after it, got {rest!r}", f"type {name} alone")
        does[name](rest)

    def _system(self, text: str) -> None:
        if text:
            wanted = None if text in ('""', "''") else text
            for chat in self._chats():
                chat.instruct(wanted)
            self.saved.clear()
        system = self.talk.system
        shown = f"system prompt: {system}" if system else "no system prompt but the template's own, if it has one"
        say(f"({'a new conversation, ' if text else ''}{shown})")

    def _base(self, _: str) -> None:
        if self.beside:
            raise ConfigError("both models answer here, so there is nothing to switch", "start without --compare")
        self.talk.toggle()
        say(f"(the {'base model' if self.talk.base else 'tuned model'} answers)")

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file", "type /save talk.jsonl")
        path = Path(name).expanduser().absolute()
        again = path in self.saved
        self.talk.save(path, over=again)
        self.saved.add(path)
        which = ", the tuned model's side" if self.beside else ""
        say(f"({'saved again, over what this conversation saved there' if again else 'saved'}{which}: {path})")

    def _reset(self, _: str) -> None:
        for chat in self._chats():
            chat.reset()
        self.saved.clear()
        say("(a new conversation)")

    def _help(self, _: str) -> None:
        for name, does in HELP.items():
            say(f"  {name:8} {does}")

    def _quit(self, _: str) -> None:
        raise _Ended

    def _chats(self) -> list[Chat]:
        return [self.talk, self.beside] if self.beside else [self.talk]


def ask(talk: Chat, text: str, beside: Chat | None = None) -> None:
    """Print the reply as it is written; those of two models in columns on a terminal, one after the other elsewhere."""
    from rich.console import Console

    if beside is None:
        reply = talk.send(text, on_text=lambda part: print(part, end="", flush=True))
        print()
        _cut(reply, "")
        return
    console = Console(highlight=False)
    if console.is_terminal:
        with console.status("both models write"):
            replies = ask_both(talk, beside, text)
        _columns(console, *replies)
    else:
        replies = ask_both(talk, beside, text)
        print(f"base:\n{replies[0].text}\n\ntuned:\n{replies[1].text}")
    for name, reply in zip(("base: ", "tuned: "), replies, strict=True):
        _cut(reply, name)


def ask_both(talk: Chat, beside: Chat, text: str) -> tuple[Reply, Reply]:
    """The base model's reply and the tuned one's; where either is broken off, neither conversation has changed."""
    turns = len(beside.history)
    try:
        base = beside.send(text)
        return base, talk.send(text)
    except BaseException:
        del beside.history[turns:]
        raise


def _columns(console: Console, base: Reply, tuned: Reply) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for name in ("base", "tuned"):
        table.add_column(name, ratio=1)
    table.add_row(Text(base.text), Text(tuned.text))
    console.print(table)


def _cut(reply: Reply, name: str) -> None:
    if not reply.stopped:
        say(f"({name}cut at {reply.reply_tokens} tokens; --max-new-tokens allows more)")
