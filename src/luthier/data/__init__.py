"""Rows -> conversations, as a stream. The format of each row is told from its keys, never registered.

``FORMATS`` is the list to extend: a module with ``matches(row)``, ``parse(row)``, ``KEYS`` and ``REQUIRED``.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.data import alpaca, messages, prompt_completion, sharegpt
from luthier.data.report import DataReport, Problem
from luthier.data.rows import Row, RowProblem, mapping
from luthier.data.source import BadRow, expand, read_rows
from luthier.errors import DataError, nearest
from luthier.types import Conversation, Message, RowRef

FORMATS: dict[str, ModuleType] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
}

_NAMES = {module: name for name, module in FORMATS.items()}

__all__ = ["FORMATS", "DataReport", "Dataset", "Loader", "Problem", "digest", "load", "refuse"]


class Loader:
    """Reads files once, row by row, in constant memory (but for ``dedupe``: 16 bytes a distinct row).

    fmt:    "auto", or a name in FORMATS for all rows.
    system: system prompt for rows that have none.
    rename: ``{"old": "new"}`` for keys of rows.
    dedupe: drop rows that are word for word an earlier one.

    ``report`` is complete when the stream is at its end; so are ``fingerprint`` and ``unused``, the keys of ``rename``
    that no row had.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        fmt: str = "auto",
        system: str = "",
        rename: Mapping[str, str] | None = None,
        dedupe: bool = False,
    ) -> None:
        self.paths = paths
        self.report = DataReport()
        self._module = FORMATS.get(fmt)
        self._system = system
        self._rename = dict(rename or {})
        self.unused = set(self._rename)
        self._first: dict[bytes, RowRef] | None = {} if dedupe else None
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Conversation]:
        """Raises DataError for a file that cannot be read; a bad row is in ``report`` instead."""
        files = [file for pattern in self.paths for file in expand(pattern)]
        distinct = {os.path.realpath(file): file for file in reversed(files)}
        if len(distinct) < len(files):
            self.report.notes["a file given more than once is read once"] += len(files) - len(distinct)
        for path in reversed(distinct.values()):
            seen: Counter[str] = Counter()
            for source, value in read_rows(path):
                self.report.read += 1
                try:
                    conversation = self._one(source, value, seen)
                except RowProblem as e:
                    self.report.add(source, e.reason, "refused" if e.refused else "dropped", e.fix)
                    continue
                self._digest.update(digest(conversation))
                yield conversation
            self.report.formats[str(path)] = "+".join(seen) or "unknown"
            if len(seen) > 1:
                self.report.notes[f"{path} mixes formats: {', '.join(f'{n} {c}' for n, c in seen.items())}"] += 1

    def fingerprint(self) -> str:
        """SHA-256 over every conversation that was read, in order."""
        return self._digest.hexdigest()

    def _one(self, source: RowRef, value: Any, seen: Counter[str]) -> Conversation:
        if isinstance(value, BadRow):
            raise RowProblem(value.reason)
        keyed = mapping(value)
        if self._rename:
            keyed = self._renamed(keyed)
        module = self._module or _sniff(keyed)
        if module is None:
            got = ", ".join(map(repr, list(keyed)[:6])) or "none"
            raise RowProblem(f"has none of the keys instruction, output, messages or conversations (its keys: {got})")
        row: Row = module.parse(keyed)
        seen[_NAMES[module]] += 1
        conversation = self._conversation(row, source)
        if self._first is not None:
            key = digest(conversation)[:16]
            earlier = self._first.setdefault(key, source)
            if earlier is not source:
                raise RowProblem(f"is the same as {earlier}")
        if row.notes:
            self.report.notes.update(set(row.notes))
        for change in row.changes:
            self.report.add(source, change, "changed")
        return conversation

    def _renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.unused:
            self.unused.difference_update(row)
        taken = [new for old, new in self._rename.items() if old in row and new in row]
        if taken:
            raise RowProblem(f"has a key '{taken[0]}' already, so no other can be renamed to it")
        return {self._rename.get(k, k): v for k, v in row.items()}

    def _conversation(self, row: Row, source: RowRef) -> Conversation:
        found = tuple(row.messages)
        if self._system and found[0].role != "system":
            found = (Message("system", self._system), *found)
        return Conversation(found, source)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A small data set read whole."""

    conversations: list[Conversation]
    report: DataReport


def load(paths: Sequence[Path], fmt: str = "auto", system: str = "") -> Dataset:
    """Read every row of every file into a list."""
    loader = Loader(paths, fmt, system)
    return Dataset(list(loader), loader.report)


def digest(conversation: Conversation) -> bytes:
    """SHA-256 of what a conversation says, wherever it was read."""
    parts: list[bytes] = []
    for m in conversation.messages:
        for part in (m.role, m.content):
            raw = part.encode("utf-8")
            parts += (len(raw).to_bytes(8, "little"), raw)
    return hashlib.sha256(b"".join(parts)).digest()


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
        fix = next((p.fix for p in report.problems[:1] if p.fix), "correct the rows; luthier check lists them")
        raise DataError(f"no row can be used ({report.read} read){why}", fix)


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
