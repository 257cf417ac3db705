"""Compute attention over the segments of a flat batch, as transformers' ``AttentionInterface`` functions.

``luthier_padded``    one padded row per segment, batched matrix products, fp32 softmax: fastest on short rows
``luthier_looped``    torch's scaled_dot_product_attention, one call per segment: no [S, L, L] scores, for long rows
``luthier_varlen``    FlashAttention's function for rows of unequal length, if the package ``flash-attn`` is installed
``luthier_auto``      varlen if available; else padded for segments of up to AUTO_LONGEST tokens, looped beyond
``luthier_reference`` the definition

They support flat batches only: ``training.forward.segment_attention`` restores a model's own attention afterwards.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.batching.collate import Segments
from luthier.errors import ConfigError
from luthier.kernels import reference

if TYPE_CHECKING:
    from jaxtyping import Float

AUTO_LONGEST = 512
VARLEN_WIDEST = 256  # features per head that FlashAttention 2 supports
OLDEST_GPU = (8, 0)
Kernel = Callable[..., Tensor]


def padded(
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "1 tokens heads head_dim"]:
    """Compute ``reference.attention`` with padded rows; the query heads of a group share one product."""
    _, heads, _, dim = query.shape
    kv, count = key.shape[1], len(segments.parents)
    groups, prefix_lengths = heads // kv, segments.prefix_lengths()
    longest, keys = len(segments.query_index) // count, len(segments.key_index) // count

    def rows(x: Tensor, per_kv: int, index: Tensor) -> Tensor:  # [1, kv * per_kv, T, D] -> [count * kv, per_kv * L, D]
        gathered = x[0].transpose(0, 1).index_select(0, index)
        return gathered.view(count, -1, kv, per_kv, dim).permute(0, 2, 3, 1, 4).reshape(count * kv, -1, dim)

    wide = [rows(x, 1, segments.key_index) for x in (key, value)]
    scores = torch.bmm(rows(query, groups, segments.query_index), wide[0].transpose(1, 2)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    masks = {n: _causal(longest, keys, n, sliding_window, query.device) for n in set(prefix_lengths)}
    mask = masks[0] if len(masks) == 1 else torch.stack([masks[n] for n in prefix_lengths])[:, None, None]
    scores = scores.view(count, kv, groups, longest, keys) + mask
    weights = torch.softmax(scores, -1).to(query.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    out = torch.bmm(weights.view(count * kv, groups * longest, keys), wide[1])
    stream = out.view(count, kv, groups, longest, dim).permute(0, 3, 1, 2, 4).reshape(count * longest, heads, dim)
    return stream.index_select(0, segments.stream_index)[None]


def looped(
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "1 tokens heads head_dim"]:
    """Compute ``reference.attention`` with one fused call per segment; with a soft cap, as ``padded``."""
    if softcap is not None:
        return padded(query, key, value, segments, scaling, dropout, sliding_window, softcap)
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    for segment, prefix_length in enumerate(segments.prefix_lengths()):
        own = slice(segments.offsets[segment], segments.offsets[segment + 1])
        seen = [slice(segments.offsets[s], segments.offsets[s + 1]) for s in segments.ancestors(segment)] + [own]
        length = own.stop - own.start
        is_causal = prefix_length == 0 and (sliding_window is None or length <= sliding_window)
        keys = prefix_length + length
        mask = None if is_causal else _causal(length, keys, prefix_length, sliding_window, query.device).to(query.dtype)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, own],
                torch.cat([k[:, :, s] for s in seen], 2),
                torch.cat([v[:, :, s] for s in seen], 2),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=scaling,
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def varlen(
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "1 tokens heads head_dim"]:
    """Compute ``reference.attention`` in one call of FlashAttention, whose causal mask is aligned to the last key.

    Source: Dao, FlashAttention-2 (2023), and the documentation of ``flash_attn_varlen_func``.
    """
    from flash_attn import flash_attn_varlen_func

    plan = segments.varlen
    k, v = (x[0].transpose(0, 1) for x in (key, value))
    if plan.keys is not None:
        k, v = k.index_select(0, plan.keys), v.index_select(0, plan.keys)
    out: Tensor = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        k,
        v,
        *plan.starts,
        *plan.longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=True,  # otherwise gradients differ between runs, so a resumed run would differ too
    )
    return out[None]


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``varlen`` is available: its package is installed, the GPU supports it, and the dtype has 16 bits."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= OLDEST_GPU
        and _installed()
    )


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError if the attention kernel ``name`` is not available."""
    if name == "varlen" and not serves(device, dtype):
        raise ConfigError(
            "model.attn_implementation: varlen needs a GPU of compute capability 8.0 or newer, a 16-bit model.dtype "
            "and the package flash-attn",
            "--set model.attn_implementation=auto",
        )


@cache
def _installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def auto(
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    segments: Segments,
    *options: float | None,
    **more: float | None,
) -> Float[Tensor, "1 tokens heads head_dim"]:
    """Compute ``reference.attention`` with the fastest kernel that supports the input."""
    kernel: Kernel = padded if max(segments.lengths) <= AUTO_LONGEST else looped
    if query.shape[-1] <= VARLEN_WIDEST and serves(query.device, query.dtype):
        kernel = varlen
    return kernel(query, key, value, segments, *options, **more)


def _causal(
    queries: int, keys: int, prefix_length: int, sliding_window: int | None, device: torch.device
) -> Float[Tensor, "queries keys"]:
    """Build a mask [queries, keys] fp32: 0 if visible, else -inf; the first query follows ``prefix_length`` keys."""
    positions = torch.arange(prefix_length, prefix_length + queries, device=device)
    positions = positions.clamp_max(keys - 1)  # padding must see a key too
    distance = positions[:, None] - torch.arange(keys, device=device)[None]
    visible = distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)
    return torch.zeros(queries, keys, device=device).masked_fill(~visible, float("-inf"))


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
        **kwargs: object,  # noqa: ARG001
    ) -> tuple[Tensor, None]:
        assert segments is not None, "segments are missing: these functions work within segment_attention() only"
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernel(query, key, value, segments, scale, dropout, sliding_window, softcap), None

    return forward


KERNELS: dict[str, Kernel] = {
    "auto": auto,
    "padded": padded,
    "looped": looped,
    "varlen": varlen,
    "reference": reference.attention,
}

for _name, _kernel in KERNELS.items():
    AttentionInterface.register(f"luthier_{_name}", _adapter(_kernel))
