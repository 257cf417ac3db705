"""Put the system prompt at the start of the first user message, for models without a system role.

This is ``data.system_role: merge``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.types import Message, Span, Template, Tools


@dataclass(frozen=True, slots=True)
class SystemAsUser:
    """A template that merges the system message into the first user message, then renders with ``inner``.

    It is a template like any other, so training and chat cannot differ.
    """

    inner: Template

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def stop(self) -> tuple[str, ...]:
        return self.inner.stop

    @property
    def markers(self) -> tuple[str, ...]:
        return self.inner.markers

    @property
    def reply_prefix(self) -> str:
        return self.inner.reply_prefix

    def spans(self, messages: Sequence[Message], tools: Tools = ()) -> list[Span]:
        return self.inner.spans(_system_as_user(messages), tools)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        return self.inner.prompt(_system_as_user(messages), tools)

    def describe(self) -> dict[str, object]:
        return {**self.inner.describe(), "system_role": "merge"}


def _system_as_user(messages: Sequence[Message]) -> Sequence[Message]:
    if len(messages) < 2 or messages[0].role != "system":
        return messages
    system, *rest = messages
    first = next((i for i, m in enumerate(rest) if m.role == "user"), 0)  # the assistant may open the conversation
    rest[first] = replace(rest[first], content=f"{system.content}\n\n{rest[first].content}")
    return rest
