"""Store encoded rows compactly in memory or in files: about 5 bytes per token, instead of one object per row.

train.ids         int32  [tokens]       token ids of all rows, concatenated
train.trained     uint8  [tokens]       the loss mask: 1 for tokens that are targets of the loss
train.ends        int64  [rows + 1]     position in the two above at which each row ends
train.supervised  int32  [rows]         number of targets of each row
train.shared      int32  [rows]         first tokens shared with the example before it; -1: that is of another row
train.sources     int64  [rows, 2]      number of the data file, and the row in it
"""

from __future__ import annotations

import os
import threading
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from luthier.types import Example, Ids, RowRef

_COLUMNS = ("ids", "trained", "ends", "supervised", "shared", "sources")
_BUFFERED_TOKENS = 1 << 20  # held in memory by a writer before it writes them
_Integer = TypeVar("_Integer", bound=np.integer)


@dataclass(slots=True)
class Columns:
    """Rows in memory, as arrays that grow. files: the number of each data file."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    trained: array[int] = field(default_factory=lambda: array("B"))
    ends: array[int] = field(default_factory=lambda: array("q", [0]))
    supervised: array[int] = field(default_factory=lambda: array("i"))
    shared: array[int] = field(default_factory=lambda: array("i"))
    sources: array[int] = field(default_factory=lambda: array("q"))
    files: dict[str, int] = field(default_factory=dict)

    def add(self, example: Example, lengths_only: bool = False) -> None:
        """Append a row. lengths_only: do not store its ids, loss mask and source."""
        self.ends.append(self.ends[-1] + len(example))
        self.supervised.append(example.supervised)
        self.shared.append(example.shared)
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


@dataclass(frozen=True, slots=True)
class _FileColumns:
    """Rows in files that a ``StoreWriter`` wrote."""

    ids: _ColumnFile[np.int32]
    trained: _ColumnFile[np.uint8]
    ends: NDArray[np.int64]
    supervised: NDArray[np.int32]
    shared: NDArray[np.int32]
    sources: NDArray[np.int64]
    files: dict[str, int]


class ExampleStore(Sequence[Example]):
    """A sequence of examples. keep: if false, store only lengths, for reports on data that is not trained on."""

    def __init__(self, examples: Iterable[Example] = (), keep: bool = True) -> None:
        self._keep = keep
        self._columns: Columns | _FileColumns = Columns()
        for example in examples:
            self.add(example)

    @classmethod
    def map(cls, folder: Path, name: str, files: Sequence[str]) -> ExampleStore:
        """Open the files of a ``StoreWriter``; each row is read from the disk when it is accessed.

        name, files: as in the writer.
        """
        store = cls()
        store._columns = _FileColumns(
            ids=_ColumnFile(folder / f"{name}.ids", np.int32),
            trained=_ColumnFile(folder / f"{name}.trained", np.uint8),
            ends=_mapped(folder / f"{name}.ends", np.int64),
            supervised=_mapped(folder / f"{name}.supervised", np.int32),
            shared=_mapped(folder / f"{name}.shared", np.int32),
            sources=_mapped(folder / f"{name}.sources", np.int64),
            files={file: i for i, file in enumerate(files)},
        )
        return store

    def add(self, example: Example) -> None:
        """Append an example to a store in memory."""
        assert isinstance(self._columns, Columns), "a store in files is read-only"
        self._columns.add(example, lengths_only=not self._keep)

    def __len__(self) -> int:
        return len(self._columns.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        assert self._keep, "only lengths were stored"
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
            int(c.shared[index]),
        )

    def stats(self) -> dict[str, float | int]:
        """Return token counts over whole rows, without shared prefixes subtracted."""
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
        """Return the number of tokens of each row."""
        lengths: list[int] = np.diff(self._columns.ends).tolist()
        return lengths

    def common(self, rows: int = 256) -> int:
        """Return the length of the prefix that the first ``rows`` rows share, usually that of the system prompt.

        0 if only lengths are stored.
        """
        if not self._keep or len(self) < 2:
            return 0
        first = self[0].ids[:-1]
        size = len(first)
        for example in self[1:rows]:
            size = common_prefix(first[:size], example.ids[:-1])
        return size

    def row_starts(self) -> Ids:
        """Return the index of the first example of each row of the data files, and the number of examples."""
        return _row_starts(np.asarray(self._columns.shared))

    def shared(self) -> list[int]:
        """Return the number of first tokens that each example shares with the one before it of the same row, or -1."""
        shared: list[int] = self._columns.shared.tolist()
        return shared

    def supervised(self) -> list[int]:
        """Return the number of supervised tokens of each row."""
        supervised: list[int] = self._columns.supervised.tolist()
        return supervised


def row_starts(examples: Sequence[Example]) -> Ids:
    """Return the index of the first example of each row of the data files, and the number of examples: [rows + 1]."""
    if isinstance(examples, ExampleStore):
        return examples.row_starts()
    return _row_starts(np.asarray([e.shared for e in examples]))


def _row_starts(shared: NDArray[np.int32] | NDArray[np.int64]) -> Ids:
    return np.append(np.flatnonzero(shared < 0), len(shared)).astype(np.int64)


def common_prefix(a: Ids, b: Ids) -> int:
    """Return the length of the longest common prefix of two rows of token ids."""
    size = min(len(a), len(b))
    differences = np.flatnonzero(a[:size] != b[:size])
    return int(differences[0]) if len(differences) else size


def _mapped(path: Path, dtype: type[_Integer]) -> NDArray[_Integer]:
    """Map a column file into memory. An empty file, which cannot be mapped, gives an empty array."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")


class _ColumnFile(Generic[_Integer]):
    """A column in a file, of which slices can be read.

    It is not memory-mapped, because the 64 KB around every row read would then count as memory of the process.
    """

    def __init__(self, path: Path, dtype: type[_Integer]) -> None:
        self._dtype = np.dtype(dtype)
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, part: slice) -> NDArray[_Integer]:
        size = self._dtype.itemsize
        with self._lock:
            os.lseek(self._file, int(part.start) * size, os.SEEK_SET)
            return np.frombuffer(os.read(self._file, int(part.stop - part.start) * size), self._dtype)


class CacheWriteError(Exception):
    """The reason why rows could not be written to the disk."""


class StoreWriter:
    """Writes examples to a folder as they arrive, in constant memory; ``ExampleStore.map`` reads them.

    name: the prefix of the file names. Raises CacheWriteError if the files cannot be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._column_files = {column: (folder / f"{name}.{column}").open("wb") for column in _COLUMNS}
        self._buffer = Columns()
        self._rows = self._tokens = 0  # written so far
        self._column_files["ends"].write(bytes(8))

    def __len__(self) -> int:
        return self._rows + self._buffer.rows

    @property
    def files(self) -> list[str]:
        """The data files that rows came from; the column ``sources`` counts them from 0."""
        return list(self._buffer.files)

    def add(self, example: Example) -> None:
        """Append an example, and write the buffered ones if they are many."""
        self._buffer.add(example)
        if self._buffer.tokens >= _BUFFERED_TOKENS:
            self._flush()

    def finish(self) -> None:
        """Write the buffered rows and close the files. Nothing can be added afterwards."""
        self._flush()
        self.close()

    def close(self) -> None:
        """Close the files without writing the buffered rows."""
        try:
            for file in self._column_files.values():
                file.close()
        except OSError as e:
            raise CacheWriteError(str(e)) from None

    def _flush(self) -> None:
        buffer = self._buffer
        columns = {
            "ids": buffer.ids,
            "trained": buffer.trained,
            "supervised": buffer.supervised,
            "shared": buffer.shared,
            "sources": buffer.sources,
            "ends": array("q", (np.asarray(buffer.ends[1:], np.int64) + self._tokens).tobytes()),
        }
        try:
            for column, values in columns.items():
                self._column_files[column].write(memoryview(values))
        except OSError as e:
            raise CacheWriteError(str(e)) from None
        self._rows += buffer.rows
        self._tokens += buffer.tokens
        self._buffer = Columns(files=buffer.files)
