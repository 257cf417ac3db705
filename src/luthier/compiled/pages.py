"""Keep the keys and values of sequences in pages of equal size, under a limit in bytes; sequences may share pages.

    page table   row 0  [4, 1, 7]      pages of the first 32 tokens, the next 32, ...
                 row 1  [4, 2]         starts with the same 32 tokens as row 0

The memory of a page is used from its first token on and is then reused, not returned.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int


class OutOfPages(Exception):
    """The store has no free page; nothing was changed."""


@dataclass(slots=True, eq=False)
class Row:
    """The keys and values of one sequence. pages: their numbers. length: tokens in them."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class Pages:
    """A store of keys and values.

    page_bytes: of one page. size: tokens per page. count: number of pages; the store holds at least one.
    """

    def __init__(self, page_bytes: int, size: int, limit: int) -> None:
        self.page_bytes, self.size = page_bytes, size
        self.count = max(1, limit // page_bytes)
        self._memory = np.frombuffer(mmap.mmap(-1, self.count * page_bytes), np.uint8)
        self._users = [0] * self.count  # rows that hold each page
        self._free = list(range(self.count - 1, -1, -1))

    @property
    def address(self) -> int:
        return self._memory.ctypes.data

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Number of pages that this many tokens take."""
        return -(-tokens // self.size)

    def reserve(self, rows: Sequence[tuple[Row, int]]) -> None:
        """Make room for this many more tokens in each row. Raises OutOfPages."""
        missing = [self.pages_for(row.length + more) - len(row.pages) for row, more in rows]
        if sum(max(0, m) for m in missing) > len(self._free):
            raise OutOfPages
        for (row, _), count in zip(rows, missing, strict=True):
            row.pages += [self._take() for _ in range(count)]

    def fork(self, row: Row, length: int) -> Row:
        """Return a row with the first ``length`` tokens of another; a page that it fills only partly is copied.

        Raises OutOfPages.
        """
        whole, rest = divmod(length, self.size)
        if rest and not self._free:
            raise OutOfPages
        shared = row.pages[:whole]
        for page in shared:
            self._users[page] += 1
        own = [self._take()] if rest else []
        for page in own:
            self._page(page)[:] = self._page(row.pages[whole])
        return Row([*shared, *own], length)

    def release(self, row: Row) -> None:
        """Give up a row's pages; those that no other row holds are free again."""
        self.truncate(row, 0)

    def truncate(self, row: Row, length: int) -> None:
        """Reduce a row to its first ``length`` tokens."""
        count = self.pages_for(length)
        for page in row.pages[count:]:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
        row.pages, row.length = row.pages[:count], min(length, row.length)

    def table(self, rows: Sequence[Row]) -> Int[Tensor, "rows pages"]:
        """Return the page table of some rows; -1 past the end of a row."""
        widest = max(len(row.pages) for row in rows)
        return torch.tensor([row.pages + [-1] * (widest - len(row.pages)) for row in rows])

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _page(self, page: int) -> NDArray[np.uint8]:
        return self._memory[page * self.page_bytes : (page + 1) * self.page_bytes]


class PrefixPages:
    """Keys and values of earlier sequences, so that a new one with the same start need not compute them again.

    Least recently used entries are dropped to stay within ``max_bytes``, or when a page is needed. Entries are shared
    only between sequences with the same ``owner``: what keys and values depend on besides the tokens.
    """

    def __init__(self, pages: Pages, max_bytes: int) -> None:
        self.pages, self.max_bytes = pages, max_bytes
        self._entries: OrderedDict[tuple[Hashable, tuple[int, ...]], Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of the entries' pages; one that two entries share counts once."""
        return len({p for row in self._entries.values() for p in row.pages}) * self.pages.page_bytes

    def fork(self, owner: Hashable, ids: Sequence[int]) -> Row:
        """Return a row with the longest start of ``ids`` that is known, which may be empty."""
        lengths = {key: shared_length(key[1], ids) for key in self._entries if key[0] == owner}
        best = max(lengths, key=lengths.__getitem__, default=None)
        if best is None or not lengths[best]:
            return Row()
        self._entries.move_to_end(best)
        entry, length = self._entries[best], lengths[best]
        while length % self.pages.size and not self.pages.free and len(self._entries) > 1:
            self.drop_oldest()  # not ``entry``, which is now the latest
        if not self.pages.free:  # share whole pages only
            length -= length % self.pages.size
        return self.pages.fork(entry, length)

    def add(self, owner: Hashable, ids: Sequence[int], row: Row) -> None:
        """Take over a row with the keys and values of ``ids``; as much of its start as fits is kept."""
        most = self.max_bytes // self.pages.page_bytes * self.pages.size
        if len(ids) > most:
            self.pages.truncate(row, most)
        new = tuple(ids[:most])
        for entry in [key for key in self._entries if key[0] == owner]:
            if entry[1][: len(new)] == new:
                self._entries.move_to_end(entry)
                self.pages.release(row)
                return
            if new[: len(entry[1])] == entry[1]:
                self.pages.release(self._entries.pop(entry))
        self._entries[owner, new] = row
        while self._entries and self.bytes > self.max_bytes:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Release the least recently used entry; returns false if there is none."""
        if not self._entries:
            return False
        self.pages.release(self._entries.popitem(last=False)[1])
        return True


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the start that two sequences share."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
