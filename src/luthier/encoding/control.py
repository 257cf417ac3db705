"""Keep a model's control tokens out of the texts of rows and chat messages.

A text that contains ``<|im_end|>`` would end its turn early, or start a turn under another role.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from luthier.data.loader import DataReport
from luthier.errors import DataError
from luthier.types import ChatTokenizer, Conversation, Template, ToolCall, json_leaves

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
        matches = map(self.pattern.search, _texts(conversation))
        match = next((m for m in matches if m), None)
        if match is None:
            return conversation
        token = match.group()
        if self.choice == "escape":
            report.add(conversation.source, f"control tokens such as {token} were escaped", "changed")
            return _with_texts(conversation, self._escaped)
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

    def _escaped(self, text: str) -> str:
        while self.pattern.search(text):  # escaping one token may reveal another
            text = self.pattern.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)
        return text


def _texts(conversation: Conversation) -> Iterator[str]:
    """Yield every text of a conversation."""
    for m in conversation.messages:
        yield m.content
        if m.thought or m.name or m.call_id or m.tool_calls:
            yield from (m.thought, m.name, m.call_id)
            for call in m.tool_calls:
                yield from (call.name, call.id)
                yield from _strings(call.arguments)
    yield from _strings(conversation.tools)


def _strings(value: object) -> Iterator[str]:
    return (leaf for leaf in json_leaves(value) if isinstance(leaf, str))


def _with_texts(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """Return a conversation with ``change`` applied to every text, also to keys within tools and calls."""

    def changed(value: object) -> object:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return objects(value)
        return [changed(inner) for inner in value] if isinstance(value, list) else value

    def objects(value: Mapping[str, object]) -> dict[str, object]:
        return {change(key): changed(inner) for key, inner in value.items()}

    messages = []
    for m in conversation.messages:
        calls = tuple(ToolCall(change(c.name), objects(c.arguments), change(c.id)) for c in m.tool_calls)
        content, thought, name, call_id = map(change, (m.content, m.thought, m.name, m.call_id))
        messages.append(replace(m, content=content, thought=thought, name=name, call_id=call_id, tool_calls=calls))
    tools = tuple(map(objects, conversation.tools))
    return replace(conversation, messages=tuple(messages), tools=tools)


def check_text(text: str, what: str, tokenizer: ChatTokenizer, template: Template) -> None:
    """Raise DataError if a text is not valid Unicode, or contains one of the model's control tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{what} contains bytes that are not text", "type it in UTF-8") from None
    control = ControlTokens.of([*tokenizer.control_tokens, *template.markers], "refuse")
    if control:
        control.check(text, what)
