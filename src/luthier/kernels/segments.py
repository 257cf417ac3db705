"""A batch on a device: its stream, its targets, and where its segments begin. All index values come from the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from luthier.types import Batch


@dataclass(frozen=True, slots=True)
class Varlen:
    """What variable-length attention asks for: each segment's queries, and one after the other all keys that it sees.

    starts: [S + 1] int32, of queries and of keys. longest: the same. keys: [K] places in the stream; None: the stream.
    """

    starts: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    keys: Tensor | None


@dataclass(frozen=True)
class Segments:
    """Boundaries and parents of a flat stream (host integers), and the gathers to and from a padded row a segment."""

    offsets: tuple[int, ...]
    parents: tuple[int, ...]
    query_index: Tensor
    key_index: Tensor
    stream_index: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.offsets))

    def above(self, segment: int) -> tuple[int, ...]:
        """The segments that this one sees besides itself, from the top."""
        found: list[int] = []
        parent = self.parents[segment]
        while parent >= 0:
            found.append(parent)
            parent = self.parents[parent]
        return tuple(found[::-1])

    def before(self) -> tuple[int, ...]:
        """How many tokens of other segments each one sees."""
        sizes = self.lengths
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + sizes[parent] if parent >= 0 else 0)
        return tuple(found)

    @cached_property
    def varlen(self) -> Varlen:
        """Made once a batch, used by every layer."""
        device, own = self.query_index.device, self.lengths
        seen = [before + size for before, size in zip(self.before(), own, strict=True)]

        def starts(sizes: Sequence[int]) -> Tensor:
            return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)

        keys = None
        if any(parent >= 0 for parent in self.parents):
            rows = self.key_index.view(len(own), -1)
            keys = torch.cat([row[:size] for row, size in zip(rows, seen, strict=True)])
        return Varlen((starts(own), starts(seen)), (max(own), max(seen)), keys)


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """``Batch`` as tensors: input_ids and position_ids [1, T], target_index and target_ids [N]."""

    input_ids: Tensor
    position_ids: Tensor
    target_index: Tensor
    target_ids: Tensor
    segments: Segments


def to_device(batch: Batch, device: torch.device | str) -> DeviceBatch:
    def put(array: object) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return DeviceBatch(
        input_ids=put(batch.input_ids)[None],
        position_ids=put(batch.position_ids)[None],
        target_index=put(batch.target_index),
        target_ids=put(batch.target_ids),
        segments=Segments(
            batch.offsets, batch.parents, put(batch.query_index), put(batch.key_index), put(batch.stream_index)
        ),
    )
