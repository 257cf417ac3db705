"""Keys and values: of the rows that run together, and of prompts that may come again.

``Rows`` keeps one buffer a layer. Rows have lengths of their own; a step writes each row's token at its own end:

    row 0  k k k k k n .      n: this step's token, at position lengths[row]
    row 1  k k n . . . .      .: not there yet, masked
    row 2  k k k k k k n
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [1, heads, tokens, dim]
_CHUNK = 64


class Rows(Cache):  # type: ignore[misc]
    """The running rows' keys and values, as transformers' forward passes write and read them."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._at = (torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
        self._longest = 0

    def add(self, layers: Layers) -> None:
        """A row more, at the end."""
        length, row = layers[0][0].shape[2], len(self.lengths)
        self._ensure(layers, row + 1, length + 1)
        for mine, part in ((self._keys, 0), (self._values, 1)):
            for buffer, layer in zip(mine, layers, strict=True):
                buffer[row, :, :length] = layer[part][0]
        self.lengths.append(length)

    def remove(self, row: int) -> None:
        """Take a row away; the last one moves to its place. Buffers go with the last row."""
        last = len(self.lengths) - 1
        if last == 0:
            self._keys, self._values, self.lengths = [], [], []
            return
        length = self.lengths[last]
        for buffer in (*self._keys, *self._values):
            buffer[row, :, :length] = buffer[last, :, :length]
            buffer[last].zero_()  # what is masked must be finite all the same
        self.lengths[row] = length
        self.lengths.pop()

    def layers_of(self, row: int) -> Layers:
        """A copy of a row."""
        part = slice(0, self.lengths[row])
        return [
            (k[row : row + 1, :, part].clone(), v[row : row + 1, :, part].clone())
            for k, v in zip(self._keys, self._values, strict=True)
        ]

    def begin(self, device: torch.device) -> Tensor:
        """Before a forward pass of one token a row; returns the positions [rows, 1]."""
        positions = torch.tensor(self.lengths, device=device)
        self._at = torch.arange(len(self.lengths), device=device), positions
        self._longest = max(self.lengths) + 1
        self._grow(len(self.lengths), self._longest)
        return positions[:, None]

    def end(self) -> None:
        """After it."""
        self.lengths = [n + 1 for n in self.lengths]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """key, value [rows, heads, 1, dim]. Returns those of all tokens so far."""
        rows, positions = self._at
        for buffer, new in ((self._keys[layer_idx], key), (self._values[layer_idx], value)):
            buffer[rows, :, positions] = new[:, :, 0]
        return tuple(b[layer_idx][: len(rows), :, : self._longest] for b in (self._keys, self._values))  # type: ignore[return-value]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        return max(self.lengths, default=0)

    def _ensure(self, layers: Layers, rows: int, length: int) -> None:
        if not self._keys:
            self._keys = [k.new_zeros(1, k.shape[1], 0, k.shape[3]) for k, _ in layers]
            self._values = [v.new_zeros(1, v.shape[1], 0, v.shape[3]) for _, v in layers]
        self._grow(rows, length)

    def _grow(self, rows: int, length: int) -> None:
        """Room for so many rows of so many tokens; half as much again, so that copies stay rare."""
        have_rows, _, have_length, _ = self._keys[0].shape
        if rows <= have_rows and length <= have_length:
            return
        if rows > have_rows:
            have_rows = max(rows, have_rows + have_rows // 2)
        if length > have_length:
            have_length = -(-max(length, have_length + have_length // 2) // _CHUNK) * _CHUNK
        for buffers in (self._keys, self._values):
            for i, old in enumerate(buffers):
                new = old.new_zeros(have_rows, old.shape[1], have_length, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                buffers[i] = new


def filled(layers: Layers) -> DynamicCache:
    """A cache that goes on after these tokens."""
    return DynamicCache(layers) if layers else DynamicCache()


def layers_in(cache: DynamicCache) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


class Prefixes:
    """The least recently used prompts' keys and values, to be gone on from where a new prompt begins alike.

    Keys depend on the adapter, so each has its own.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: OrderedDict[tuple[str | None, tuple[int, ...]], Layers] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, adapter: str | None, ids: Sequence[int]) -> Layers:
        """Of the tokens that some kept prompt has in common with the start of ``ids``, but the last of these."""
        best, found = 0, None
        for entry in self._kept:
            if entry[0] == adapter and (n := _common(entry[1], ids)) > best:
                best, found = n, entry
        best = min(best, len(ids) - 1)
        if found is None or best == 0:
            return []
        self._kept.move_to_end(found)
        return [(k[:, :, :best], v[:, :, :best]) for k, v in self._kept[found]]

    def keep(self, adapter: str | None, ids: Sequence[int], layers: Layers) -> None:
        """Unless a kept one goes further; shorter ones that this one holds go."""
        new = tuple(ids)
        for entry in [e for e in self._kept if e[0] == adapter]:
            if entry[1][: len(new)] == new:
                self._kept.move_to_end(entry)
                return
            if new[: len(entry[1])] == entry[1]:
                self.bytes -= _size(self._kept.pop(entry))
        if (size := _size(layers)) <= self.max_bytes:
            self._kept[adapter, new] = layers
            self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= _size(self._kept.popitem(last=False)[1])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _size(layers: Layers) -> int:
    return sum(t.numel() * t.element_size() for pair in layers for t in pair)
