"""The formats of ``luthier export``: what each one writes, which options it takes, how it is proven.

peft       the adapter for stock PEFT              read back, every update compared
hf         the merged model's directory            logits against base+adapter
gguf       the merged model in one file            llama.cpp's greedy replies against base+adapter
gguf-lora  the adapter alone, over a base's GGUF   the same, over the base written out for it
ollama     a Modelfile beside a GGUF               the GGUF as above
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier._util import files
from luthier.adapters.locate import TunedModel
from luthier.config import GenerationSettings
from luthier.errors import ConfigError, nearest
from luthier.exporting import ollama, peft
from luthier.exporting.gguf import llamacpp, verify, writer
from luthier.exporting.gguf.architectures import notes
from luthier.exporting.merge import free, pending_updates, write_merged
from luthier.models.chat_format import ChatFormat
from luthier.types import Say

FORMATS = ("peft", "hf", "gguf", "gguf-lora", "ollama")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how it was proven: a line each; ``unproven`` says what is missing where it was not."""

    path: Path
    format: str
    files: list[str]
    proof: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unproven: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "format": self.format,
            "files": self.files,
            "proven": self.unproven is None,
            "proof": self.proof,
            "notes": [*self.notes, *([self.unproven] if self.unproven else [])],
        }


def write_export(
    tuned: TunedModel, to: str, path: Path, layout: str | None, quantization: str | None, say: Say = lambda _: None
) -> Exported:
    """Write ``path``, a directory that is not there yet. Raises UserError; nothing is left at ``path`` then."""
    if to not in FORMATS:
        guess = nearest(to, FORMATS) or "gguf"
        raise ConfigError(f"--to {to}: is not a format; they are {', '.join(FORMATS)}", f"write --to {guess}")
    if layout is not None and to not in ("peft", "hf"):
        raise ConfigError(f"--layout would be ignored: --to {to} has one layout", "leave --layout out")
    if quantization is not None and to not in ("gguf", "ollama"):
        raise ConfigError(f"--quantization would be ignored: --to {to} has 16 or 32 bits", "write --to gguf")
    free(path)
    if to == "peft":
        peft.write(tuned, path, layout or "native")
        return Exported(path, to, _files(path), ["every update reads back equal, to fp32 rounding"])
    if to == "hf":
        done = write_merged(tuned, path, say, layout or "native", system=tuned.system)
        return Exported(path, to, _files(path), [done.proof.told()])
    if to == "gguf-lora":
        return _lora(tuned, path, say)
    return _model(tuned, to, path, quantization or "f16", say)


def _model(tuned: TunedModel, to: str, path: Path, quantization: str, say: Say) -> Exported:
    writer.kind_of(quantization)
    chat_format, name = tuned.chat_format(), _name(tuned)
    pending = pending_updates(tuned, chat_format)
    file = f"{name}-{quantization}.gguf"
    text = ollama.modelfile(file, chat_format.template, tuned.system, _generation(tuned)) if to == "ollama" else None
    with files.new_dir(path) as temp:
        say(f"writing {file}")
        writer.write_model(tuned, chat_format, pending, temp / file, quantization, name)
        if text is not None:
            files.write_text(temp / "Modelfile", text)
        proven = _proven(lambda: verify.prove_model(tuned, chat_format, temp / file, quantization, say))
    told = notes(chat_format.config) + (ollama.notes(_generation(tuned)) if to == "ollama" else [])
    return Exported(path, to, _files(path), proven, told, None if proven else _UNPROVEN)


def _lora(tuned: TunedModel, path: Path, say: Say) -> Exported:
    chat_format, name = tuned.chat_format(), _name(tuned)
    pending = pending_updates(tuned, chat_format)
    file = f"{name}-lora.gguf"
    with files.new_dir(path) as temp:
        say(f"writing {file}")
        writer.write_lora(chat_format.config, pending, temp / file, name)
        proven = _proven(lambda: _over_its_base(tuned, chat_format, temp, file, say))
    told = [*notes(chat_format.config), *([_SYSTEM] if tuned.system else [])]
    return Exported(path, "gguf-lora", _files(path), proven, told, None if proven else _UNPROVEN)


def _over_its_base(tuned: TunedModel, chat_format: ChatFormat, temp: Path, file: str, say: Say) -> list[str]:
    base = temp / "base-f16.gguf"
    say("writing the base as GGUF too, to prove the adapter over it")
    writer.write_model(tuned, chat_format, {}, base, "f16", _name(tuned))
    try:
        return verify.prove_lora(tuned, chat_format, base, temp / file, say)
    finally:
        base.unlink()


def _proven(prove: Callable[[], list[str]]) -> list[str]:
    """Nothing where llama.cpp is not there to be asked."""
    return prove() if llamacpp.available() else []


_SYSTEM = "the run's system prompt is not in the file, which holds the adapter alone: give it to llama.cpp yourself"
_UNPROVEN = (
    f"not proven: {llamacpp.PACKAGE}, which runs llama.cpp, is not installed; to prove it: "
    "pip install 'luthier[export]', then export again"
)


def _generation(tuned: TunedModel) -> GenerationSettings | None:
    return tuned.config.generation if tuned.config else None


def _name(tuned: TunedModel) -> str:
    """What the files are called: the run's directory, or the adapter's own."""
    place = tuned.adapter.path.resolve()
    return (place.parent if place.name == "adapter" else place).name


def _files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
