"""Compute the output head on a CPU in slices of the vocabulary that fit into the CPU's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.models.protocols import CausalLM

if TYPE_CHECKING:
    from jaxtyping import Float

SLICE = 1536  # rows of the weight; SmolLM2's 49152 x 576 with 8 inputs: 22 ms instead of 44 (fp32, one AVX2 core)
_MAX_ROWS = 64  # rows of the input; with more, a single product is as fast


class SlicedHead(nn.Module):
    """Computes what ``base`` computes, one slice of the vocabulary at a time."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """x [..., in] -> [..., vocabulary]."""
        if not 1 < x.numel() // x.shape[-1] <= _MAX_ROWS:
            logits: Tensor = self.base(x)
            return logits
        biases = torch.split(self.base.bias, SLICE) if self.base.bias is not None else None
        weights = torch.split(self.base.weight, SLICE)
        x = x.contiguous()  # see ``with_contiguous_head``
        parts = [F.linear(x, w, biases[i] if biases else None) for i, w in enumerate(weights)]
        return torch.cat(parts, -1)


def slice_head(model: CausalLM) -> None:
    """Replace the output head with a ``SlicedHead`` if it is a plain linear layer on a CPU."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.device.type == "cpu":
        model.set_output_embeddings(SlicedHead(head))
