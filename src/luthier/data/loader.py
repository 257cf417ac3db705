"""Files -> conversations, as a stream, with a report on every row."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.data.formats import FORMATS, Row, RowProblem, mapping, recognise
from luthier.data.report import DataReport
from luthier.data.source import BadRow, expand, read_rows
from luthier.errors import DataError
from luthier.types import Conversation, Message, RowRef


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
        self._format = fmt if fmt in FORMATS else None
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
        name = self._format or recognise(keyed)
        if name is None:
            got = ", ".join(map(repr, list(keyed)[:6])) or "none"
            raise RowProblem(f"has none of the keys instruction, output, messages or conversations (its keys: {got})")
        row = FORMATS[name].parse(keyed)
        seen[name] += 1
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
