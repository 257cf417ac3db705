"""What the compiled layers keep in memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from luthier.fused.group import PAD
from luthier.fused.model import LOGITS, unsuitable
from luthier.kernels import native
from luthier.lora import LoraLinear


def compiled(model: Any, layers: Mapping[str, LoraLinear], dtype: torch.dtype) -> bool:
    """Whether this run will be trained by them."""
    return native.obstacle(dtype) is None and unsuitable(model, layers) is None


def kept(model: Any, tokens: int, recompute: bool, width: int) -> float:
    """Bytes of the activations at the peak of a micro-batch of ``tokens`` computed tokens.

    width: bytes of an element. The last layer is counted whole, though it works at the supervised positions alone.
    """
    blocks = list(model.get_decoder().layers)
    hidden = int(model.config.hidden_size)
    wide = _sizes(blocks[0])
    layer = hidden * 2 + wide["qkv"] + wide["attended"] + wide["gate_up"]
    passing = wide["gate_up"] + wide["gate_up"] // 2 + 4 * hidden
    layers = hidden * len(blocks) + layer if recompute else layer * len(blocks)
    return float(tokens * width * (layers + passing))


def logits(vocabulary: int, targets: int, width: int) -> float:
    """Bytes of the logits that exist at once."""
    return float(min(targets, max(1, LOGITS // vocabulary)) * vocabulary * width)


def _sizes(block: Any) -> dict[str, int]:
    """Elements a token: the projections' outputs, adapters' ranks beside them."""
    attention, mlp = block.self_attn, block.mlp
    names = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    gate_up = ["gate_up_proj"] if hasattr(mlp, "gate_up_proj") else ["gate_proj", "up_proj"]

    def base(module: Any) -> Any:
        return module.base if isinstance(module, LoraLinear) else module

    return {
        "qkv": sum(base(getattr(attention, n)).out_features for n in names),
        "attended": base(attention.o_proj).in_features + PAD,
        "gate_up": sum(base(getattr(mlp, n)).out_features for n in gate_up),
    }
