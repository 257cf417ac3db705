"""Memory that a training step uses again and again, so that no step waits for fresh pages or leaves holes behind.

Blocks are mapped straight from the system: what was asked for and never touched costs nothing, so each is asked for
with room to spare, and what is given up goes back whole.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_ALIGNED = 64  # bytes: a cache line
_SPARE = 1.5


def mapped(elements: int, dtype: torch.dtype) -> Tensor:
    """[elements] fresh memory, zero where it is read before it is written."""
    size = max(1, elements) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)


class Bump:
    """Tensors one after the other in one block; ``reset`` takes all of them back at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._block = mapped(0, dtype)
        self._used = self._reserved = 0

    @staticmethod
    def rounded(elements: int, dtype: torch.dtype) -> int:
        step = _ALIGNED // dtype.itemsize
        return -(-elements // step) * step

    def reserve(self, elements: int) -> None:
        """Take everything back, and have room for so many elements."""
        self._used, self._reserved = 0, elements
        if self._block.numel() < elements:
            self._block = mapped(0, self._dtype)  # the old one goes before the new one comes
            self._block = mapped(int(elements * _SPARE), self._dtype)

    def take(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        found = self._block[self._used : self._used + size]
        assert found.numel() == size, "more was taken than was reserved"
        self._used += self.rounded(size, self._dtype)
        return found.view(shape)

    def reset(self) -> None:
        self._used = 0

    @property
    def reserved(self) -> int:
        """Elements that were asked for last."""
        return self._reserved


class Arena:
    """streams: what every layer was given. layers: what else it keeps. Scratch lives until its name is asked for again.

    generation: counts the micro-batches; what an earlier one kept is gone.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.streams, self.layers = Bump(dtype), Bump(dtype)
        self._named: dict[str, Tensor] = {}
        self.generation = 0

    def begin(self, streams: int, layers: int) -> None:
        """A new micro-batch that keeps so many elements of each kind."""
        self.streams.reserve(streams)
        self.layers.reserve(layers)
        self.generation += 1

    def bytes_held(self) -> int:
        """Of the latest micro-batch: what its layers keep, and the scratch that is held, without what was spared."""
        named = sum(t.numel() for t in self._named.values()) / _SPARE
        return int((self.streams.reserved + self.layers.reserved + named) * self.dtype.itemsize)

    def scratch(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._named or self._named[name].numel() < size:
            self._named.pop(name, None)
            self._named[name] = mapped(int(size * _SPARE), self.dtype)
        return self._named[name][:size].view(shape)
