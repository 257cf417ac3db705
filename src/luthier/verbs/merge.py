"""``luthier merge``: merge the adapter into the base model."""

from __future__ import annotations

from pathlib import Path

from luthier._util.files import user_path
from luthier.adapters.locate import locate_tuned
from luthier.exporting.merge import Merged, write_merged
from luthier.types import Log


def merge(
    path: Path | str | None = None,
    output_dir: Path | str = "merged",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    log: Log = lambda _: None,
    layout: str = "native",
) -> Merged:
    """Write the tuned model as plain safetensors for stock transformers, and verify its logits.

    layout: ``native``, or ``original`` for the tensor names and files of the published base model. Raises UserError.
    """
    return write_merged(locate_tuned(path, model, adapter), user_path(output_dir), log, layout)
