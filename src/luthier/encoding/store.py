"""Encoded rows, kept compactly: about 5 bytes per token, in memory or in files, instead of one object per row.

train.ids         int32  [tokens]       token ids of all rows, one after another
train.trained     uint8  [tokens]       1 where the token is a target of the loss
train.ends        int64  [rows + 1]     where each row ends in the two above
train.supervised  int32  [rows]         targets of each row
train.sources     int64  [rows, 2]      number of the file it came from, and its row there
"""

from __future__ import annotations

import os
import threading
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from luthier.types import Example, Ids, RowRef

_COLUMNS = {"ids": "i", "trained": "B", "ends": "q", "supervised": "i", "sources": "q"}
_TOKENS = 1 << 20  # held by a writer before it writes


@dataclass(slots=True)
class Columns:
    """The columns of some rows: arrays that grow, or what was written to files. files: numbers of the data files."""

    ids: Any = field(default_factory=lambda: array("i"))
    trained: Any = field(default_factory=lambda: array("B"))
    ends: Any = field(default_factory=lambda: array("q", [0]))
    supervised: Any = field(default_factory=lambda: array("i"))
    sources: Any = field(default_factory=lambda: array("q"))
    files: dict[str, int] = field(default_factory=dict)

    def add(self, example: Example, lengths_only: bool = False) -> None:
        self.ends.append(self.ends[-1] + len(example))
        self.supervised.append(example.supervised)
        if lengths_only:
            return
        self.ids.frombytes(example.ids.astype(np.int32).tobytes())
        self.trained.frombytes(example.trained.tobytes())
        file = self.files.setdefault(example.source.file, len(self.files))
        self.sources.extend((file, example.source.row))

    @property
    def rows(self) -> int:
        return len(self.ends) - 1

    @property
    def tokens(self) -> int:
        return int(self.ends[-1])


class ExampleStore(Sequence[Example]):
    """Examples by number. ``keep`` false: only lengths are kept, for a look at the data that trains nothing."""

    def __init__(self, examples: Iterable[Example] = (), keep: bool = True) -> None:
        self._keep = keep
        self._columns = Columns()
        for example in examples:
            self.add(example)

    @classmethod
    def map(cls, folder: Path, name: str, files: Sequence[str]) -> ExampleStore:
        """Open what a ``StoreWriter`` wrote; rows are read from the disk when asked for. files: the writer's."""
        store = cls()
        store._columns = Columns(
            **{column: _open_column(folder / f"{name}.{column}", column) for column in _COLUMNS},
            files={file: i for i, file in enumerate(files)},
        )
        return store

    def add(self, example: Example) -> None:
        self._columns.add(example, lengths_only=not self._keep)

    def __len__(self) -> int:
        return self._columns.rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        assert self._keep, "only lengths were kept"
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        c = self._columns
        part = slice(c.ends[index], c.ends[index + 1])
        file, row = c.sources[2 * index : 2 * index + 2]
        return Example(
            np.array(c.ids[part], dtype=np.int64),
            np.array(c.trained[part], dtype=np.bool_),
            RowRef(list(c.files)[file], int(row)),
        )

    def stats(self) -> dict[str, float | int]:
        """Token counts, each row whole."""
        if not len(self):
            return {"total": 0, "supervised": 0}
        lengths = np.diff(self._columns.ends)
        total, supervised = int(lengths.sum()), int(np.asarray(self._columns.supervised).sum())
        return {
            "total": total,
            "supervised": supervised,
            "supervised_share": round(supervised / total, 4),
            "shortest": int(lengths.min()),
            "median": int(np.median(lengths)),
            "p99": int(np.quantile(lengths, 0.99)),
            "longest": int(lengths.max()),
        }

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths: list[int] = np.diff(self._columns.ends).tolist()
        return lengths

    def common(self, rows: int = 256) -> int:
        """Length of the prefix that the first rows share: the system prompt's. 0 if only lengths are kept."""
        if not self._keep or len(self) < 2:
            return 0
        first = self[0].ids[:-1]
        size = len(first)
        for example in self[1:rows]:
            size = common_prefix(first[:size], example.ids[:-1])
        return size

    def supervised(self) -> list[int]:
        """Supervised tokens of each row."""
        supervised: list[int] = self._columns.supervised.tolist()
        return supervised


def common_prefix(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix of two rows."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _open_column(path: Path, column: str) -> Any:
    code = _COLUMNS[column]
    if not path.stat().st_size:
        return np.empty(0, code)
    return _Read(path, code) if column in ("ids", "trained") else np.memmap(path, code, "r")


class _Read:
    """A column in a file: slices are read. Mapped, the 64 KB around every row would count as the process's memory."""

    def __init__(self, path: Path, code: str) -> None:
        self._type = np.dtype(code)
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, part: slice) -> Any:
        size = self._type.itemsize
        with self._lock:
            os.lseek(self._file, int(part.start) * size, os.SEEK_SET)
            return np.frombuffer(os.read(self._file, int(part.stop - part.start) * size), self._type)


class NotKept(Exception):
    """Rows could not be written to the disk, and why."""


class StoreWriter:
    """Examples written to a folder as they come, in constant memory; ``ExampleStore.map`` reads them.

    name: what its files' names begin with. Raises NotKept if they cannot be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._open = {column: (folder / f"{name}.{column}").open("wb") for column in _COLUMNS}
        self._held = Columns()
        self._rows = self._tokens = 0
        self._open["ends"].write(bytes(8))

    def __len__(self) -> int:
        return self._rows + self._held.rows

    @property
    def files(self) -> list[str]:
        """The files that rows came from; ``train.sources`` counts them from 0."""
        return list(self._held.files)

    def add(self, example: Example) -> None:
        self._held.add(example)
        if self._held.tokens >= _TOKENS:
            self._flush()

    def finish(self) -> None:
        """Write what is held; nothing is added after that."""
        self._flush()
        self.close()

    def close(self) -> None:
        """Close the files, whatever they hold."""
        try:
            for file in self._open.values():
                file.close()
        except OSError as e:
            raise NotKept(str(e)) from None

    def _flush(self) -> None:
        held = self._held
        ends = np.asarray(held.ends[1:], np.int64) + self._tokens
        columns = {"ids": held.ids, "trained": held.trained, "supervised": held.supervised, "sources": held.sources}
        try:
            for column, values in {**columns, "ends": ends}.items():
                self._open[column].write(memoryview(values))
        except OSError as e:
            raise NotKept(str(e)) from None
        self._rows += held.rows
        self._tokens += held.tokens
        self._held = Columns(files=held.files)
