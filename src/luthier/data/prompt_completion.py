"""``{"prompt", "completion"}`` rows, optionally ``system``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.data.rows import Row, RowProblem, check_keys, close, text
from luthier.types import Message

KEYS = ("prompt", "completion", "system")
REQUIRED = ("prompt", "completion")


def matches(row: Mapping[str, Any]) -> bool:
    return "prompt" in row or "completion" in row


def parse(value: Mapping[str, Any]) -> Row:
    """Raises RowProblem where the row cannot be used."""
    row = Row([])
    check_keys(value, KEYS, REQUIRED, row)
    system = text(value.get("system"), "system", row)
    prompt = text(value["prompt"], "prompt", row)
    completion = text(value["completion"], "completion", row)
    if not prompt.strip():
        raise RowProblem("prompt is empty")
    if not completion.strip():
        raise RowProblem("completion is empty")
    opening = [Message("system", system)] if system else []
    row.messages += [*opening, Message("user", prompt), Message("assistant", completion)]
    return close(row)
