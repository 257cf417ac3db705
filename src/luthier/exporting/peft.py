"""``--to peft``: the adapter for stock PEFT, with native module names or those of the checkpoint.

Tokenizer and chat template are beside it, since the base model's own may write other prompts than the training.
"""

from __future__ import annotations

from pathlib import Path

import torch

from luthier._util import files
from luthier.adapters import directory as adapters
from luthier.adapters.directory import updates
from luthier.adapters.locate import TunedModel
from luthier.adapters.original_names import Update, to_native, to_original
from luthier.errors import AdapterError
from luthier.exporting import chat_files
from luthier.exporting.merge import check_layout, delta, must_not_exist, pending_updates


def write(tuned: TunedModel, to: Path, layout: str) -> None:
    """Write a stock PEFT directory, with native module names or, for ``layout="original"``, the checkpoint's own.

    Every update is read back and compared with the adapter's. Raises UserError and leaves nothing at ``to`` then.
    """
    must_not_exist(to)
    chat_format = tuned.chat_format()
    check_layout(tuned, chat_format, layout)
    modules = chat_format.modules()
    native = pending_updates(tuned, chat_format)
    with files.new_dir(to) as temp:
        adapters.save_plain(temp, to_original(native, modules) if layout == "original" else native, tuned.base)
        chat_files.write(temp, tuned.base, chat_format, tuned.system)
        _compare(native, to_native(updates(adapters.load(temp)), modules), to)


def _compare(native: dict[str, Update], read: dict[str, Update], to: Path) -> None:
    """Raise AdapterError unless both change every weight equally, up to fp32 rounding."""
    for name, update in read.items():
        if name in native:
            a, b = delta(native[name]), delta(update)
            if torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max().clamp_min(1e-30))):
                continue
        elif not update.b.any():
            continue  # an untrained part of a fused module that was trained
        raise AdapterError(
            f"{to}: {name} differs when read back, so nothing was written",
            "report this bug of luthier, with the output of luthier doctor",
        )
