"""A batch on a device: its stream, its targets, and where its segments begin. All index values come from the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.types import Batch


@dataclass(frozen=True, slots=True)
class Segments:
    """Boundaries of a flat stream (host integers) and the gathers to and from one padded row a segment."""

    offsets: tuple[int, ...]
    longest: int
    pad_index: Tensor
    unpad_index: Tensor


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
        segments=Segments(batch.offsets, batch.longest, put(batch.pad_index), put(batch.unpad_index)),
    )
