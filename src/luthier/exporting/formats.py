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

from luthier import files
from luthier.config import GenerationSettings
from luthier.errors import ConfigError, nearest
from luthier.exporting import gguf, llamacpp, ollama, peft, proof
from luthier.exporting.architectures import notes
from luthier.located import Located
from luthier.merging import free, merge, pending_updates
from luthier.preflight import Voice

FORMATS = ("peft", "hf", "gguf", "gguf-lora", "ollama")
Say = Callable[[str], None]


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


def export(
    found: Located, to: str, path: Path, layout: str | None, quantization: str | None, say: Say = lambda _: None
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
        peft.write(found, path, layout or "native")
        return Exported(path, to, _files(path), ["every update reads back equal, to fp32 rounding"])
    if to == "hf":
        done = merge(found, path, say, layout or "native", system=found.system)
        return Exported(path, to, _files(path), [done.proof.told()])
    if to == "gguf-lora":
        return _lora(found, path, say)
    return _model(found, to, path, quantization or "f16", say)


def _model(found: Located, to: str, path: Path, quantization: str, say: Say) -> Exported:
    gguf.kind_of(quantization)
    voice, name = found.voice(), _name(found)
    pending = pending_updates(found, voice)
    file = f"{name}-{quantization}.gguf"
    text = ollama.modelfile(file, voice.template, found.system, _generation(found)) if to == "ollama" else None
    with files.new_dir(path) as temp:
        say(f"writing {file}")
        gguf.write_model(found, voice, pending, temp / file, quantization, name)
        if text is not None:
            files.write_text(temp / "Modelfile", text)
        proven = _proven(lambda: proof.prove_model(found, voice, temp / file, quantization, say))
    told = notes(voice.config) + (ollama.notes(_generation(found)) if to == "ollama" else [])
    return Exported(path, to, _files(path), proven, told, None if proven else _UNPROVEN)


def _lora(found: Located, path: Path, say: Say) -> Exported:
    voice, name = found.voice(), _name(found)
    pending = pending_updates(found, voice)
    file = f"{name}-lora.gguf"
    with files.new_dir(path) as temp:
        say(f"writing {file}")
        gguf.write_lora(voice.config, pending, temp / file, name)
        proven = _proven(lambda: _over_its_base(found, voice, temp, file, say))
    told = [*notes(voice.config), *([_SYSTEM] if found.system else [])]
    return Exported(path, "gguf-lora", _files(path), proven, told, None if proven else _UNPROVEN)


def _over_its_base(found: Located, voice: Voice, temp: Path, file: str, say: Say) -> list[str]:
    base = temp / "base-f16.gguf"
    say("writing the base as GGUF too, to prove the adapter over it")
    gguf.write_model(found, voice, {}, base, "f16", _name(found))
    try:
        return proof.prove_lora(found, voice, base, temp / file, say)
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


def _generation(found: Located) -> GenerationSettings | None:
    return found.config.generation if found.config else None


def _name(found: Located) -> str:
    """What the files are called: the run's directory, or the adapter's own."""
    place = found.adapter.path.resolve()
    return (place.parent if place.name == "adapter" else place).name


def _files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
