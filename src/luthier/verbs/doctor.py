"""``luthier doctor``: report the machine and the installation, and try one training step of a tiny model."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from typing import NotRequired, TypedDict

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier import __version__
from luthier.config import LoraConfig, TrainConfig
from luthier.devices.device import cpu_name, physical_memory, pick_device, pick_dtype
from luthier.lora.layers import attach, resolve
from luthier.training import loop
from luthier.types import Example, RowRef

CORE = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "numpy")
EXTRAS = {
    "modelscope": ("modelscope-hub",),
    "parquet": ("pyarrow",),
    "qlora": ("bitsandbytes",),
    "notebooks": ("ipykernel", "ipywidgets", "matplotlib", "nbclient", "nbformat"),
    "eval": ("jieba", "rouge-score", "sacrebleu"),
    "serve": ("fastapi", "uvicorn"),
    "export": ("xllamacpp",),
    "bench": ("datasets", "peft"),
}


class Smoke(TypedDict):
    """The result of one training step: the loss and the time it took, or the error."""

    ok: bool
    loss: NotRequired[float]
    seconds: NotRequired[float]
    error: NotRequired[str]


class Machine(TypedDict):
    """The report of ``doctor --json``. packages, extras: by name; a version of None means not installed."""

    luthier: str
    python: str
    system: str
    packages: dict[str, str | None]
    extras: dict[str, bool]
    device: str
    cores: int | None
    threads: int
    memory_bytes: int | None
    trains_in: str
    smoke: Smoke


def doctor() -> Machine:
    """Report versions, devices, extras and the result of one training step. Errors of the step are in ``smoke``."""
    device = pick_device()
    return {
        "luthier": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        # torch's own name of its version tells builds for CUDA and CPUs apart, that of the package may not
        "packages": {**{name: _version(name) for name in CORE}, "torch": torch.__version__},
        "extras": {name: all(_version(p) for p in packages) for name, packages in EXTRAS.items()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": physical_memory(),
        "trains_in": str(pick_dtype("auto", device)).removeprefix("torch."),
        "smoke": _smoke(device),
    }


def _smoke(device: torch.device) -> Smoke:
    """Train a tiny model for one step."""
    start = time.perf_counter()
    try:
        config = AutoConfig.for_model(
            "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        model = AutoModelForCausalLM.from_config(config, dtype=pick_dtype("auto", device)).to(device)
        layers = attach(model, LoraConfig.model_validate({}), resolve(model, None), seed=0)
        rows = [Example(np.arange(2, 2 + n), np.arange(n) > 2, RowRef("smoke", n)) for n in (6, 9)]
        progress = loop.train(model, layers, rows, TrainConfig.model_validate({"max_steps": 1}))
    except Exception as e:  # any failure is the report that the user asked for
        return {"ok": False, "error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
    return {"ok": True, "loss": progress.losses[0], "seconds": round(time.perf_counter() - start, 2)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
