"""A tuned model in other tools' formats, each read back before it is called done."""

from __future__ import annotations

from pathlib import Path

import torch

from luthier import adapter as adapters
from luthier.adapter import updates
from luthier.adapter_layout import Update, to_native, to_original
from luthier.errors import AdapterError, ConfigError
from luthier.located import Located
from luthier.lora import scaling


def peft(found: Located, to: Path, layout: str) -> Path:
    """A stock PEFT directory: native module names, or the checkpoint's own (``layout="original"``).

    Every update is read back and compared with the adapter's before the directory is called done.
    """
    if layout not in ("native", "original"):
        raise ConfigError(f"--layout {layout}: is not a layout", "write --layout native or --layout original")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: is there already", "choose another --output-dir, or delete that one")
    modules = found.voice().modules()
    native = to_native(updates(found.adapter), modules)
    if layout == "original" and not modules:
        raise ConfigError(f"{found.base}: its module names are the native ones already", "leave --layout original out")
    adapters.save_plain(to, to_original(native, modules) if layout == "original" else native, found.base)
    _prove(native, to_native(updates(adapters.load(to)), modules), to)
    return to


def _prove(native: dict[str, Update], read: dict[str, Update], to: Path) -> None:
    """Raise AdapterError unless both change every weight alike, to fp32 rounding."""
    for name, update in read.items():
        if name in native:
            a, b = _delta(native[name]), _delta(update)
            if torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max().clamp_min(1e-30))):
                continue
        elif not update.b.any():
            continue  # a module that was not trained, inside a fused one that was
        raise AdapterError(f"{to}: {name} reads back as another update", "tell us: this is a fault of luthier's")


def _delta(update: Update) -> torch.Tensor:
    return scaling(update.config) * (update.b.float() @ update.a.float())
