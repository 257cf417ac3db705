"""Proof on the user's own model and machine that the compiled layers compute what transformers' layers compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.batch import collate
from luthier.fused.model import FusedModel, Unsuitable
from luthier.kernels import native
from luthier.kernels.segments import to_device
from luthier.lora import LoraLinear, frozen_dtype
from luthier.models.forward import loss_sum, segment_attention, short
from luthier.types import Example

# Of the loss, and of the gradients together (norm of the difference over the norm). In bf16 both sides round: measured
# were up to 0.013 (30 layers) and 0.011 (two), in fp32 2e-6 and 7e-7; a fault in a kernel is of the order of 1.
_BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.1)}
_DEPTH = 2  # layers whose gradients are compared: all are computed by the same kernels


def prove(compiled: FusedModel, model: Any, layers: Mapping[str, LoraLinear], examples: Sequence[Example]) -> None:
    """The loss of the beginnings of two rows, and its gradients in the first layers, both ways.

    Raises Unsuitable where they differ.
    """
    rows = [short(examples[0]), short(examples[min(1, len(examples) - 1)])]
    batch = to_device(collate(rows, share=True), model.device)
    parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    loss_bound, gradient_bound = _BOUNDS[frozen_dtype(model)]
    with native.returning_memory(), segment_attention(model):
        with torch.no_grad():
            found, expected = float(compiled.loss_sum(batch)), float(loss_sum(model, batch))
        if not abs(found - expected) <= loss_bound * abs(expected):
            raise Unsuitable(f"on this machine they come to the loss {found:.5g} where {expected:.5g} is right")
        with _first_layers(compiled, model):
            ours, theirs = (_gradients(loss, parameters) for loss in (compiled.loss_sum(batch), loss_sum(model, batch)))
    apart = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not apart <= gradient_bound:
        raise Unsuitable(f"on this machine they come to gradients that are {apart:.2g} of their size away")


@contextmanager
def _first_layers(compiled: FusedModel, model: Any) -> Iterator[None]:
    """Within the block both are cut off after the first layers that train: autograd over all would take gigabytes."""
    decoder, depth = model.get_decoder(), compiled.first + _DEPTH
    whole = decoder.layers, compiled.layers
    decoder.layers, compiled.layers = whole[0][:depth], whole[1][:depth]
    try:
        yield
    finally:
        decoder.layers, compiled.layers = whole


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """[all of them]; none of layers that were cut off."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.reshape(-1) for g in found if g is not None])
