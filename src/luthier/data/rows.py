"""What the row formats share: the outcome of reading one row, text values, and the shape of a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from luthier.errors import nearest
from luthier.types import Message, Role


class RowProblem(Exception):
    """This row cannot be used. ``refused``: the file is at fault, not the row, so the run must not start."""

    def __init__(self, reason: str, refused: bool = False, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.refused = refused
        self.fix = fix


@dataclass(slots=True)
class Row:
    """A row that was read: its messages, what was altered in it, and what was merely noticed."""

    messages: list[Message]
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def text(value: Any, name: str, row: Row) -> str:
    """A text value. Numbers and booleans become text (a change); null is empty; anything else drops the row."""
    if value is None:
        return ""
    found: str
    if isinstance(value, str):
        found = value
        if not value.isascii():
            _encodable(value, name)
        if "\0" in value:
            row.changes.append(f"NUL characters were removed from {name}")
            found = value.replace("\0", "")
        return found
    if isinstance(value, bool | int | float):
        row.changes.append(f"{name} was a {type(value).__name__}, made text")
        return str(value)
    raise RowProblem(f"{name} must be text, got {type(value).__name__}")


def check_keys(keys: Iterable[str], known: tuple[str, ...], required: tuple[str, ...], row: Row) -> None:
    """A missing key that is there under a misspelt name refuses the file; other unknown keys are noted."""
    notes = _verdict(tuple(keys), known, required)
    if isinstance(notes, RowProblem):
        raise RowProblem(notes.reason, notes.refused, notes.fix)
    row.notes += notes


@lru_cache(1024)
def _verdict(keys: tuple[str, ...], known: tuple[str, ...], required: tuple[str, ...]) -> tuple[str, ...] | RowProblem:
    """The notes on a row with such keys, or its problem: the same few keys come with every row."""
    unknown = [k for k in keys if k not in known]
    missing = [name for name in required if name not in keys]
    meant = {found: name for name in missing if (found := _nearest(name, unknown))}
    if meant:
        wrong, right = (", ".join(map(repr, names)) for names in (meant, meant.values()))
        return RowProblem(
            f"key {wrong} is unknown; did you mean {right}?",
            refused=True,
            fix="correct the rows, or pass " + " ".join(f"--rename {old}={new}" for old, new in meant.items()),
        )
    if missing:
        return RowProblem(f"has no key '{missing[0]}'")
    notes = []
    for key in unknown:
        guess = _nearest(str(key), [k for k in known if k not in keys])
        notes.append(f"key {key!r} is not used" + (f"; did you mean '{guess}'?" if guess else ""))
    return tuple(notes)


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return nearest(name, [str(k) for k in known], cutoff=0.75)


def as_role(name: Any) -> Role:
    """``system``, ``user`` or ``assistant``; any other role drops the row, with the nearest name."""
    if name in ("system", "user", "assistant"):
        return name  # type: ignore[no-any-return]
    guess = nearest(str(name), ("system", "user", "assistant"))
    raise RowProblem(f"role {name!r} is not system, user or assistant" + (f"; did you mean {guess}?" if guess else ""))


def close(row: Row) -> Row:
    """Check that system comes first, then user and assistant in turn; cut turns after the last reply."""
    turns = [m for i, m in enumerate(row.messages) if not (i == 0 and m.role == "system")]
    if not any(m.role == "assistant" for m in turns):
        raise RowProblem("has no reply by the assistant")
    while turns[-1].role != "assistant":
        turns.pop()
        row.messages.pop()
        if "turns after the last reply were cut" not in row.changes:
            row.changes.append("turns after the last reply were cut")
    for i, message in enumerate(turns):
        expected: Role = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            where = "the first turn" if i == 0 else f"turn {i + 1}"
            raise RowProblem(f"{where} is by {message.role}, expected {expected}")
        if not message.content.strip():
            raise RowProblem("a reply is empty" if expected == "assistant" else "a user's message is empty")
    return row


def mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RowProblem(f"must be an object with keys, got {type(value).__name__}")
    return value


def _encodable(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        reason = f"{name} holds bytes or half a surrogate pair that are not text"
        raise RowProblem(reason, fix="save the file as UTF-8") from None
