"""Implement ``flash_attn_varlen_func`` in plain torch, from its documentation."""

from __future__ import annotations

import torch
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """q [Tq, H, D], k and v [Tk, K, D] -> [Tq, H, D].

    Fewer key heads: query heads 0 .. H/K - 1 use key head 0, and so on. causal: the mask is aligned to the lower right
    corner of a row's scores. window_size (left, right): query i sees keys i + Lk - Lq - left to i + Lk - Lq + right,
    both included, -1 for no bound. softcap 0: none. A query that sees no key gives zeros.
    """
    assert not dropout_p and alibi_slopes is None and deterministic
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert len(q) == cu_seqlens_q[-1] and len(k) == len(v) == cu_seqlens_k[-1]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    sizes = [(starts[1:] - starts[:-1]).tolist() for starts in (cu_seqlens_q, cu_seqlens_k)]
    assert [max(s) for s in sizes] == [max_seqlen_q, max_seqlen_k]
    left, right = window_size[0], 0 if causal else window_size[1]
    rows = zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True)
    return torch.cat([_row(*row, softmax_scale or q.shape[-1] ** -0.5, left, right, softcap) for row in rows])


def _row(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    ahead = torch.arange(len(k))[None] - torch.arange(len(q))[:, None] - (len(k) - len(q))
    seen = ((ahead <= right) | (right < 0)) & ((ahead >= -left) | (left < 0))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v)
