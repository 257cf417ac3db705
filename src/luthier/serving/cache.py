"""Caches of keys and values: for the rows of the running batch, and for prompts whose prefix may be reused.

``BatchCache`` holds one buffer of keys and one of values per layer. Rows differ in length; each step writes one token
per row, at the end of that row:

    row 0  k k k k k n .      n: this step's token, at position lengths[row]
    row 1  k k n . . . .      .: empty, masked
    row 2  k k k k k k n
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from luthier.compiled.pages import shared_length

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    # keys and values of each layer
    Layers = list[tuple[Float[Tensor, "1 kv_heads tokens head_dim"], Float[Tensor, "1 kv_heads tokens head_dim"]]]

_CHUNK = 64  # buffers grow in multiples of this many tokens


class BatchCache(Cache):  # type: ignore[misc]
    """Keys and values of the running rows, in the form that transformers' forward passes write and read."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._at = (torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
        self._longest = 0

    def add(self, layers: Layers) -> None:
        """Append a row."""
        length, row = layers[0][0].shape[2], len(self.lengths)
        self._ensure(layers, row + 1, length + 1)
        for mine, part in ((self._keys, 0), (self._values, 1)):
            for buffer, layer in zip(mine, layers, strict=True):
                buffer[row, :, :length] = layer[part][0]
        self.lengths.append(length)

    def remove(self, row: int) -> None:
        """Remove a row; the last row moves to its index. Removing the only row frees the buffers."""
        last = len(self.lengths) - 1
        if last == 0:
            self._keys, self._values, self.lengths = [], [], []
            return
        length = self.lengths[last]
        for buffer in (*self._keys, *self._values):
            buffer[row, :, :length] = buffer[last, :, :length]
            buffer[last].zero_()  # masked values must be finite too
        self.lengths[row] = length
        self.lengths.pop()

    def layers_of(self, row: int) -> Layers:
        """Return a copy of a row's keys and values."""
        part = slice(0, self.lengths[row])
        return [
            (k[row : row + 1, :, part].clone(), v[row : row + 1, :, part].clone())
            for k, v in zip(self._keys, self._values, strict=True)
        ]

    def begin(self, device: torch.device) -> Int[Tensor, "rows 1"]:
        """Prepare a forward pass of one token per row; returns the positions [rows, 1]."""
        positions = torch.tensor(self.lengths, device=device)
        self._at = torch.arange(len(self.lengths), device=device), positions
        self._longest = max(self.lengths) + 1
        self._grow(len(self.lengths), self._longest)
        return positions[:, None]

    def end(self) -> None:
        """Count the new tokens, after the forward pass."""
        self.lengths = [n + 1 for n in self.lengths]

    def update(
        self,
        key: Float[Tensor, "rows kv_heads 1 head_dim"],
        value: Float[Tensor, "rows kv_heads 1 head_dim"],
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[Float[Tensor, "rows kv_heads tokens head_dim"], Float[Tensor, "rows kv_heads tokens head_dim"]]:
        """Store the new key and value [rows, heads, 1, dim]; returns those of all tokens so far."""
        rows, positions = self._at
        for buffer, new in ((self._keys[layer_idx], key), (self._values[layer_idx], value)):
            buffer[rows, :, positions] = new[:, :, 0]
        keys, values = (b[layer_idx][: len(rows), :, : self._longest] for b in (self._keys, self._values))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        return max(self.lengths, default=0)

    def _ensure(self, layers: Layers, rows: int, length: int) -> None:
        if not self._keys:
            self._keys = [k.new_zeros(1, k.shape[1], 0, k.shape[3]) for k, _ in layers]
            self._values = [v.new_zeros(1, v.shape[1], 0, v.shape[3]) for _, v in layers]
        self._grow(rows, length)

    def _grow(self, rows: int, length: int) -> None:
        """Make room for ``rows`` rows of ``length`` tokens; buffers grow by half, so that copies stay rare."""
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


def dynamic_cache(layers: Layers) -> DynamicCache:
    """Return a transformers cache that already holds these keys and values."""
    return DynamicCache(layers) if layers else DynamicCache()


def layers_in(cache: DynamicCache) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


class Prefixes:
    """Keys and values of earlier prompts, so that a new prompt with the same prefix need not compute it again.

    Least recently used entries are evicted to stay within ``max_bytes``. Entries are shared only between requests with
    the same ``owner``: what keys and values depend on besides the tokens, such as the adapter.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[tuple[Hashable, tuple[int, ...]], Layers] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, owner: Hashable, ids: Sequence[int]) -> Layers:
        """Return the keys and values of the longest prefix of ``ids`` in any entry, [] if there is none.

        The last token of ``ids`` is never included, since its logits must be computed.
        """
        length, best = 0, None
        for entry in self._entries:
            if entry[0] == owner and (n := shared_length(entry[1], ids)) > length:
                length, best = n, entry
        length = min(length, len(ids) - 1)
        if best is None or length == 0:
            return []
        self._entries.move_to_end(best)
        return [(k[:, :, :length], v[:, :, :length]) for k, v in self._entries[best]]

    def keep(self, owner: Hashable, ids: Sequence[int], layers: Layers) -> None:
        """Store a prompt's keys and values, unless an entry already covers it; drops entries that it covers."""
        new = tuple(ids)
        for entry in [e for e in self._entries if e[0] == owner]:
            if entry[1][: len(new)] == new:
                self._entries.move_to_end(entry)
                return
            if new[: len(entry[1])] == entry[1]:
                self.bytes -= _size(self._entries.pop(entry))
        if (size := _size(layers)) <= self.max_bytes:
            self._entries[owner, new] = layers
            self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= _size(self._entries.popitem(last=False)[1])


def _size(layers: Layers) -> int:
    return sum(t.numel() * t.element_size() for pair in layers for t in pair)
