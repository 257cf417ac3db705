"""Instruction rows: ``{"instruction", "input", "output"}``, with optional ``system`` and ``history``.

``input``, where it is not empty, follows the instruction on a new line. ``history`` is a list of
``[question, answer]`` pairs that come before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.data.rows import Row, RowProblem, check_keys, close, text
from luthier.types import Message

KEYS = ("instruction", "input", "output", "system", "history")
REQUIRED = ("instruction", "output")


def matches(row: Mapping[str, Any]) -> bool:
    return any(k in row for k in ("instruction", "output"))


def parse(value: Mapping[str, Any]) -> Row:
    """Raises RowProblem where the row cannot be used."""
    row = Row([])
    check_keys(value, KEYS, REQUIRED, row)
    system = text(value.get("system"), "system", row)
    if system:
        row.messages.append(Message("system", system))
    for i, pair in enumerate(_pairs(value.get("history")), 1):
        row.messages.append(Message("user", text(pair[0], f"history[{i}] question", row)))
        row.messages.append(Message("assistant", text(pair[1], f"history[{i}] answer", row)))
    instruction = text(value["instruction"], "instruction", row)
    extra = text(value.get("input"), "input", row)
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    output = text(value["output"], "output", row)
    if not question.strip():
        raise RowProblem("instruction is empty")
    if not output.strip():
        raise RowProblem("output is empty")
    row.messages += [Message("user", question), Message("assistant", output)]
    return close(row)


def _pairs(history: Any) -> list[Any]:
    if history is None:
        return []
    ok = isinstance(history, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in history)
    if not ok:
        raise RowProblem("history must be a list of [question, answer] pairs")
    return list(history)
