"""Record the outcome of every row. kept + dropped = read holds at all times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from luthier.types import RowRef

Outcome = Literal["dropped", "changed", "refused"]


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
    """

    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
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

    def rows(self) -> dict[str, int]:
        """Return the counts as they appear in ``--json`` output and reports."""
        return {"read": self.read, "kept": self.kept, "dropped": self.dropped, "changed": self.changed}

    def as_dict(self) -> dict[str, object]:
        return {
            "rows": self.rows(),
            "problems": [p.as_dict() for p in self.problems],
            "notes": [{"note": note, "rows": n} for note, n in self.notes.items()],
            "formats": self.formats,
        }
