"""Files -> rows with their numbers, one at a time. Knows JSON, JSONL, CSV and Parquet; not what a row means.

The kind of a file is told from its content, a table also from its name (``.csv``, ``.tsv``). What cannot be read as a
row is yielded as a ``BadRow`` with the reason, so that it is counted; a file that makes no sense as a whole raises.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from luthier.data.text import check_file, encoding_of, lines, open_text, read_head
from luthier.errors import DataError, MissingPackageError
from luthier.types import RowRef

_BLOCK = 1 << 20
_WHOLE = 1 << 28  # a JSON object over several lines is read whole up to this size
_CELL = 1 << 27  # longest cell of a table
CONTAINERS = ("data", "rows", "train", "examples", "items", "instances", "records", "dataset")
ROW_KEYS = {"instruction", "output", "messages", "conversations", "prompt", "completion"}
Rows = Iterator[tuple[RowRef, Any]]


class BadRow:
    """A row that could not be read, and why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def expand(pattern: Path) -> list[Path]:
    """A path as it is; a pattern with ``*``, ``?`` or ``[`` as its matches, sorted."""
    text = str(pattern)
    if pattern.exists() or not any(c in text for c in "*?["):
        return [pattern]
    anchor = Path(pattern.anchor) if pattern.is_absolute() else Path()
    found = sorted(p for p in anchor.glob(str(pattern.relative_to(pattern.anchor))) if p.is_file())
    if not found:
        raise DataError(f"{pattern}: no file matches", "correct the pattern")
    return found


def read_rows(path: Path) -> Rows:
    """Yield ``(where, value)``; value is a ``BadRow`` where a row could not be read. Raises DataError on the file."""
    check_file(path)
    if read_head(path, 4) == b"PAR1":
        yield from _parquet(path)
        return
    encoding = encoding_of(path)
    start = _first_character(path, encoding)
    if start == "[":
        yield from _Array(path, encoding).rows()
    elif start == "{":
        yield from _objects(path, encoding)
    elif path.suffix.lower() in (".csv", ".tsv") or _has_header(path, encoding):
        yield from _csv(path, encoding)
    elif _has_object_lines(path, encoding):
        yield from _objects(path, encoding)
    else:
        with open_text(path, encoding) as f:
            begin = f.read(40).strip().removeprefix("\ufeff")[:20]
        raise DataError(
            f"{path}: is neither JSON, JSONL, CSV nor Parquet (it starts with {begin!r})",
            'give rows like {"instruction": ..., "input": ..., "output": ...}, as a JSON array or one a line',
        )


def _has_header(path: Path, encoding: str) -> bool:
    """A table under another name."""
    with open_text(path, encoding) as f:
        cells = re.split("[\t,;]", f.readline(_BLOCK))
    return len(cells) > 1 and not ROW_KEYS.isdisjoint(c.strip('\ufeff" \r\n') for c in cells)


def _has_object_lines(path: Path, encoding: str) -> bool:
    """JSONL whose first lines are not JSON: bad rows, not another kind of file."""
    return any(line.lstrip().startswith("{") for _, line in itertools.islice(lines(path, encoding), 20))


def _first_character(path: Path, encoding: str) -> str:
    with open_text(path, encoding) as f:
        while block := f.read(_BLOCK):
            if text := block.lstrip("\ufeff \t\r\n\0"):
                return text[0]
    raise DataError(f"{path}: is empty", "give a file with instruction rows")


# --- one JSON object a line -----------------------------------------------------------------------------------------


def _objects(path: Path, encoding: str) -> Rows:
    """JSONL; or one object, over one line or many, that is a row or holds the rows."""
    source = (pair for pair in lines(path, encoding) if pair[1].strip())
    number, first = next(source)
    value = _parse(first)
    second = next(source, None)
    if isinstance(value, BadRow) and second is not None and path.stat().st_size <= _WHOLE:
        with open_text(path, encoding) as f:
            whole = _parse(f.read())
        if not isinstance(whole, BadRow):
            yield from _held(path, whole)
            return
    if second is None and not isinstance(value, BadRow):
        yield from _held(path, value, number)
        return
    name = str(path)
    yield RowRef(name, number), value
    while second is not None:
        yield RowRef(name, second[0]), _parse(second[1])
        second = next(source, None)


def _held(path: Path, value: Any, number: int = 1) -> Rows:
    """``{"data": [...]}`` and the like are their rows; any other object is one."""
    if isinstance(value, dict) and not ROW_KEYS & value.keys():
        lists = [k for k, v in value.items() if isinstance(v, list) and any(isinstance(row, dict) for row in v)]
        if len(lists) > 1:
            raise DataError(f"{path}: holds several lists of rows: {', '.join(lists)}", "give each a file of its own")
        for key in CONTAINERS:
            if isinstance(value.get(key), list):
                yield from ((RowRef(str(path), i), row) for i, row in enumerate(value[key], 1))
                return
    yield RowRef(str(path), number), value


def _parse(line: str) -> Any:
    """The value of a line; duplicate keys and what is not JSON are bad rows."""
    try:
        return _DECODER.decode(line.strip("\ufeff \t\0"))
    except json.JSONDecodeError as e:
        return BadRow(f"not JSON ({e.msg}, column {e.colno})")
    except RecursionError:
        return BadRow("nested too deep")
    except _DuplicateKeyError as e:
        return BadRow(str(e))
    except ValueError as e:  # a number of thousands of digits
        return BadRow(f"not JSON ({e})")


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [k for k, _ in pairs]
        raise _DuplicateKeyError(f"key '{next(k for k in names if names.count(k) > 1)}' is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


# --- a JSON array ---------------------------------------------------------------------------------------------------


class _Array:
    """The elements of one JSON array, in constant memory.

    An element cut off by the end of the file is a bad row; anything else that is not JSON refuses the file, since
    nothing says where the next row starts.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self._path = path
        self._encoding = encoding
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique)
        self._plain = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False
        self._newlines = 0
        self._number = 0

    def rows(self) -> Rows:
        with open_text(self._path, self._encoding) as f:
            self._skip(f, "\ufeff \t\r\n\0")
            self._at += 1  # the bracket
            while True:
                self._skip(f, " \t\r\n,")  # a comma too many, or at the end, is no row
                if self._at < len(self._text) and self._text[self._at] == "]":
                    self._at += 1
                    self._nothing_more(f)
                    return
                self._number += 1
                value: Any = BadRow("cut off: the file ends before the array does")
                if self._at < len(self._text):
                    value = self._element(f)
                yield RowRef(str(self._path), self._number), value
                if isinstance(value, BadRow) and self._ended and self._at >= len(self._text):
                    return

    def _nothing_more(self, f: IO[str]) -> None:
        """Rows after the end of the array would be lost silently."""
        self._skip(f, " \t\r\n\0")
        if self._at < len(self._text):
            line = self._newlines + self._text.count("\n", 0, self._at) + 1
            raise DataError(
                f"{self._path}:{line}: goes on after the end of the array ({self._text[self._at :][:20]!r})",
                "make it one array, or one object a line",
            )

    def _skip(self, f: IO[str], characters: str) -> None:
        while True:
            while self._at < len(self._text) and self._text[self._at] in characters:
                self._at += 1
            if self._at < len(self._text) or not self._more(f):
                return

    def _more(self, f: IO[str]) -> bool:
        """Drop what was read, read on; blocks grow with what is kept, so that a long row costs no more."""
        self._newlines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        block = f.read(max(_BLOCK, len(self._text)))
        self._ended = not block
        self._text += block
        return bool(block)

    def _element(self, f: IO[str]) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except _DuplicateKeyError as e:
                self._at = self._plain.raw_decode(self._text, self._at)[1]
                return BadRow(str(e))
            except json.JSONDecodeError as e:
                cut = e.pos >= len(self._text) - 8 or e.msg.startswith("Unterminated string")
                if cut and self._more(f):
                    continue
                if cut:
                    self._at = len(self._text)
                    return BadRow("cut off: the file ends in the middle of it")
                line = self._newlines + self._text.count("\n", 0, e.pos) + 1
                column = e.pos - self._text.rfind("\n", 0, e.pos)
                raise DataError(
                    f"{self._path}:{line}: is not JSON ({e.msg}, column {column})", f"correct line {line}"
                ) from None
            except RecursionError:
                raise DataError(f"{self._path}: is nested too deep", "give a flat list of rows") from None
            except ValueError as e:
                raise DataError(f"{self._path}: is not JSON ({e})", "correct the file") from None
            if end == len(self._text) and self._more(f):
                continue  # a number may go on
            self._at = end
            return value


# --- tables ---------------------------------------------------------------------------------------------------------


def _csv(path: Path, encoding: str) -> Rows:
    """A header line, then records; cells that are JSON lists (history, messages) are read as such."""
    csv.field_size_limit(_CELL)
    with open_text(path, encoding) as f:
        header_line = f.readline()
        f.seek(0)
        delimiter = max("\t,;", key=header_line.count)
        reader = csv.reader(f, delimiter=delimiter, strict=True)
        try:
            header = [name.strip().removeprefix("\ufeff") for name in next(reader)]
        except (StopIteration, csv.Error):
            raise DataError(f"{path}: has no header line", "write the column names in the first line") from None
        if len(set(header)) != len(header):
            raise DataError(f"{path}: names a column twice", "give every column a name of its own")
        for number, cells in enumerate(_records(path, reader), 1):
            value: Any = cells
            if not isinstance(cells, BadRow):
                value = {name: _cell(name, cell) for name, cell in zip(header, cells, strict=False)}
                if len(cells) != len(header):
                    value = BadRow(f"has {len(cells)} cells, the header has {len(header)}")
            yield RowRef(str(path), number), value


def _records(path: Path, reader: Any) -> Iterator[list[str] | BadRow]:
    """Records that are not blank; one that is not CSV is a bad row if it ends on its line.

    Raises DataError where a stray quote runs over lines, since nothing says which of them were rows.
    """
    while True:
        line = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            if reader.line_num > line + 1 or "unexpected end" in str(e):
                raise DataError(
                    f"{path}:{line + 1}: a quote opens here that is not closed where its cell ends ({e})",
                    f'close the quote in line {line + 1}; a quote inside a quoted cell is written twice ("")',
                ) from None
            yield BadRow(f"not CSV ({e})")
            continue
        if len(cells) > 1 or "".join(cells).strip():
            yield cells


def _cell(name: str, text: str) -> Any:
    if name in ("history", "messages", "conversations") and text.startswith("[") and text.endswith("]"):
        value = _parse(text)
        if isinstance(value, list):
            return value
    return text


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise MissingPackageError(
            f"{path}: reading Parquet needs the package pyarrow", "pip install 'luthier[parquet]'"
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield RowRef(str(path), number), value
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DataError(
            f"{path}: is not a whole Parquet file ({' '.join(str(e).split())[:120]})", "copy it again"
        ) from None
