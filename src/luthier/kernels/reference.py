"""The definitions: attention over segments and the loss at supervised positions.

Written to be read. Whatever is faster is elsewhere, and tested against these forward and backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels.segments import Segments


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention in which each segment of the stream sees itself only.

    query [1, H, T, D], key and value [1, K, T, D] with H a multiple of K -> [1, T, H, D]. Scores are softmaxed in fp32.
    """
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ k.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    t = torch.arange(query.shape[2], device=query.device)
    segment = torch.bucketize(t, torch.tensor(segments.offsets[1:], device=query.device), right=True)
    distance = t[:, None] - t[None, :]
    visible = (segment[:, None] == segment[None, :]) & (distance >= 0)
    if sliding_window is not None:
        visible &= distance < sliding_window
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1).to(query.dtype)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of ``-log softmax(logits)[target]``, in fp32. logits [N, V], targets [N] -> []."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")
