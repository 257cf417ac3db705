"""Adapter + base -> plain safetensors, tensor by tensor: neither model is ever whole in memory.

The update is added in fp32 to the base's own stored weights and rounded once, to the type they were stored in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from luthier import files
from luthier.adapter import updates
from luthier.adapter_layout import Update, to_native
from luthier.errors import AdapterError, ConfigError
from luthier.located import Located
from luthier.lora import scaling
from luthier.models.load import checkpoint_tensors, empty_model
from luthier.models.shards import read_json
from luthier.preflight import Voice
from luthier.templates import Turns

SHARD = 5_000_000_000  # bytes a file, the hubs' own habit
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written: the directory, how many tensors, and how many of them the adapter changed."""

    path: Path
    tensors: int
    changed: int


def merge(found: Located, to: Path, say: Say = lambda _: None, shard_bytes: int = SHARD) -> Merged:
    """Write a model directory that loads in stock transformers: the native layout, whatever the base's own was.

    Raises UserError; nothing is left at ``to`` then.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: is there already", "choose another --output-dir, or delete that one")
    voice = found.voice()
    pending = to_native(updates(found.adapter), voice.modules())
    linear = {f"{name}.weight" for name, m in empty_model(voice.config).named_modules() if hasattr(m, "in_features")}
    unknown = [n for n in pending if f"{n}.weight" not in linear]
    if unknown:
        raise AdapterError(
            f"{found.adapter.path}: has adapters of {', '.join(unknown[:8])}, which the base has no place for",
            "use the base it belongs to",
        )
    with files.new_dir(to) as temp:
        names = _write(temp, _merged(found, voice, pending), shard_bytes, say)
        _write_rest(temp, found.base, voice)
    return Merged(to, len(names), len(pending))


def _merged(found: Located, voice: Voice, pending: Mapping[str, Update]) -> Iterator[tuple[str, Tensor]]:
    """Every native tensor in its stored type, updates added."""
    for name, tensor in checkpoint_tensors(found.base, voice.config):
        update = pending.get(name.removesuffix(".weight"))
        if update is None:
            yield name, tensor
            continue
        if update.b.shape[0] != tensor.shape[0] or update.a.shape[1] != tensor.shape[1]:
            raise AdapterError(
                f"{found.adapter.path}: does not fit the base: {name} is {list(tensor.shape)}", "use its own base"
            )
        delta = scaling(update.config) * (update.b.float() @ update.a.float())
        yield name, (tensor.float() + delta).to(tensor.dtype)


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int, say: Say) -> dict[str, str]:
    """Shards of at most ``shard_bytes`` and their index; returns file by tensor name."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, folder / _temporary(len(shards)), metadata={"format": "pt"})
        say(f"merged {len(held)} tensors ({size / 1e9:.2f} GB)")
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if held and size + bytes_ > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size += bytes_
        total += bytes_
    flush()
    if len(shards) == 1:
        (folder / _temporary(0)).rename(folder / "model.safetensors")
        return dict.fromkeys(shards[0], "model.safetensors")
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _temporary(i)).rename(folder / file)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    files.write_json(folder / "model.safetensors.index.json", index)
    return where


def _temporary(number: int) -> str:
    return f"part-{number}.safetensors"


def _write_rest(folder: Path, base: Path, voice: Voice) -> None:
    """Configuration, stop ids and tokenizer, the chat template included."""
    config = voice.config
    config.architectures = [type(empty_model(config)).__name__]
    config.save_pretrained(folder)
    published = {k: v for k, v in read_json(base / "generation_config.json").items() if k not in _OTHERS}
    generation = GenerationConfig(**{**published, "eos_token_id": list(voice.stop_ids)})
    files.write_json(folder / "generation_config.json", json.loads(generation.to_json_string()))
    voice.tokenizer.hf.save_pretrained(folder)
    if voice.tokenizer.chat_template is None and isinstance(voice.template, Turns):
        files.write_text(folder / "chat_template.jinja", voice.template.jinja())


_OTHERS = ("user_token_id", "assistant_token_id", "transformers_version")  # Baichuan2's own code alone reads these
