"""Figures on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.batch import collate
from luthier.kernels.segments import to_device
from luthier.models.forward import segment_attention, token_losses
from luthier.types import Example

_ROWS = 8


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean negative log-likelihood of a supervised token (nats), and over how many."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def held_out_loss(model: Any, examples: Sequence[Example]) -> HeldOut:
    """Loss over every supervised token of ``examples``, whatever their order; leaves the model in eval mode."""
    model.eval()
    total, tokens = 0.0, 0
    ordered = sorted(examples, key=len)
    with segment_attention(model):
        for at in range(0, len(ordered), _ROWS):
            batch = collate(ordered[at : at + _ROWS])
            total += float(token_losses(model, to_device(batch, model.device)).double().sum())
            tokens += batch.supervised
    return HeldOut(total / tokens, tokens)
