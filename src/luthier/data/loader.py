"""Stream conversations from data files, with a report on every row: kept + dropped = read holds at all times."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from luthier.data.formats import FORMATS, recognise
from luthier.data.keys import ParsedRow, RowProblem
from luthier.data.source import BadRow, expand, read_rows
from luthier.data.turns import keyed
from luthier.errors import DataError
from luthier.types import Conversation, Message, RowRef

Outcome = Literal["dropped", "changed", "refused"]
_TRAIN_OTHERS = ", or train the other rows: --set data.max_unrendered=1"
_DETAIL = re.compile(r"\(.*\)|\d+")  # of a reason that differs from row to row


@dataclass(frozen=True, slots=True)
class Problem:
    """One row and what happened to it. A ``refused`` row counts as dropped and keeps the run from starting."""

    source: RowRef
    reason: str
    outcome: Outcome
    fix: str = ""

    def as_dict(self) -> dict[str, object]:
        return {"file": self.source.file, "row": self.source.row, "reason": self.reason, "outcome": self.outcome}


@dataclass(slots=True)
class DataReport:
    """Row counts and problems of some data files. A row counts once, even if several things were changed in it.

    notes: remarks that changed no row, and the number of rows that each applies to. formats: the row format per file.
    unrendered: the rows that were dropped because the chat template cannot write them.
    """

    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    unrendered: list[Problem] = field(default_factory=list)
    _dropped: set[RowRef] = field(default_factory=set)
    _changed: set[RowRef] = field(default_factory=set)
    _texts: dict[str, str] = field(default_factory=dict)  # rows with the same reason share one string

    @property
    def dropped(self) -> int:
        return len(self._dropped)

    @property
    def kept(self) -> int:
        return self.read - self.dropped

    @property
    def changed(self) -> int:
        return len(self._changed - self._dropped)

    @property
    def refused(self) -> list[Problem]:
        return [p for p in self.problems if p.outcome == "refused"]

    def add(self, source: RowRef, reason: str, outcome: Outcome, fix: str = "") -> None:
        """Record a problem of one row. fix: what the user can type or change."""
        reason, fix = (self._texts.setdefault(text, text) for text in (reason, fix))
        self.problems.append(Problem(source, reason, outcome, fix))
        (self._changed if outcome == "changed" else self._dropped).add(source)

    def drop_unrendered(self, source: RowRef, reason: str, fix: str) -> None:
        """Record that a row was dropped because the chat template cannot write it."""
        self.add(source, reason, "dropped", fix)
        self.unrendered.append(self.problems[-1])

    def rows(self) -> dict[str, int]:
        """Return the counts as they appear in ``--json`` output and reports."""
        return {"read": self.read, "kept": self.kept, "dropped": self.dropped, "changed": self.changed}

    def counts(self) -> str:
        """Return the counts as text."""
        return f"{self.read} rows read, {self.kept} kept, {self.dropped} dropped, {self.changed} changed"

    def lines(self, limit: int = 8) -> list[str]:
        """Describe what became of the rows: problems counted by reason, dropped rows first, then the notes.

        Reasons are the same if they differ only in numbers and in parentheses; the first one is printed.
        limit: number of lines; one more line counts the others.
        """
        groups: dict[tuple[bool, str], list[Problem]] = {}
        for problem in self.problems:
            if problem.outcome == "changed" and problem.source in self._dropped:
                continue
            group = groups.setdefault((problem.outcome == "changed", _DETAIL.sub("", problem.reason)), [])
            if not group or group[-1].source != problem.source:
                group.append(problem)
        lines = []
        for (changed, _), group in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
            first = group[0]
            count = f"{len(group)} rows, first {first.source}" if len(group) > 1 else str(first.source)
            fix = f" (fix: {first.fix})" if first.fix and not changed else ""
            lines.append(f"{first.outcome} {count}: {first.reason}{fix}")
        for note, rows in self.notes.most_common():
            lines.append(f"note: {note} ({rows} row{'s' * (rows != 1)})")
        if len(lines) > limit:
            lines[limit:] = [f"... and {len(lines) - limit} more: luthier check --json lists every row"]
        return lines

    def as_dict(self) -> dict[str, object]:
        return {
            "rows": self.rows(),
            "problems": [p.as_dict() for p in self.problems],
            "notes": [{"note": note, "rows": n} for note, n in self.notes.items()],
            "formats": self.formats,
        }


class Loader:
    """The conversations of some files, read row by row in constant memory (16 bytes per distinct row with ``dedupe``).

    paths:  files, or patterns such as ``rows/*.jsonl``.
    fmt:    "auto", or the name in FORMATS of the format of all rows.
    system: system prompt for rows that have none.
    rename: ``{"old": "new"}`` for keys of rows.
    dedupe: drop rows that are identical to an earlier one.

    After the last row ``report`` and ``fingerprint`` are complete, and ``unused`` holds the keys of ``rename`` that no
    row had.
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
        """Read the files. Raises DataError for a file that cannot be read; bad rows are only recorded in ``report``."""
        files = [file for pattern in self.paths for file in expand(pattern)]
        distinct = {os.path.realpath(file): file for file in reversed(files)}
        if len(distinct) < len(files):
            self.report.notes["a file that is listed more than once is read once"] += len(files) - len(distinct)
        for path in reversed(distinct.values()):
            formats: Counter[str] = Counter()
            for source, value in read_rows(path):
                self.report.read += 1
                try:
                    conversation = self._parse(source, value, formats)
                except RowProblem as e:
                    self.report.add(source, e.reason, "refused" if e.refused else "dropped", e.fix)
                    continue
                self._digest.update(digest(conversation))
                yield conversation
            self.report.formats[str(path)] = "+".join(formats) or "unknown"
            if len(formats) > 1:
                counts = ", ".join(f"{name} {count}" for name, count in formats.items())
                self.report.notes[f"{path} mixes formats: {counts}"] += 1

    def fingerprint(self) -> str:
        """Return the hex SHA-256 over every conversation that was read, in order."""
        return self._digest.hexdigest()

    def _parse(self, source: RowRef, value: object, formats: Counter[str]) -> Conversation:
        """Return the conversation of a row, and count its format in ``formats``. Raises RowProblem."""
        if isinstance(value, BadRow):
            raise RowProblem(value.reason)
        fields = keyed(value)
        if self._rename:
            fields = self._renamed(fields)
        name = self._format or recognise(fields)
        if name is None:
            got = ", ".join(map(repr, list(fields)[:6])) or "none"
            raise RowProblem(
                f"has none of the keys instruction, output, messages or conversations (its keys: {got})",
                fix="name the keys of question and reply: --rename OLD=instruction --rename OLD=output",
            )
        row = FORMATS[name].parse(fields)
        formats[name] += 1
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

    def _renamed(self, row: Mapping[str, object]) -> dict[str, object]:
        if self.unused:
            self.unused.difference_update(row)
        names = [*row, *(new for old, new in self._rename.items() if old in row)]
        conflicts = [new for new in self._rename.values() if names.count(new) > 1]
        if conflicts:
            raise RowProblem(f"already has a key '{conflicts[0]}', so no other key can be renamed to it")
        return {self._rename.get(k, k): v for k, v in row.items()}

    def _conversation(self, row: ParsedRow, source: RowRef) -> Conversation:
        messages = tuple(row.messages)
        if self._system and messages[0].role != "system":
            messages = (Message("system", self._system), *messages)
        return Conversation(messages, source, row.tools)


def digest(conversation: Conversation) -> bytes:
    """Return the SHA-256 of a conversation's roles, texts and tools, independent of the file it was read from."""
    parts: list[bytes] = []
    for m in conversation.messages:
        texts = [m.role, m.content]
        if (m.role == "assistant" and not m.trained) or m.thought or m.tool_calls or m.name or m.call_id:
            texts.append(json.dumps(asdict(m), sort_keys=True))
        for part in texts:
            raw = part.encode("utf-8")
            parts += (len(raw).to_bytes(8, "little"), raw)
    if conversation.tools:
        parts.append(json.dumps(conversation.tools, sort_keys=True).encode())
    return hashlib.sha256(b"".join(parts)).digest()


def refuse(report: DataReport, max_unrendered: float) -> None:
    """Raise DataError if rows were refused, or no row can be used, or the chat template cannot write too many of them.

    It names the first row and counts the others. max_unrendered: as a fraction of all rows.
    """
    if report.refused:
        first = report.refused[0]
        more = sum(p.reason == first.reason for p in report.refused) - 1
        others = len(report.refused) - 1 - more
        tail = f" ({more} more rows)" if more else ""
        tail += f"; {others} rows with other problems" if others else ""
        raise DataError(f"{first.source}: {first.reason}{tail}", first.fix or "correct the rows")
    if len(report.unrendered) > max_unrendered * report.read:
        first = report.unrendered[0]
        count = len(report.unrendered)
        raise DataError(
            f"{first.source}: {first.reason}; the chat template cannot write {count} of {report.read} rows",
            (first.fix or "correct the rows") + (_TRAIN_OTHERS if report.kept else ""),
        )
    if report.kept == 0:
        why = "".join(f"; the first problem: {p.source}: {p.reason}" for p in report.problems[:1])
        fix = next((p.fix for p in report.problems[:1] if p.fix), "correct the rows; luthier check lists them")
        raise DataError(f"no row can be used ({report.read} read){why}", fix)
