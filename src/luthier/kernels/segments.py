"""A batch on a device: its stream, its targets, and where its segments begin. All index values come from the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.types import Batch


@dataclass(frozen=True, slots=True)
class Segments:
    """Boundaries and parents of a flat stream (host integers), and the gathers to and from a padded row a segment."""

    offsets: tuple[int, ...]
    parents: tuple[int, ...]
    query_index: Tensor
    key_index: Tensor
    stream_index: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False))

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
