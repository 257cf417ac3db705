"""``luthier eval``: compare base and tuned model on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier._util.files import user_path
from luthier.config import DataConfig
from luthier.data.loader import DataReport
from luthier.data.text import encoding_of
from luthier.devices.device import pick_device
from luthier.encoding.rows import read_held_out
from luthier.encoding.store import ExampleStore
from luthier.errors import ConfigError
from luthier.evaluation.scoring import (
    HELD_OUT,
    NEW_TOKENS,
    REPLIES,
    Comparison,
    Losses,
    compare,
    held_out_loss,
    write_rows,
)
from luthier.lora.layers import disable_adapter
from luthier.types import Log
from luthier.verbs.chat import open_model


def eval(  # noqa: A001 - the verb's name
    path: Path | str | None = None,
    data: Sequence[Path] = (),
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    checkpoint: int | None = None,
    samples: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
    log: Log = lambda _: None,
    fused: bool = True,
) -> Comparison:
    """Score base and tuned model on held-out rows, those of the run if ``data`` is empty. Raises UserError.

    dtype:   "auto": fp32 on the CPU, so that the losses do not depend on the processor; else the device's own dtype.
    samples: number of prompts that both models answer, with at most ``max_new_tokens`` tokens each.
    fused:   generate replies with luthier's compiled layers if they support the model, which is faster.
    """
    dtype = "float32" if dtype == "auto" and pick_device().type == "cpu" else dtype
    opened = open_model(path, dtype, model, adapter, checkpoint, with_adapter=True, fused=fused, log=log)
    run = user_path(path) if path else None
    files = [user_path(p) for p in data] or _held_out_files(run)
    settings = opened.config.data if opened.config else DataConfig.model_validate({"train": files})
    examples = ExampleStore()
    report = read_held_out(files, settings, opened.generator.chat_format.encoder(settings), examples)
    if report.error:
        raise report.error
    for line in report.data_report.lines():
        log(line)
    file = files[0]
    if len(files) > 1 or not _is_reusable(file, report.data_report, settings):
        file = (run or Path()) / "eval-rows.jsonl"  # one file that any tool can read
        write_rows(file, report.conversations)
    generator, layers = opened.generator, opened.layers
    tuned = held_out_loss(generator.model, examples)
    with disable_adapter(layers):
        losses = Losses(held_out_loss(generator.model, examples), tuned)
    return compare(generator, layers, losses, report.conversations, file, None, samples, max_new_tokens)


def _held_out_files(run: Path | None) -> list[Path]:
    """Return the file of held-out rows that the run wrote. Raises ConfigError if there is none."""
    if run and (run / HELD_OUT).is_file():
        return [run / HELD_OUT]
    raise ConfigError(
        "there are no held-out rows",
        "give --data FILE, or train with --set data.eval=FILE or --set data.eval_fraction=0.05",
    )


def _is_reusable(file: Path, report: DataReport, settings: DataConfig) -> bool:
    """Whether the file holds exactly the scored rows, as UTF-8 JSON in a format that any tool can read."""
    plain = file.suffix.lower() in (".json", ".jsonl") and file.is_file() and encoding_of(file) == "utf-8"
    whole = not report.dropped and not settings.rename and not report.notes  # other names of keys are noted
    return plain and whole and set(report.formats.values()) <= {"alpaca", "messages"}
