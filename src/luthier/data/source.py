"""Files -> rows with their numbers. Knows JSON and JSONL; knows nothing of what a row means.

A file that starts with ``[`` is one JSON array; anything else is one JSON value a line. A line that is not JSON
is a row that is dropped with the reason, never an end to the reading.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.errors import DataError, nearest
from luthier.types import RowRef


class BadRow:
    """A row that could not be read, and why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def read_rows(path: Path) -> Iterator[tuple[RowRef, Any]]:
    """Yield ``(where, value)``; value is a ``BadRow`` where the text is not JSON. Raises DataError on the file."""
    text = _text(path)
    start = text.lstrip()[:1]
    if not start:
        raise DataError(f"{path}: is empty", "give a JSON array or JSONL file with instruction rows")
    if start == "[":
        yield from _array(path, text)
    elif start == "{":
        yield from _lines(path, text)
    else:
        raise DataError(
            f"{path}: is neither a JSON array nor JSONL (it starts with {text.lstrip()[:20]!r})",
            'give rows like {"instruction": ..., "input": ..., "output": ...}, as a JSON array or one a line',
        )


def _text(path: Path) -> str:
    if not path.is_file():
        folder = path.parent
        guess = nearest(path.name, (p.name for p in folder.iterdir())) if folder.is_dir() else None
        what = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {what}", f"did you mean {folder / guess}?" if guess else "give a JSON or JSONL file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 (byte {e.start})", f"save {path.name} as UTF-8") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})", "check the file's permissions") from None


def _array(path: Path, text: str) -> Iterator[tuple[RowRef, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{path}:{e.lineno}: is not JSON ({e.msg}, column {e.colno})", "correct that line") from None
    except RecursionError:
        raise DataError(f"{path}: is nested too deep", "give a flat list of rows") from None
    for i, value in enumerate(values, 1):
        yield RowRef(str(path), i), value


def _lines(path: Path, text: str) -> Iterator[tuple[RowRef, Any]]:
    lines = text.split("\n")
    rows = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not _is_json(rows[0][1]) and _is_json(text):
        yield RowRef(str(path), 1), json.loads(text)  # one object, printed over several lines
        return
    for n, line in rows:
        value: Any
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            value = BadRow(f"not JSON ({e.msg}, column {e.colno})")
        except RecursionError:
            value = BadRow("nested too deep")
        yield RowRef(str(path), n), value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
