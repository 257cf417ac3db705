"""GGUF files for ``--engine llama.cpp``: written and verified once, then cached on disk.

    llama.cpp/<key>/model.gguf, verified.json     a base model, without a chat template: prompts are sent as token ids
    llama.cpp/<key>/lora.gguf, verified.json      an adapter over that file

The key of a file depends on everything that it is made from, and on the versions that wrote and verified it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from luthier import __version__
from luthier._util import files
from luthier._util.environment import CACHE
from luthier.adapters import directory as adapters
from luthier.adapters.locate import TunedModel
from luthier.config import ModelConfig
from luthier.errors import ConfigError, ModelError, UserError
from luthier.exporting.gguf import llamacpp, verify, writer
from luthier.exporting.gguf.architectures import architecture
from luthier.exporting.gguf.llamacpp import ServerOptions
from luthier.exporting.merge import pending_updates
from luthier.models.chat_format import ChatFormat
from luthier.models.directory import weights_identity
from luthier.models.loader import quantisation
from luthier.models.protocols import CausalLM
from luthier.models.streamed import reader, streamed
from luthier.types import Log

MODEL, LORA, _RECORD = "model.gguf", "lora.gguf", "verified.json"
_WITHOUT = "leave --engine llama.cpp out"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that llama.cpp should run. tuned: None for the base model itself."""

    name: str
    base: Path
    chat_format: ChatFormat
    tuned: TunedModel | None = None

    @property
    def system(self) -> str | None:
        return self.tuned.system if self.tuned else None


@dataclass(frozen=True, slots=True)
class LlamaFiles:
    """Verified files. lora: those of the adapters by the names of their models, in the order of the server's list."""

    model: Path
    lora: dict[str, Path]


def default_quantization(settings: ModelConfig) -> str:
    """Return the file type that is nearest to how the base model was stored in training."""
    how = quantisation(settings)
    return "f16" if how is None else "q8_0" if how.kind == "int8" else "q4_0"


def cached_files(models: Sequence[Wanted], quantization: str, log: Log) -> LlamaFiles:
    """Return verified files of models that share a base, which is the last one; missing files are written first.

    Raises ModelError with the reason if llama.cpp cannot run a model as it was trained.
    """
    llamacpp.require()
    writer.file_type_of(quantization)
    # the file gets the stop tokens of the training
    base, root = replace(models[-1], chat_format=models[0].chat_format), files.cache_root() / "llama.cpp"
    try:
        architecture(base.chat_format.config)
        _same_stops(models)
        if reason := files.unwritable(root):
            raise UserError(
                f"{reason}, so llama.cpp's files cannot be written", f"set {CACHE} to a directory that can be written"
            )
        key = files.key_of(_facts_of_base(base, quantization))
        model = root / key / MODEL
        if not _complete(model):
            _write(root / key, partial(_base, base, quantization, log), log)
        lora = {}
        for wanted in models:
            if wanted.tuned:
                folder = root / files.key_of([key, *_facts_of_adapter(wanted.tuned)])
                if not _complete(folder / LORA):
                    _write(folder, partial(_adapter, wanted, model, quantization, log), log)
                lora[wanted.name] = folder / LORA
    except ModelError as e:
        raise ModelError(f"llama.cpp cannot run {models[0].name}: {e.message}", _WITHOUT) from None
    return LlamaFiles(model, lora)


def _same_stops(models: Sequence[Wanted]) -> None:
    """Raise ConfigError if the models end their replies with different tokens: a file holds one list of them."""
    first = models[0]
    other = next((m for m in models if m.tuned and m.chat_format.stop_ids != first.chat_format.stop_ids), None)
    if other:
        raise ConfigError(
            f"{first.name} and {other.name} end their replies with different tokens, and llama.cpp has one list",
            f"serve them separately, each on its own --port, or {_WITHOUT}",
        )


def _complete(file: Path) -> bool:
    """Whether a file has the size that was verified; a damaged one is written again."""
    try:
        record = json.loads((file.parent / _RECORD).read_text(encoding="utf-8"))
        return bool(record["bytes"] == file.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(folder: Path, write: Callable[[Path], str], log: Log) -> None:
    """Write and verify a file in a directory that appears only if both succeed."""
    with files.new_dir(folder) as temp:
        result = write(temp)
        (file,) = temp.glob("*.gguf")
        files.write_json(temp / _RECORD, {"verified": result, "bytes": file.stat().st_size})
    log(f"llama.cpp: verified: {result}")
    log(f"llama.cpp: saved in {folder} for later runs")


def _base(base: Wanted, quantization: str, log: Log, folder: Path) -> str:
    """Write and verify the base model's file. Returns the result of the verification."""
    chat_format, file = base.chat_format, folder / MODEL
    log(f"llama.cpp: verifying the tokenizer of {base.name}")
    writer.write_vocabulary(chat_format, None, file, base.name, with_template=False)
    verify.verify_served_vocabulary(chat_format, None, file)
    log(f"llama.cpp: writing {base.name} as GGUF in {quantization}, once for this model")
    writer.write_base(base.base, chat_format, file, quantization, base.name)
    log("llama.cpp: verifying the file: 16 greedy replies")
    options = ServerOptions(str(file))
    return verify.verify_served(chat_format, None, options, quantization, _reference(base, file, quantization))


def _adapter(wanted: Wanted, model: Path, quantization: str, log: Log, folder: Path) -> str:
    """Write and verify an adapter's file. Returns the result of the verification."""
    assert wanted.tuned
    chat_format, file = wanted.chat_format, folder / LORA
    writer.write_lora(chat_format.config, pending_updates(wanted.tuned, chat_format), file, wanted.name)
    log(f"llama.cpp: verifying the adapter of {wanted.name}: 16 greedy replies")
    reference = _reference(wanted, model, quantization)
    adapters.apply(reference, wanted.tuned.adapter, chat_format.modules())
    options = ServerOptions(str(model), (str(file),))
    return verify.verify_served(chat_format, wanted.system, options, quantization, reference)


def _reference(wanted: Wanted, model: Path, quantization: str) -> CausalLM:
    """Return the base model in fp32: of the checkpoint, or if the file is quantised, of the file's own values."""
    config = wanted.chat_format.config
    read = reader(wanted.base, config) if quantization == "f16" else writer.reader(model, config)
    return streamed(config, read)


def _facts_of_base(base: Wanted, quantization: str) -> list[object]:
    """Return everything that the base model's file is made from."""
    chat_format = base.chat_format
    return [
        __version__,
        *(version(name) for name in ("gguf", llamacpp.PACKAGE)),
        weights_identity(base.base, chat_format.config),
        chat_format.config.to_dict(),
        chat_format.tokenizer.digest(),
        chat_format.stop_ids,
        quantization,
    ]


def _facts_of_adapter(tuned: TunedModel) -> list[object]:
    """Return everything that an adapter's file and its verification depend on, besides the base model's file."""
    return [adapters.digest(tuned.adapter.path), tuned.system]
