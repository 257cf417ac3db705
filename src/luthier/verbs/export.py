"""``luthier export``: the tuned model in another tool's format."""

from __future__ import annotations

from pathlib import Path

from luthier._util.files import user_path
from luthier.adapters.locate import locate_tuned
from luthier.exporting.formats import Exported, write_export
from luthier.types import Log


def export(
    path: Path | str | None = None,
    to: str = "peft",
    output_dir: Path | str = "exported",
    layout: str | None = None,
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    quantization: str | None = None,
    log: Log = lambda _: None,
) -> Exported:
    """Write the tuned model in another tool's format and verify the result. Raises UserError.

    to: peft, hf, gguf, gguf-lora or ollama. layout: native or original, for peft and hf.
    quantization: f16, q8_0 or q4_0, for gguf and ollama.
    """
    return write_export(locate_tuned(path, model, adapter), to, user_path(output_dir), layout, quantization, log)
