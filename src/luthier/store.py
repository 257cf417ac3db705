"""Encoded rows, kept compactly: about 5 bytes a token, in memory or in files, in place of an object a row.

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
from pathlib import Path
from typing import Any, overload

import numpy as np

from luthier.packing import common_prefix
from luthier.types import Example, RowRef

_COLUMNS = {"ids": "i", "trained": "B", "ends": "q", "supervised": "i", "sources": "q"}
_TOKENS = 1 << 20  # held by a writer before it writes


class ExampleStore(Sequence[Example]):
    """Examples by number. ``keep`` false: lengths alone, for a look at the data that trains nothing."""

    def __init__(self, examples: Iterable[Example] = (), keep: bool = True) -> None:
        self._keep = keep
        self._ids: Any = array("i")
        self._trained: Any = array("B")
        self._ends: Any = array("q", [0])
        self._supervised: Any = array("i")
        self._sources: Any = array("q")
        self._files: dict[str, int] = {}
        for example in examples:
            self.add(example)

    @classmethod
    def map(cls, folder: Path, name: str, files: Sequence[str]) -> ExampleStore:
        """What a ``StoreWriter`` wrote; rows come from the disk when they are asked for. ``files``: its ``files``."""
        store = cls()
        for column, code in _COLUMNS.items():
            path = folder / f"{name}.{column}"
            found: Any = np.empty(0, code)
            if path.stat().st_size:
                found = _Read(path, code) if column in ("ids", "trained") else np.memmap(path, code, "r")
            setattr(store, f"_{column}", found)
        store._files = {file: i for i, file in enumerate(files)}
        return store

    def add(self, example: Example) -> None:
        supervised = example.supervised
        self._ends.append(self._ends[-1] + len(example))
        self._supervised.append(supervised)
        if self._keep:
            self._ids.frombytes(example.ids.astype(np.int32).tobytes())
            self._trained.frombytes(example.trained.tobytes())
            file = self._files.setdefault(example.source.file, len(self._files))
            self._sources.extend((file, example.source.row))

    def __len__(self) -> int:
        return len(self._ends) - 1

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
        part = slice(self._ends[index], self._ends[index + 1])
        file, row = self._sources[2 * index : 2 * index + 2]
        return Example(
            np.array(self._ids[part], dtype=np.int64),
            np.array(self._trained[part], dtype=np.bool_),
            RowRef(list(self._files)[file], int(row)),
        )

    def stats(self) -> dict[str, float | int]:
        """Token counts, each row whole."""
        if not len(self):
            return {"total": 0, "supervised": 0}
        lengths = np.diff(self._ends)
        total, supervised = int(lengths.sum()), int(np.asarray(self._supervised).sum())
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
        found: list[int] = np.diff(self._ends).tolist()
        return found

    def common(self, rows: int = 256) -> int:
        """How many first tokens the first rows have in common: the system prompt's. 0 where only lengths are kept."""
        if not self._keep or len(self) < 2:
            return 0
        first = self[0].ids[:-1]
        size = len(first)
        for example in self[1:rows]:
            size = common_prefix(first[:size], example.ids[:-1])
        return size

    def supervised(self) -> list[int]:
        """Supervised tokens of each row."""
        found: list[int] = self._supervised.tolist()
        return found


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

    name: what its files' names begin with. Raises NotKept where the disk does not take them.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._open = {column: (folder / f"{name}.{column}").open("wb") for column in _COLUMNS}
        self._held = ExampleStore()
        self._rows = self._tokens = 0
        self._open["ends"].write(bytes(8))

    def __len__(self) -> int:
        return self._rows + len(self._held)

    @property
    def files(self) -> list[str]:
        """The files that rows came from; ``train.sources`` counts them from 0."""
        return list(self._held._files)

    def add(self, example: Example) -> None:
        self._held.add(example)
        if self._held._ends[-1] >= _TOKENS:
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
        held, files = self._held, self._held._files
        ends = np.asarray(held._ends[1:], np.int64) + self._tokens
        columns = {"ids": held._ids, "trained": held._trained, "supervised": held._supervised, "sources": held._sources}
        try:
            for column, values in {**columns, "ends": ends}.items():
                self._open[column].write(memoryview(values))
        except OSError as e:
            raise NotKept(str(e)) from None
        self._rows += len(held)
        self._tokens += held._ends[-1]
        self._held = ExampleStore()
        self._held._files = files
