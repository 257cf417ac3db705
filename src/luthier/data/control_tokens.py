"""Control tokens of the model inside people's text: never allowed to become real ones.

A row (or a chat message) that holds ``<|im_end|>`` as text would end a turn, or open one in another's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from luthier.data.report import DataReport
from luthier.errors import DataError
from luthier.types import ChatTokenizer, Conversation, Message, Template

Choice = Literal["refuse", "drop", "escape"]


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """``choice``: refuse the run, drop the row, or escape (a space after the first character makes it plain text)."""

    pattern: re.Pattern[str]
    choice: Choice

    @classmethod
    def of(cls, tokens: Iterable[str], choice: Choice) -> ControlTokens | None:
        """None for a tokenizer that has none."""
        texts = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
        return cls(re.compile("|".join(map(re.escape, texts))), choice) if texts else None

    def apply(self, conversation: Conversation, report: DataReport) -> Conversation | None:
        """The conversation, escaped where that is the choice; None where it is dropped or refused (and reported)."""
        found = next((hit for m in conversation.messages if (hit := self.pattern.search(m.content))), None)
        if found is None:
            return conversation
        token = found.group()
        if self.choice == "escape":
            report.add(conversation.source, f"control tokens such as {token} were escaped", "changed")
            return replace(conversation, messages=tuple(self._escaped(m) for m in conversation.messages))
        report.add(
            conversation.source,
            f"holds {token}, a control token of this model",
            "refused" if self.choice == "refuse" else "dropped",
            "--set data.control_tokens=drop leaves such rows out, =escape makes it plain text",
        )
        return None

    def check(self, text: str, what: str) -> None:
        """Raise DataError where a text that is sent to the model holds one."""
        found = self.pattern.search(text)
        if found:
            raise DataError(f"{what} holds {found.group()}, a control token of this model", "write it another way")

    def _escaped(self, message: Message) -> Message:
        text = message.content
        while self.pattern.search(text):
            text = self.pattern.sub(lambda hit: hit.group()[0] + " " + hit.group()[1:], text)
        return replace(message, content=text)


def check_text(text: str, what: str, tokenizer: ChatTokenizer, template: Template) -> None:
    """Raise DataError where a text is no text, or would be read as one of the model's control tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{what} holds bytes that are not text", "type it in UTF-8") from None
    control = ControlTokens.of([*tokenizer.control_tokens, *template.markers], "refuse")
    if control:
        control.check(text, what)
