"""Rows -> conversations. The format of each file is told from its rows, never registered.

``FORMATS`` is the list to extend: a module with ``matches(row)``, ``parse(row)``, ``KEYS`` and ``REQUIRED``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.data import alpaca, messages
from luthier.data.report import DataReport, Dataset, Problem
from luthier.data.rows import Row, RowProblem, mapping
from luthier.data.source import BadRow, read_rows
from luthier.errors import DataError, nearest
from luthier.types import Conversation, Message, RowRef

FORMATS: dict[str, ModuleType] = {"messages": messages, "alpaca": alpaca}

__all__ = ["FORMATS", "DataReport", "Dataset", "Problem", "load", "refuse"]


def load(paths: Sequence[Path], fmt: str = "auto", system: str = "") -> Dataset:
    """Read every row of every file.

    fmt:    "auto", or a name in FORMATS for all files.
    system: system prompt for rows that have none.
    Raises DataError for a file that cannot be read; a bad row is in the report instead.
    """
    report = DataReport()
    conversations: list[Conversation] = []
    for path in paths:
        module = FORMATS.get(fmt)
        for source, value in read_rows(path):
            report.read += 1
            if module is None and isinstance(value, Mapping):
                module = _sniff(value)
            try:
                row = _parse(value, module)
            except RowProblem as e:
                report.add(source, e.reason, "refused" if e.refused else "dropped", e.fix)
                continue
            report.notes.update(row.notes)
            for change in row.changes:
                report.add(source, change, "changed")
            conversations.append(_conversation(row, system, source))
        report.formats[str(path)] = next((n for n, m in FORMATS.items() if m is module), "unknown")
    return Dataset(conversations, report)


def refuse(report: DataReport) -> None:
    """Raise DataError where rows were refused or none is left; the message carries the first and the count."""
    if report.refused:
        first = report.refused[0]
        more = sum(p.reason == first.reason for p in report.refused) - 1
        others = len(report.refused) - 1 - more
        tail = f" ({more} more rows)" if more else ""
        tail += f"; {others} rows with other problems" if others else ""
        raise DataError(f"{first.source}: {first.reason}{tail}", first.fix or "correct the rows")
    if report.kept == 0:
        why = "".join(f"; the first: {p.source}: {p.reason}" for p in report.problems[:1])
        raise DataError(f"no row can be used ({report.read} read){why}", "correct the rows; luthier check lists them")


def _sniff(row: Mapping[str, Any]) -> ModuleType | None:
    for module in FORMATS.values():
        if module.matches(row):
            return module
    wanted = {key: module for module in FORMATS.values() for key in module.REQUIRED}
    for key in row:
        guess = nearest(str(key), wanted, cutoff=0.75)
        if guess:
            return wanted[guess]
    return None


def _parse(value: Any, module: ModuleType | None) -> Row:
    if isinstance(value, BadRow):
        raise RowProblem(value.reason)
    row = mapping(value)
    if module is None:
        got = ", ".join(map(repr, list(row)[:6])) or "none"
        raise RowProblem(f"has none of the keys instruction, output or messages (its keys: {got})")
    parsed: Row = module.parse(row)
    return parsed


def _conversation(row: Row, system: str, source: RowRef) -> Conversation:
    messages = tuple(row.messages)
    if system and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return Conversation(messages, source)
