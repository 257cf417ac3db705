"""Attention over segments, as transformers' ``AttentionInterface`` functions.

``luthier_padded``    one padded row a segment, batched matrix products, fp32 softmax: fastest on short rows
``luthier_looped``    torch's scaled_dot_product_attention, one call a segment: no [S, L, L] scores, for long rows
``luthier_auto``      padded up to AUTO_LONGEST tokens a segment, looped beyond
``luthier_reference`` the definition

They serve flat batches alone: ``models.forward.segment_attention`` puts a model's own attention back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.kernels import reference
from luthier.kernels.segments import Segments

AUTO_LONGEST = 512
Kernel = Callable[..., Tensor]


def padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As ``reference.attention``: [1, H, T, D] -> [1, T, H, D]; query heads of a group share one product."""
    _, heads, _, dim = query.shape
    kv = key.shape[1]
    groups, length, count = heads // kv, segments.longest, len(segments.offsets) - 1

    def rows(x: Tensor, per_kv: int) -> Tensor:  # [1, kv * per_kv, T, D] -> [count * kv, per_kv * length, D]
        gathered = x[0].transpose(0, 1).index_select(0, segments.pad_index)
        return gathered.view(count, length, kv, per_kv, dim).permute(0, 2, 3, 1, 4).reshape(count * kv, -1, dim)

    scores = torch.bmm(rows(query, groups), rows(key, 1).transpose(1, 2)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(count * kv, groups, length, length) + _causal(length, sliding_window, query.device)
    weights = torch.softmax(scores, -1).to(query.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    out = torch.bmm(weights.view(count * kv, groups * length, length), rows(value, 1))
    stream = out.view(count, kv, groups, length, dim).permute(0, 3, 1, 2, 4).reshape(count * length, heads, dim)
    return stream.index_select(0, segments.unpad_index)[None]


def looped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As ``reference.attention``, one fused call a segment. torch's fused function knows no soft cap."""
    if softcap is not None:
        return padded(query, key, value, segments, scaling, dropout, sliding_window, softcap)
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    for start, end in zip(segments.offsets, segments.offsets[1:], strict=False):
        windowed = sliding_window is not None and end - start > sliding_window
        mask = _causal(end - start, sliding_window, query.device).to(query.dtype) if windowed else None
        part = slice(start, end)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, part],
                k[:, :, part],
                v[:, :, part],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def auto(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *args: Any, **kwargs: Any) -> Tensor:
    kernel = padded if segments.longest <= AUTO_LONGEST else looped
    return kernel(query, key, value, segments, *args, **kwargs)


def _causal(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[length, length] fp32: 0 where visible, -inf elsewhere."""
    mask = torch.full((length, length), float("-inf"), device=device).triu(1)
    if sliding_window is not None and sliding_window < length:
        mask = mask + torch.full((length, length), float("-inf"), device=device).tril(-sliding_window)
    return mask


def _adapter(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        module: nn.Module,  # noqa: ARG001 - transformers' signature
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG001
        segments: Segments | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,  # noqa: ARG001
    ) -> tuple[Tensor, None]:
        assert segments is not None, "outside segment_attention() models keep their own attention"
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernel(query, key, value, segments, scale, dropout, sliding_window, softcap), None

    return forward


KERNELS: dict[str, Kernel] = {"auto": auto, "padded": padded, "looped": looped, "reference": reference.attention}

for _name, _kernel in KERNELS.items():
    AttentionInterface.register(f"luthier_{_name}", _adapter(_kernel))
