"""The formats of ``luthier export``: what each one contains, and how it is verified.

peft       the adapter for stock PEFT          read back, every update compared with the adapter's
hf         the merged model's directory        logits compared with those of base+adapter
gguf       the merged model in one file        llama.cpp's greedy replies compared with those of base+adapter
gguf-lora  only the adapter, for use with a    the same, over a GGUF of the base model that is written for
           GGUF of the base model              this and deleted
ollama     a Modelfile next to a GGUF          the GGUF as above
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from luthier._util import files
from luthier._util.installation import install_command
from luthier.adapters.locate import TunedModel
from luthier.config import GenerationSettings
from luthier.errors import ConfigError, nearest
from luthier.exporting import chat_files, ollama, peft
from luthier.exporting.gguf import llamacpp, verify, writer
from luthier.exporting.gguf.architectures import notes
from luthier.exporting.merge import must_not_exist, pending_updates, write_merged
from luthier.models.chat_format import ChatFormat
from luthier.types import Log

FORMATS = ("peft", "hf", "gguf", "gguf-lora", "ollama")


@dataclass(frozen=True, slots=True)
class Exported:
    """The files of an export, the results of its verification, and the reason if it could not be verified."""

    path: Path
    format: str
    files: list[str]
    verification: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_verified: str | None = None

    def as_dict(self) -> dict[str, object]:
        """The report of ``export --json``."""
        return {
            "path": str(self.path),
            "format": self.format,
            "files": self.files,
            "proven": self.not_verified is None,
            "proof": self.verification,
            "notes": [*self.notes, *([self.not_verified] if self.not_verified else [])],
        }


def write_export(
    tuned: TunedModel, to: str, path: Path, layout: str | None, quantization: str | None, log: Log = lambda _: None
) -> Exported:
    """Write the directory ``path`` in the format ``to``. Raises UserError and leaves nothing at ``path`` then."""
    if to not in FORMATS:
        guess = nearest(to, FORMATS) or "gguf"
        raise ConfigError(f"--to {to}: is not a format; the formats are {', '.join(FORMATS)}", f"write --to {guess}")
    if layout is not None and to not in ("peft", "hf"):
        raise ConfigError(f"--layout would be ignored: --to {to} has one layout", "leave --layout out")
    if quantization is not None and to not in ("gguf", "ollama"):
        raise ConfigError(f"--quantization would be ignored: --to {to} stores 16 or 32 bits", "write --to gguf")
    must_not_exist(path)
    if to == "peft":
        peft.write(tuned, path, layout or "native")
        return Exported(path, to, _files(path), ["every update reads back equal, up to fp32 rounding"])
    if to == "hf":
        merged = write_merged(tuned, path, log, layout or "native")
        return Exported(path, to, _files(path), [merged.closeness.summary()])
    if to == "gguf-lora":
        return _lora(tuned, path, log)
    return _model(tuned, to, path, quantization or "f16", log)


def _model(tuned: TunedModel, to: str, path: Path, quantization: str, log: Log) -> Exported:
    """Write the merged model as GGUF, with a Modelfile for Ollama."""
    writer.file_type_of(quantization)
    chat_format, name = tuned.chat_format(), _name(tuned)
    pending = pending_updates(tuned, chat_format)
    file = f"{name}-{quantization}.gguf"
    text = ollama.modelfile(file, chat_format.template, tuned.system, _generation(tuned)) if to == "ollama" else None
    with files.new_dir(path) as temp:
        _verify_vocabulary(tuned, chat_format, temp / file, True, log)
        log(f"writing {file}")
        writer.write_model(tuned, chat_format, pending, temp / file, quantization, name)
        if text is not None:
            files.write_text(temp / "Modelfile", text)
        verified = _verify(lambda: verify.verify_model(tuned, chat_format, temp / file, quantization, log))
    warnings = notes(chat_format.config) + (ollama.notes(_generation(tuned)) if to == "ollama" else [])
    return Exported(path, to, _files(path), verified, warnings, None if verified else _not_verified())


def _lora(tuned: TunedModel, path: Path, log: Log) -> Exported:
    """Write only the adapter as GGUF."""
    chat_format, name = tuned.chat_format(), _name(tuned)
    pending = pending_updates(tuned, chat_format)
    file = f"{name}-lora.gguf"
    with files.new_dir(path) as temp:
        log(f"writing {file}")
        writer.write_lora(chat_format.config, pending, temp / file, name)
        chat_files.write_template(temp, chat_format, tuned.system)
        verified = _verify(lambda: _verify_over_base(tuned, chat_format, temp, file, log))
    warnings = [*notes(chat_format.config), _TEMPLATE.format(path=path)]
    return Exported(path, "gguf-lora", _files(path), verified, warnings, None if verified else _not_verified())


def _verify_over_base(tuned: TunedModel, chat_format: ChatFormat, temp: Path, file: str, log: Log) -> list[str]:
    """Verify an adapter file over a GGUF of the base model, which is deleted afterwards."""
    base = temp / "base-f16.gguf"
    _verify_vocabulary(tuned, chat_format, temp / file, False, log)
    log("writing the base model as GGUF, to verify the adapter over it")
    writer.write_model(tuned, chat_format, {}, base, "f16", _name(tuned))
    try:
        return verify.verify_lora(tuned, chat_format, base, temp / file, log)
    finally:
        base.unlink()


def _verify_vocabulary(tuned: TunedModel, chat_format: ChatFormat, file: Path, with_stops: bool, log: Log) -> None:
    """Verify tokenizer and template before weights are written, which takes minutes for a large model.

    file: the exported file, which is named in messages. with_stops: it holds the stop tokens.
    """
    if not llamacpp.available():
        return
    with TemporaryDirectory(dir=file.parent) as folder:
        small = Path(folder) / file.name
        writer.write_vocabulary(chat_format, tuned.system, small, _name(tuned))
        verify.verify_vocabulary(tuned, chat_format, small, with_stops, log)


def _verify(run: Callable[[], list[str]]) -> list[str]:
    """Run a verification with llama.cpp, or return nothing if llama.cpp is not installed."""
    return run() if llamacpp.available() else []


_TEMPLATE = (
    "the adapter's file holds no chat template: start llama.cpp with --jinja --chat-template-file "
    "{path}/chat_template.jinja, which writes the prompts of the training"
)


def _not_verified() -> str:
    return (
        f"not verified: {llamacpp.PACKAGE}, which runs llama.cpp, is not installed; to verify: "
        f"{install_command('export')}, then export again"
    )


def _generation(tuned: TunedModel) -> GenerationSettings | None:
    return tuned.config.generation if tuned.config else None


def _name(tuned: TunedModel) -> str:
    """Return the name for the files: that of the run's directory, or of the adapter's."""
    folder = tuned.adapter.path.resolve()
    return (folder.parent if folder.name == "adapter" else folder).name


def _files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
