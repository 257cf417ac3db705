"""The base model that a run's settings ask for: in one type, or quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig

from luthier.config import ModelConfig
from luthier.models.load import DTYPES, load_weights, pick_dtype
from luthier.models.quant import Quantisation
from luthier.models.quantised import FourOrEight, load_quantised


def quantisation(settings: ModelConfig) -> Quantisation | None:
    """How its frozen linear layers are stored, None for 16 or 32 bits."""
    if settings.load_in_8bit:
        return Quantisation("int8")
    return (
        Quantisation(settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)
        if settings.load_in_4bit
        else None
    )


def training_dtype(settings: ModelConfig, device: torch.device) -> torch.dtype:
    """``model.dtype``; where that is auto, an explicit ``bnb_4bit_compute_dtype`` decides for the whole model."""
    name = settings.bnb_4bit_compute_dtype if settings.dtype == "auto" else settings.dtype
    return pick_dtype(name, device)


def open_base(
    settings: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    config: PretrainedConfig,
    say: Callable[[str], None] = lambda _: None,
) -> Any:
    """Load it. config: as ``read_config`` returned it. Raises ModelError."""
    how = quantisation(settings)
    if how is None:
        return load_weights(settings.path, dtype, device, config, say)
    compute = DTYPES.get(settings.bnb_4bit_compute_dtype, dtype)
    return load_quantised(
        settings.path, dtype, device, config, FourOrEight(how, compute, settings.quantised_cache), say
    )
