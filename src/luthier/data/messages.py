"""Chat rows: ``{"messages": [{"role", "content"}, ...]}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.data.rows import Row, RowProblem, as_role, check_keys, close, mapping, text
from luthier.types import Message

KEYS = ("messages",)
REQUIRED = ("messages",)


def matches(row: Mapping[str, Any]) -> bool:
    return "messages" in row


def parse(value: Mapping[str, Any]) -> Row:
    """Raises RowProblem where the row cannot be used."""
    row = Row([])
    check_keys(value, KEYS, REQUIRED, row)
    turns = value["messages"]
    if not isinstance(turns, list) or not turns:
        raise RowProblem("messages must be a list with at least one message")
    for i, turn in enumerate(turns, 1):
        message = mapping(turn)
        check_keys(message, ("role", "content"), ("role", "content"), row)
        role = as_role(message["role"])
        content = text(_joined(message["content"]), f"messages[{i}].content", row)
        if role == "system" and not content:
            continue  # an empty system prompt is no system prompt
        row.messages.append(Message(role, content))
    return close(row)


def _joined(content: Any) -> Any:
    """``[{"type": "text", "text": ...}, ...]`` as one text; anything else as it is."""
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)
    ):
        return "".join(str(p.get("text", "")) for p in content)
    return content
