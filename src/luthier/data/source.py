"""Read the rows of JSON, JSONL, CSV, TSV and Parquet files one at a time, with their row numbers.

The file type is detected from the content; ``.csv`` and ``.tsv`` also mark a table. A row that cannot be read is
yielded as a ``BadRow`` with the reason, so that it is counted; a file that cannot be read as a whole raises DataError.
What the keys of a row mean is the concern of ``formats``.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from luthier._util.files import require_utf8
from luthier._util.installation import install_command
from luthier.data.text import check_file, encoding_of, lines, open_text, read_head
from luthier.errors import DataError, MissingPackageError
from luthier.types import RowRef

_BLOCK = 1 << 20
_WHOLE = 1 << 28  # bytes; a JSON object that spans several lines is read into memory up to this file size
_CELL = 1 << 27  # characters; the longest cell of a table
CONTAINERS = ("data", "rows", "train", "examples", "items", "instances", "records", "dataset")
ROW_KEYS = {
    "instruction",
    "output",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "preferred_output",
}
_TURN_KEYS = {"role", "from"}
_SEPARATOR = re.compile('\ufeff?"?sep=(.)"?[\r\n]*', re.IGNORECASE)  # the first line of Excel's CSV
Rows = Iterator[tuple[RowRef, object]]


class BadRow:
    """A row that could not be read, and why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def expand(pattern: Path) -> list[Path]:
    """Return the sorted files that match a pattern with ``*``, ``?`` or ``[``; return any other path itself.

    Raises DataError if no file matches, UserError if a name is not valid UTF-8.
    """
    text = str(pattern)
    if pattern.exists() or not any(c in text for c in "*?["):
        return [pattern]
    anchor = Path(pattern.anchor) if pattern.is_absolute() else Path()
    matches = sorted(require_utf8(p) for p in anchor.glob(str(pattern.relative_to(pattern.anchor))) if p.is_file())
    if not matches:
        raise DataError(f"{pattern}: no file matches", "correct the pattern")
    return matches


def read_rows(path: Path) -> Rows:
    """Yield the position and value of every row, a ``BadRow`` if it cannot be read. Raises DataError for the file."""
    check_file(path)
    if read_head(path, 4) == b"PAR1":
        yield from _parquet(path)
        return
    encoding = encoding_of(path)
    start = _first_character(path, encoding)
    if start == "[" and not _has_list_lines(path, encoding):
        yield from _ArrayReader(path, encoding).rows()
    elif start in "[{":
        yield from _objects(path, encoding)
    elif path.suffix.lower() in (".csv", ".tsv") or _has_header(path, encoding):
        yield from _csv(path, encoding)
    elif _has_object_lines(path, encoding):
        yield from _objects(path, encoding)
    else:
        with open_text(path, encoding) as f:
            start = f.read(40).strip().removeprefix("\ufeff")[:20]
        raise DataError(
            f"{path}: is neither JSON, JSONL, CSV, TSV nor Parquet (it starts with {start!r})",
            'write rows like {"instruction": ..., "input": ..., "output": ...}, as a JSON array or one per line',
        )


def _has_header(path: Path, encoding: str) -> bool:
    """Whether the first line is the header of a table; for tables without a table's file name."""
    with open_text(path, encoding) as f:
        line = f.readline(_BLOCK)
        if _SEPARATOR.fullmatch(line):
            return True
        cells = re.split("[\t,;|]", line)
    return len(cells) > 1 and not ROW_KEYS.isdisjoint(c.strip('\ufeff" \r\n') for c in cells)


def _has_object_lines(path: Path, encoding: str) -> bool:
    """Whether a JSON object starts on one of the first lines; then the lines before it are bad rows of a JSONL file."""
    return any(line.lstrip().startswith("{") for _, line in itertools.islice(lines(path, encoding), 20))


def _has_list_lines(path: Path, encoding: str) -> bool:
    """Whether the first lines are lists: rows that are conversations, one per line, not an array of rows."""
    with open_text(path, encoding) as f:
        first, second = f.readline(_BLOCK), f.read(64)
    if not first.endswith("\n") or not second.lstrip().startswith("["):
        return False
    turns = parse_json(first)
    return isinstance(turns, list) and all(isinstance(t, dict) and t.keys() & _TURN_KEYS for t in turns)


def _first_character(path: Path, encoding: str) -> str:
    with open_text(path, encoding) as f:
        while block := f.read(_BLOCK):
            if text := block.lstrip("\ufeff \t\r\n\0"):
                return text[0]
    raise DataError(f"{path}: is empty", "choose a file with instruction rows")


# --- one JSON object per line ---------------------------------------------------------------------------------------


def _objects(path: Path, encoding: str) -> Rows:
    """Read JSONL, or a single object on one or several lines that is a row or contains the list of rows.

    A line may also be a list: the messages of a conversation.
    """
    source = (pair for pair in lines(path, encoding) if pair[1].strip())
    number, first = next(source)
    value = parse_json(first)
    second = next(source, None)
    if isinstance(value, BadRow) and second is not None and path.stat().st_size <= _WHOLE:
        with open_text(path, encoding) as f:
            document = parse_json(f.read())
        if not isinstance(document, BadRow):
            yield from _contained(path, document)
            return
    if second is None and not isinstance(value, BadRow):
        yield from _contained(path, value, number)
        return
    name = str(path)
    yield RowRef(name, number), value
    while second is not None:
        yield RowRef(name, second[0]), parse_json(second[1])
        second = next(source, None)


def _contained(path: Path, value: object, number: int = 1) -> Rows:
    """Yield the rows inside ``{"data": [...]}`` and the like; any other object is one row."""
    if isinstance(value, dict) and not ROW_KEYS & value.keys():
        lists = [k for k, v in value.items() if isinstance(v, list) and any(isinstance(row, dict) for row in v)]
        if len(lists) > 1:
            raise DataError(
                f"{path}: contains several lists of rows: {', '.join(lists)}", "write each list to a file of its own"
            )
        for key in CONTAINERS:
            if isinstance(value.get(key), list):
                yield from ((RowRef(str(path), i), row) for i, row in enumerate(value[key], 1))
                return
    yield RowRef(str(path), number), value


def parse_json(line: str) -> object:
    """Decode a line; invalid JSON and duplicate keys give a BadRow."""
    try:
        return _DECODER.decode(line.strip("\ufeff \t\0"))
    except json.JSONDecodeError as e:
        return BadRow(f"not JSON ({e.msg}, column {e.colno})")
    except RecursionError:
        return BadRow("nested too deeply")
    except _DuplicateKeyError as e:
        return BadRow(str(e))
    except ValueError as e:  # a number with thousands of digits
        return BadRow(f"not JSON ({e})")


class _DuplicateKeyError(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [k for k, _ in pairs]
        raise _DuplicateKeyError(f"key '{next(k for k in names if names.count(k) > 1)}' occurs twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)
_LENIENT_DECODER = json.JSONDecoder()


# --- a JSON array ---------------------------------------------------------------------------------------------------


class _ArrayReader:
    """A reader of the elements of one JSON array, in constant memory.

    An element that the end of the file cuts off is a bad row. Any other invalid JSON refuses the file, because the
    start of the next row is unknown.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self._path = path
        self._encoding = encoding
        self._text = ""  # the part of the file in memory
        self._at = 0  # position in it
        self._ended = False
        self._newlines = 0  # in the parts that were dropped
        self._number = 0

    def rows(self) -> Rows:
        with open_text(self._path, self._encoding) as f:
            self._skip(f, "\ufeff \t\r\n\0")
            self._at += 1  # the bracket
            while True:
                self._skip(f, " \t\r\n,")  # surplus and trailing commas are not rows
                if self._at < len(self._text) and self._text[self._at] == "]":
                    self._at += 1
                    self._check_end(f)
                    return
                self._number += 1
                value: object = BadRow("cut off: the file ends before the array does")
                if self._at < len(self._text):
                    value = self._element(f)
                yield RowRef(str(self._path), self._number), value
                if isinstance(value, BadRow) and self._ended and self._at >= len(self._text):
                    return

    def _check_end(self, f: IO[str]) -> None:
        """Raise DataError if the file continues after the array, since those rows would be lost silently."""
        self._skip(f, " \t\r\n\0")
        if self._at < len(self._text):
            line = self._newlines + self._text.count("\n", 0, self._at) + 1
            raise DataError(
                f"{self._path}:{line}: continues after the end of the array ({self._text[self._at :][:20]!r})",
                "write one array, or one object per line",
            )

    def _skip(self, f: IO[str], characters: str) -> None:
        while True:
            while self._at < len(self._text) and self._text[self._at] in characters:
                self._at += 1
            if self._at < len(self._text) or not self._read_more(f):
                return

    def _read_more(self, f: IO[str]) -> bool:
        """Drop the text that was consumed and read the next block; return whether the file had one.

        Blocks grow with the remaining text, so that the time for a long row stays proportional to its length.
        """
        self._newlines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        block = f.read(max(_BLOCK, len(self._text)))
        self._ended = not block
        self._text += block
        return bool(block)

    def _element(self, f: IO[str]) -> object:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except _DuplicateKeyError as e:
                self._at = _LENIENT_DECODER.raw_decode(self._text, self._at)[1]
                return BadRow(str(e))
            except json.JSONDecodeError as e:
                cut = e.pos >= len(self._text) - 8 or e.msg.startswith("Unterminated string")
                if cut and self._read_more(f):
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
                raise DataError(f"{self._path}: is nested too deeply", "write a flat list of rows") from None
            except ValueError as e:
                raise DataError(f"{self._path}: is not JSON ({e})", "correct the file") from None
            if end == len(self._text) and self._read_more(f):
                continue  # a number may continue in the next block
            self._at = end
            return value


# --- tables ---------------------------------------------------------------------------------------------------------


def _csv(path: Path, encoding: str) -> Rows:
    """Read a header line, then records. A line such as ``sep=;`` before the header names the delimiter."""
    csv.field_size_limit(_CELL)
    with open_text(path, encoding) as f:
        first_line = f.readline()
        f.seek(0)
        separator = _SEPARATOR.fullmatch(first_line)
        delimiter = separator[1] if separator else max("\t,;|", key=first_line.count)
        reader = csv.reader(f, delimiter=delimiter, strict=True)
        try:
            if separator:
                next(reader)
            header = [name.strip().removeprefix("\ufeff") for name in next(reader)]
        except (StopIteration, csv.Error):
            raise DataError(f"{path}: has no header line", "write the column names in the first line") from None
        if len(set(header)) != len(header):
            raise DataError(f"{path}: has two columns of the same name", "give every column a different name")
        for number, cells in enumerate(_records(path, reader), 1):
            value: object = cells
            if not isinstance(cells, BadRow):
                value = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    value = BadRow(f"has {len(cells)} cells, the header has {len(header)}")
            yield RowRef(str(path), number), value


class _CsvReader(Protocol):
    """The part of ``csv.reader`` that is used here."""

    line_num: int

    def __next__(self) -> list[str]: ...


def _records(path: Path, reader: _CsvReader) -> Iterator[list[str] | BadRow]:
    """Yield the records that are not blank. An invalid record is a bad row if it ends on its line.

    Raises DataError if a stray quote spans several lines, because it is unknown which of them were rows.
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
                    f"{path}:{line + 1}: a quote that opens here is not closed at the end of its cell ({e})",
                    f'close the quote in line {line + 1}; write a quote inside a quoted cell twice ("")',
                ) from None
            yield BadRow(f"not CSV ({e})")
            continue
        if len(cells) > 1 or "".join(cells).strip():
            yield cells


def _without_nulls(value: object) -> object:
    """Leave out the keys that an object has only because others in its column have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise MissingPackageError(
            f"{path}: reading Parquet needs the package pyarrow", install_command("parquet")
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield RowRef(str(path), number), {key: _without_nulls(content) for key, content in value.items()}
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DataError(
            f"{path}: is not a complete Parquet file ({' '.join(str(e).split())[:120]})", "copy it again"
        ) from None
