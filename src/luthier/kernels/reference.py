"""Define attention over segments in plain torch, written to be read.

Faster versions in other modules are tested against it, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.batching.collate import Segments

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def attention(
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "1 tokens heads head_dim"]:
    """Compute causal attention in which each segment of the stream sees itself and its ancestors.

    query [1, H, T, D], key and value [1, K, T, D] with H a multiple of K -> [1, T, H, D]. Scores are softmaxed in fp32.
    """
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ k.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    visible = torch.zeros(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
    for segment, own in enumerate(segments.lengths):
        seen = [*segments.ancestors(segment), segment]
        rows, columns = _positions(segments, [segment]), _positions(segments, seen)
        distance = torch.arange(len(columns) - own, len(columns))[:, None] - torch.arange(len(columns))[None]
        inside = distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)
        visible[rows[:, None], columns[None]] = inside.to(query.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, -1).to(query.dtype)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


def _positions(segments: Segments, which: Sequence[int]) -> Int[Tensor, " tokens"]:
    """Return the positions in the stream of these segments' tokens."""
    return torch.cat([torch.arange(segments.offsets[s], segments.offsets[s + 1]) for s in which])
