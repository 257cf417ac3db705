"""Define two published architectures that transformers does not load, in plain torch, as references for conversion.

Written in fp32 from facts about the published checkpoints only (names, shapes, rotary layout, head), without modelling
code of any library, so that tests of the conversion against them are independent.
``tests/models/test_definitions.py`` verifies that they equal transformers' own classes on weights split by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def glm4_logits(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Compute GLM-4 in its original layout (``model_type`` chatglm): ids [B, T] -> logits [B, T, V], fp32.

    ``query_key_value`` rows: all query heads | key groups | value groups, with biases; each group serves
    heads / groups neighbouring heads. Rotary on the first half of a head, pairs (2i, 2i+1), base 10000 * rope_ratio.
    ``dense_h_to_4h`` rows: gate | up. The residual is the stream before its norm.
    """
    w = {name: tensor.float() for name, tensor in tensors.items()}
    heads, groups, size = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    eps, base = config["layernorm_epsilon"], 10000.0 * config["rope_ratio"]
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for n in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{n}"
        h = _rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        fused = f"{layer}.self_attention.query_key_value"
        rows = F.linear(h, w[f"{fused}.weight"], w[f"{fused}.bias"])
        q, k, v = rows.split([heads * size, groups * size, groups * size], dim=-1)
        q, k = (_rotate_pairs(_heads(t, size), base, size // 2) for t in (q, k))
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, _heads(v, size)))
        x = x + F.linear(_causal_attention(q, k, v), w[f"{layer}.self_attention.dense.weight"])
        h = _rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        gate, up = F.linear(h, w[f"{layer}.mlp.dense_h_to_4h.weight"]).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, w[f"{layer}.mlp.dense_4h_to_h.weight"])
    x = _rms_norm(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return F.linear(x, w["transformer.output_layer.weight"])


def baichuan2_logits(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Compute Baichuan2-7B (rotary; the 13B model uses ALiBi): ids [B, T] -> logits [B, T, V], fp32.

    ``W_pack`` rows: q | k | v, a third each. Rotary on whole heads, halves (i, i + d/2), base 10000 (not in config).
    ``lm_head`` is a NormHead: its rows are normalised before use, not as published.
    """
    w = {name: tensor.float() for name, tensor in tensors.items()}
    size, eps = config["hidden_size"] // config["num_attention_heads"], config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        h = _rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = (_heads(t, size) for t in F.linear(h, w[f"{layer}.self_attn.W_pack.weight"]).chunk(3, dim=-1))
        q, k = (_rotate_halves(t, 10000.0) for t in (q, k))
        x = x + F.linear(_causal_attention(q, k, v), w[f"{layer}.self_attn.o_proj.weight"])
        h = _rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        gate, up = (F.linear(h, w[f"{layer}.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, w[f"{layer}.mlp.down_proj.weight"])
    x = _rms_norm(x, w["model.norm.weight"], eps)
    return F.linear(x, F.normalize(w["lm_head.weight"], dim=-1))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _heads(x: Tensor, size: int) -> Tensor:
    """[B, T, heads * size] -> [B, heads, T, size]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def _angles(length: int, rotated: int, base: float) -> Tensor:
    """[T, rotated / 2]: position * base^(-2i / rotated)."""
    frequency = base ** -(torch.arange(0, rotated, 2) / rotated)
    return torch.arange(length)[:, None] * frequency


def _turn(a: Tensor, b: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each point (a, b) of the plane by its angle."""
    return a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()


def _rotate_pairs(x: Tensor, base: float, rotated: int) -> Tensor:
    """x [B, heads, T, size]: dims (0, 1), (2, 3), ... of the first ``rotated`` are rotated, the others unchanged."""
    turned = _turn(x[..., 0:rotated:2], x[..., 1:rotated:2], _angles(x.shape[-2], rotated, base))
    return torch.cat([torch.stack(turned, dim=-1).flatten(-2), x[..., rotated:]], dim=-1)


def _rotate_halves(x: Tensor, base: float) -> Tensor:
    """x [B, heads, T, size]: dims (0, size/2), (1, size/2 + 1), ... are rotated."""
    return torch.cat(_turn(*x.chunk(2, dim=-1), _angles(x.shape[-2], x.shape[-1], base)), dim=-1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, T, size] each -> [B, T, heads * size]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)
