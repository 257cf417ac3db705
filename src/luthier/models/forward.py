"""One forward pass over a flat batch: the loss of its supervised tokens, and nothing else of the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels import attention as _attention  # noqa: F401 - registers the attention functions
from luthier.kernels.reference import cross_entropy_sum
from luthier.kernels.segments import DeviceBatch


def supervised_logits(model: Any, batch: DeviceBatch) -> Tensor:
    """[N, V] logits at the supervised positions only; the head never sees the others."""
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.target_index,
        segments=batch.segments,
    )
    logits: Tensor = out.logits[0]
    return logits


def loss_sum(model: Any, batch: DeviceBatch) -> Tensor:
    """[] fp32: cross-entropy summed over the batch's supervised tokens (the caller divides by the step's count)."""
    return cross_entropy_sum(supervised_logits(model, batch), batch.target_ids)


@torch.no_grad()
def token_losses(model: Any, batch: DeviceBatch) -> Tensor:
    """[N] fp32: cross-entropy of each supervised token."""
    return F.cross_entropy(supervised_logits(model, batch).float(), batch.target_ids, reduction="none")


@contextmanager
def segment_attention(model: Any, name: str = "auto") -> Iterator[None]:
    """Within the block the model attends by segments (``kernels.attention``); afterwards as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(f"luthier_{name}")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def checkpointing(model: Any, enabled: bool) -> Iterator[None]:
    """Within the block decoder layers keep their input only and are recomputed in the backward pass."""
    if not enabled:
        yield
        return
    new = hasattr(model, "activation_checkpointing_enable")  # its name before transformers 5.2x: gradient_...
    getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
    model.disable_input_require_grads()  # without re-entrance nothing below the first adapter needs a gradient
    try:
        yield
    finally:
        getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_disable")()
