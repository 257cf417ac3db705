"""``--to peft``: the adapter for stock PEFT, under native module names or the checkpoint's own."""

from __future__ import annotations

from pathlib import Path

import torch

from luthier import adapter as adapters
from luthier import files
from luthier.adapter import updates
from luthier.adapter_layout import Update, to_native, to_original
from luthier.errors import AdapterError
from luthier.located import Located
from luthier.merging import check_layout, delta, free


def write(found: Located, to: Path, layout: str) -> None:
    """A stock PEFT directory: native module names, or the checkpoint's own (``layout="original"``).

    Every update is read back and compared with the adapter's before the directory is called done.
    """
    free(to)
    voice = found.voice()
    check_layout(found, voice, layout)
    modules = voice.modules()
    native = to_native(updates(found.adapter), modules)
    with files.new_dir(to) as temp:
        adapters.save_plain(temp, to_original(native, modules) if layout == "original" else native, found.base)
        _prove(native, to_native(updates(adapters.load(temp)), modules), to)


def _prove(native: dict[str, Update], read: dict[str, Update], to: Path) -> None:
    """Raise AdapterError unless both change every weight alike, to fp32 rounding."""
    for name, update in read.items():
        if name in native:
            a, b = delta(native[name]), delta(update)
            if torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max().clamp_min(1e-30))):
                continue
        elif not update.b.any():
            continue  # a module that was not trained, inside a fused one that was
        raise AdapterError(
            f"{to}: {name} reads back as another update",
            "tell us, with what luthier doctor prints: this is a fault of luthier's",
        )
