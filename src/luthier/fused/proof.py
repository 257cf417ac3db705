"""Proof on the user's own model and machine that the compiled layers compute what transformers' layers compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.batch import collate
from luthier.fused.model import FusedModel, Unsuitable
from luthier.kernels import native
from luthier.kernels.segments import to_device
from luthier.lora import frozen_dtype
from luthier.models.forward import loss_sum, segment_attention, short
from luthier.types import Example

# Of the loss, and of the gradients together (norm of the difference over the norm). In bf16 both sides round: measured
# was 0.011 of the gradients, in fp32 7e-7; a fault in a kernel is of the order of 1.
_BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.1)}
_DEPTH = 2  # layers: all are computed by the same kernels, and a 7B model's in autograd would take gigabytes
_TELL = ": tell us, with what luthier doctor prints"


def prove(compiled: FusedModel, model: Any, examples: Sequence[Example]) -> None:
    """Loss and gradients of the beginnings of two rows through the first layers that train, both ways.

    Raises Unsuitable where they differ.
    """
    rows = [short(examples[0]), short(examples[min(1, len(examples) - 1)])]
    batch = to_device(collate(rows, share=True), model.device)
    with native.returning_memory(), segment_attention(model), _first_layers(compiled, model):
        found, ours = _taken(compiled.loss_sum(batch), compiled.parameters)
        expected, theirs = _taken(loss_sum(model, batch), compiled.parameters)
    loss_bound, gradient_bound = _BOUNDS[frozen_dtype(model)]
    if not abs(found - expected) <= loss_bound * abs(expected):
        raise Unsuitable(f"on this machine they come to the loss {found:.5g} where {expected:.5g} is right{_TELL}")
    apart = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not apart <= gradient_bound:
        raise Unsuitable(f"on this machine they come to gradients that are {apart:.2g} of their size away{_TELL}")


@contextmanager
def _first_layers(compiled: FusedModel, model: Any) -> Iterator[None]:
    """Within the block both are cut off after the first layers that train."""
    decoder, depth = model.get_decoder(), compiled.first + _DEPTH
    whole = decoder.layers, compiled.layers
    decoder.layers, compiled.layers = whole[0][:depth], whole[1][:depth]
    try:
        yield
    finally:
        decoder.layers, compiled.layers = whole


def _taken(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[float, Tensor]:
    """The loss, and its gradients as one vector; none of layers that were cut off."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(loss.detach()), torch.cat([g.reshape(-1) for g in found if g is not None])
