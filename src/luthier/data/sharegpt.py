"""ShareGPT rows: ``{"conversations": [{"from": "human" or "gpt", "value"}, ...]}``, optionally ``system``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.data.rows import Row, RowProblem, as_role, check_keys, close, mapping, text
from luthier.types import Message

KEYS = ("conversations", "system")
REQUIRED = ("conversations",)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}


def matches(row: Mapping[str, Any]) -> bool:
    return "conversations" in row


def parse(value: Mapping[str, Any]) -> Row:
    """Raises RowProblem where the row cannot be used."""
    row = Row([])
    check_keys(value, KEYS, REQUIRED, row)
    system = text(value.get("system"), "system", row)
    if system:
        row.messages.append(Message("system", system))
    turns = value["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowProblem("conversations must be a list with at least one message")
    for i, turn in enumerate(turns, 1):
        message = mapping(turn)
        names = ("from", "value") if "from" in message or "value" in message else ("role", "content")
        check_keys(message, names, names, row)
        said = message[names[0]]
        role = as_role(_ROLES.get(said, said) if isinstance(said, str) else said)
        content = text(message[names[1]], f"conversations[{i}].{names[1]}", row)
        if role == "system" and not content:
            continue
        row.messages.append(Message(role, content))
    return close(row)
