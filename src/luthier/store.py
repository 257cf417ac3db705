"""Encoded rows, kept compactly: about 5 bytes a token in place of a Python object a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from luthier.types import Example, RowRef


class ExampleStore(Sequence[Example]):
    """Examples by number. ``keep`` false: lengths alone, for a look at the data that trains nothing."""

    def __init__(self, examples: Iterable[Example] = (), keep: bool = True) -> None:
        self._keep = keep
        self._ids = array("i")
        self._trained = array("B")
        self._ends = array("q", [0])
        self._supervised = array("i")
        self._files: dict[str, int] = {}
        self._sources = array("q")
        for example in examples:
            self.add(example)

    def add(self, example: Example) -> None:
        self._ends.append(self._ends[-1] + len(example))
        self._supervised.append(example.supervised)
        if self._keep:
            self._ids.frombytes(example.ids.astype(np.int32).tobytes())
            self._trained.frombytes(example.trained.astype(np.uint8).tobytes())
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
            RowRef(list(self._files)[file], row),
        )

    def stats(self) -> dict[str, float | int]:
        """Token counts, each row whole."""
        if not len(self):
            return {"total": 0, "supervised": 0}
        lengths = np.diff(np.array(self._ends))
        total, supervised = int(lengths.sum()), int(np.array(self._supervised).sum())
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
        return [int(n) for n in np.diff(np.array(self._ends))]

    def common(self, rows: int = 256) -> int:
        """How many first tokens the first rows have in common: the system prompt's. 0 where only lengths are kept."""
        if not self._keep or len(self) < 2:
            return 0
        first = self[0].ids[:-1]
        size = len(first)
        for example in self[1:rows]:
            ids = example.ids[: min(size, len(example) - 1)]
            differ = np.flatnonzero(ids != first[: len(ids)])
            size = int(differ[0]) if len(differ) else len(ids)
        return size

    def supervised(self) -> list[int]:
        """Supervised tokens of each row."""
        return list(self._supervised)
