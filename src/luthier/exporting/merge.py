"""Adapter + base -> plain safetensors, tensor by tensor: neither model is ever whole in memory.

The update is added in fp32 to the base's own stored weights (also where training ran on a 4-bit copy of them) and
rounded once, to the type they were stored in. Then the written directory is read back and proven.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from luthier._util import files
from luthier.adapters.directory import updates
from luthier.adapters.locate import TunedModel
from luthier.adapters.original_names import Update, to_native
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.exporting.verify import Closeness, compare_merged
from luthier.lora.layers import scaling
from luthier.models.chat_format import ChatFormat
from luthier.models.checkpoint_reader import read_json
from luthier.models.families import Rule
from luthier.models.native_model import empty_model, published_tensors
from luthier.models.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer
from luthier.templates.exported import Own, chat_template
from luthier.types import Say

SHARD = 5_000_000_000  # bytes a file, the hubs' own habit
LAYOUTS = ("native", "original")


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written: the directory, how many tensors, how many of them the adapter changed, and its proof."""

    path: Path
    tensors: int
    changed: int
    proof: Closeness


def write_merged(
    tuned: TunedModel,
    to: Path,
    say: Say = lambda _: None,
    layout: str = "native",
    system: str | None = None,
    shard_bytes: int = SHARD,
) -> Merged:
    """Write a model directory and prove it: its logits, read from disk, against those of base and adapter.

    layout: ``native`` loads in stock transformers; ``original`` has the names and files of the base as published.
    system: becomes the chat template's default system prompt.
    Raises UserError; nothing is left at ``to`` then.
    """
    free(to)
    chat_format = tuned.chat_format()
    check_layout(tuned, chat_format, layout)
    pending = pending_updates(tuned, chat_format)
    with files.new_dir(to) as temp:
        tensors = merged_tensors(tuned, chat_format, pending, layout)
        written = _write(temp, tensors, shard_bytes, say)
        (_original_files if layout == "original" else _native_files)(temp, tuned.base, chat_format)
        if system or (layout == "native" and chat_format.tokenizer.chat_template is None):
            files.write_text(temp / "chat_template.jinja", template_text(chat_format, system))
        say("reading it back")
        kind = max(set(written.values()), key=lambda k: torch.finfo(k).eps)
        proof = compare_merged(tuned, chat_format, temp, kind)
        _refuse_beyond(proof, torch.finfo(kind).eps, to)
    return Merged(to, len(written), len(pending), proof)


def free(to: Path) -> None:
    """Raise ConfigError where something is at ``to`` already."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: is there already", "choose another --output-dir, or delete that one")


def check_layout(tuned: TunedModel, chat_format: ChatFormat, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout}: is not a layout", "write --layout native or --layout original")
    if layout == "original" and not chat_format.modules():
        raise ConfigError(f"{tuned.base}: its module names are the native ones already", "leave --layout original out")


def pending_updates(tuned: TunedModel, chat_format: ChatFormat) -> dict[str, Update]:
    """The adapter's updates by native module. Raises AdapterError where the base has no place for one."""
    pending = to_native(updates(tuned.adapter), chat_format.modules())
    shapes = {
        name: (m.out_features, m.in_features)
        for name, m in empty_model(chat_format.config).named_modules()
        if hasattr(m, "in_features")
    }
    unknown = [n for n in pending if n not in shapes]
    if unknown:
        raise AdapterError(
            f"{tuned.adapter.path}: has adapters of {', '.join(unknown[:8])}, which the base has no place for",
            "use the base it belongs to",
        )
    wrong = next((n for n, u in pending.items() if (u.b.shape[0], u.a.shape[1]) != shapes[n]), None)
    if wrong:
        raise AdapterError(
            f"{tuned.adapter.path}: does not fit the base: {wrong} is {list(shapes[wrong])}", "use its own base"
        )
    return pending


def merged_tensors(
    tuned: TunedModel,
    chat_format: ChatFormat,
    pending: Mapping[str, Update],
    layout: str = "native",
    rounded: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with the updates added, native or published names; in its stored type, or fp32 where not rounded."""
    for name, rule, tensor in published_tensors(tuned.base, chat_format.config):
        if layout == "original":
            yield name, _updated_whole(tuned, name, rule, tensor, pending)
        elif rule:
            for part, piece in rule.split(tensor, tensor.dtype):
                update = pending.get(part.removesuffix(".weight"))
                value = piece if update is None else piece.float() + delta(update)
                yield part, value.to(tensor.dtype if rounded else torch.float32)


def delta(update: Update) -> Tensor:
    """What an update adds to its weight, in fp32."""
    return scaling(update.config) * (update.b.float() @ update.a.float())


def _updated_whole(
    tuned: TunedModel, name: str, rule: Rule | None, tensor: Tensor, pending: Mapping[str, Update]
) -> Tensor:
    """A published tensor whose parts' updates are added where they lie in it; as it is where there are none."""
    there = [pending.get(part.removesuffix(".weight")) for part in rule.parts] if rule else []
    if not rule or not any(there):
        return tensor
    if rule.unit_rows:
        raise AdapterError(
            f"{tuned.adapter.path}: changes {name}, whose rows the published code scales again",
            "leave --layout original out",
        )
    whole, row = tensor.float(), 0
    for update, rows in zip(there, rule.rows or (len(tensor),), strict=True):
        if update:
            whole[row : row + rows] += delta(update)
        row += rows
    return whole.to(tensor.dtype)


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int, say: Say) -> dict[str, torch.dtype]:
    """Shards of at most ``shard_bytes`` and their index; returns the type of each tensor."""
    shards: list[list[str]] = []
    kinds: dict[str, torch.dtype] = {}
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
        kinds[name] = tensor.dtype
        size += bytes_
        total += bytes_
    flush()
    if len(shards) == 1:
        (folder / _temporary(0)).rename(folder / "model.safetensors")
        return kinds
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _temporary(i)).rename(folder / file)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    files.write_json(folder / "model.safetensors.index.json", index)
    return kinds


def _temporary(number: int) -> str:
    return f"part-{number}.safetensors"


def _native_files(folder: Path, base: Path, chat_format: ChatFormat) -> None:
    """Configuration, stop ids and tokenizer."""
    config = chat_format.config
    config.architectures = [type(empty_model(config)).__name__]
    config.save_pretrained(folder)
    published = {k: v for k, v in read_json(base / "generation_config.json").items() if k not in _OTHERS}
    generation = GenerationConfig(**{**published, "eos_token_id": list(chat_format.stop_ids)})
    files.write_json(folder / "generation_config.json", json.loads(generation.to_json_string()))
    _tokenizer_files(folder, base, chat_format)


def template_text(chat_format: ChatFormat, system: str | None) -> str:
    """The chat template for other tools, ``system`` its default system prompt."""
    source = chat_format.tokenizer.chat_template
    return chat_template(chat_format.template, Own(chat_format.tokenizer.render, source) if source else None, system)


_OTHERS = ("user_token_id", "assistant_token_id", "transformers_version")  # Baichuan2's own code alone reads these


def _tokenizer_files(folder: Path, base: Path, chat_format: ChatFormat) -> None:
    """The base's own files byte for byte, where stock transformers reads the same ids from them.

    Where it does not (a vocabulary published with code of its own, a conversion that adds spaces) one tokenizer.json
    is written that it does read right.
    """
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    try:
        stock = Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        if stock.digest() == chat_format.tokenizer.digest():
            return
    except Exception:  # noqa: S110 - transformers raises many kinds; then its own way to read it is not there
        pass
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    chat_format.tokenizer.hf.save_pretrained(folder)


def _original_files(folder: Path, base: Path, chat_format: ChatFormat) -> None:
    """Everything the base was published with but its weights, byte for byte; of generation_config the stop ids."""
    for file in sorted(base.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not _holds_weights(file):
            shutil.copyfile(file, folder / file.name)
    published = read_json(base / "generation_config.json")
    files.write_json(folder / "generation_config.json", {**published, "eos_token_id": list(chat_format.stop_ids)})


def _holds_weights(file: Path) -> bool:
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    return file.suffix in kinds or file.name.endswith(".index.json")


def _refuse_beyond(proof: Closeness, eps: float, to: Path) -> None:
    """Raise ModelError where the logits differ by more than one rounding of each weight (relative ``eps``) explains,
    or do not show what that rounding leaves of the adapter's change."""
    bound = proof.size * max(8 * eps, 1e-4)
    if proof.mean > bound or (proof.carried is not None and abs(proof.carried - 1) > 0.1):
        shown = "" if proof.carried is None else f"; {proof.carried:.2f} of the adapter's change is there"
        raise ModelError(
            f"{to}: the merged model is not the tuned one, so it was removed: mean difference of logits "
            f"{proof.mean:.2g} (at most {bound:.2g}){shown}",
            "tell us, with what luthier doctor prints: this is a fault of luthier's",
        )
