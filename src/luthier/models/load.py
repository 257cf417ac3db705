"""A model directory -> a transformers model. The library's own class, never code from the directory."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as hf_logging

from luthier.errors import ModelError
from luthier.models.directory import read_config, weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device() -> torch.device:
    """The device that trains: CUDA where there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the device computes in it natively; CUDA without it: float16; else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":  # not yet run on a GPU
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Emulated bfloat16 is many times slower than float32, so only the real thing counts."""
    found = torch.cpu.get_capabilities()
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(found.get("bf16") or found.get("sve_bf16"))
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def empty_model(config: PretrainedConfig) -> nn.Module:
    """The model on the meta device: names and shapes without memory."""
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as e:  # sizes that do not fit each other, unknown activations, ...
        raise ModelError(
            f"config.json describes no model that can be built ({' '.join(str(e).split())[:200]})",
            "download the model again",
        ) from None
    return model


def load_weights(path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """The whole model in ``dtype`` on ``device``. Raises ModelError listing every tensor that does not fit."""
    read_config(path)
    weight_files(path)
    hf_logging.disable_progress_bar()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            weights_only=True,
        )
    except Exception as e:  # safetensors, pickle, OS and transformers errors alike: the files are at fault
        raise ModelError(
            f"{path}: the weights cannot be read ({' '.join(str(e).split())[:300]})", "download the model again"
        ) from None
    finally:
        hf_logging.set_verbosity(verbosity)
    wrong = [f"{kind.split('_')[0]}: {name}" for kind in _WRONG for name in sorted(map(str, info.get(kind, ())))]
    if wrong:
        shown = "; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise ModelError(f"{path}: the weights do not fit the model ({shown})", "download the model again")
    return model.to(device).eval()


_WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys")
