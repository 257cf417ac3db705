"""Proof on the user's own model and machine that the compiled layers compute what transformers' layers compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.batch import collate
from luthier.fused.model import FusedModel, Unsuitable
from luthier.kernels.segments import to_device
from luthier.lora import LoraLinear, frozen_dtype
from luthier.models.forward import loss_sum, segment_attention, short
from luthier.types import Example

# Of the loss, and of all gradients together (norm of the difference over the norm). In bf16 both sides round: 30 layers
# measured up to 0.013 and 0.10 apart there (fp32: 2e-6 and 1e-5); a fault in a kernel is of the order of 1.
_BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.3)}


def prove(compiled: FusedModel, model: Any, layers: Mapping[str, LoraLinear], examples: Sequence[Example]) -> None:
    """Loss and gradients of the beginnings of two rows, both ways. Raises Unsuitable where they differ."""
    rows = [short(examples[0]), short(examples[min(1, len(examples) - 1)])]
    batch = to_device(collate(rows, share=True), model.device)
    found = _taken(compiled.loss_sum(batch), layers)
    with segment_attention(model):
        expected = _taken(loss_sum(model, batch), layers)
    loss, gradient = _BOUNDS[frozen_dtype(model)]
    apart = abs(found[0] - expected[0]) / max(abs(expected[0]), 1e-30)
    if not apart <= loss:
        raise Unsuitable(f"on this machine they come to the loss {found[0]:.5g} where {expected[0]:.5g} is right")
    apart = float((found[1] - expected[1]).norm() / expected[1].norm().clamp_min(1e-30))
    if not apart <= gradient:
        raise Unsuitable(f"on this machine they come to gradients that are {apart:.2g} of their size away")


def _taken(loss: Tensor, layers: Mapping[str, LoraLinear]) -> tuple[float, Tensor]:
    """The loss, and its gradients as one vector."""
    parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    return float(loss.detach()), torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
