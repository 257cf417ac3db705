"""Keep the model's control tokens out of user-supplied text.

A row or chat message that contains ``<|im_end|>`` as text would end its turn early, or start a turn under another role.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from luthier.data.loader import DataReport
from luthier.errors import DataError
from luthier.types import ChatTokenizer, Conversation, Ids, Message, Template

Choice = Literal["refuse", "drop", "escape"]


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The control tokens of a model, and what to do with a row that contains one.

    choice: refuse the run, drop the row, or escape the token (a space after its first character makes it plain text).
    """

    pattern: re.Pattern[str]
    choice: Choice

    @classmethod
    def of(cls, tokens: Iterable[str], choice: Choice) -> ControlTokens | None:
        """Collect a tokenizer's control tokens, or return None if it has none."""
        texts = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
        return cls(re.compile("|".join(map(re.escape, texts))), choice) if texts else None

    def apply(self, conversation: Conversation, report: DataReport) -> Conversation | None:
        """Return the conversation, escaped if necessary, or None and a problem in ``report``."""
        matches = (self.pattern.search(m.content) for m in conversation.messages)
        match = next((m for m in matches if m), None)
        if match is None:
            return conversation
        token = match.group()
        if self.choice == "escape":
            report.add(conversation.source, f"control tokens such as {token} were escaped", "changed")
            return replace(conversation, messages=tuple(self._escaped(m) for m in conversation.messages))
        report.add(
            conversation.source,
            f"contains {token}, a control token of this model",
            "refused" if self.choice == "refuse" else "dropped",
            "--set data.control_tokens=drop skips such rows, =escape turns the token into plain text",
        )
        return None

    def check(self, text: str, what: str) -> None:
        """Raise DataError if a text that is sent to the model contains a control token."""
        match = self.pattern.search(text)
        if match:
            raise DataError(
                f"{what} contains {match.group()}, a control token of this model", "write it without the token"
            )

    def _escaped(self, message: Message) -> Message:
        text = message.content
        while self.pattern.search(text):  # escaping one token may reveal another
            text = self.pattern.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)
        return replace(message, content=text)


def check_text(text: str, what: str, tokenizer: ChatTokenizer, template: Template) -> None:
    """Raise DataError if a text is not valid Unicode, or contains one of the model's control tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{what} contains bytes that are not text", "type it in UTF-8") from None
    control = ControlTokens.of([*tokenizer.control_tokens, *template.markers], "refuse")
    if control:
        control.check(text, what)


OUTSIDE_FIX = "leave the token out, or use the checkpoint that the tokenizer belongs to"


def outside_table(ids: Sequence[int] | Ids, tokenizer: ChatTokenizer, rows: int | None) -> str | None:
    """Describe the first token that the model's embedding table has no row for; None if it has one for every token.

    Checkpoints may define more tokens than their table has rows, which is harmless until a text contains one.
    rows: of the table; None: not known.
    """
    if rows is None or int(np.max(ids, initial=0)) < rows:
        return None
    token = next(int(i) for i in ids if i >= rows)
    return f"{tokenizer.text_of(token)}, token {token} of the tokenizer; the model's embedding table has {rows} rows"
