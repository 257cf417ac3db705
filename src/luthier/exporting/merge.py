"""Merge an adapter into its base model, one tensor at a time, so that neither model is in memory as a whole.

The update is added in fp32 to the stored weights of the base model (even if training used a 4-bit copy of them) and
rounded once to their stored dtype. The written directory is then read back and its logits are verified.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from luthier._util import files
from luthier.adapters.directory import updates
from luthier.adapters.locate import TunedModel
from luthier.adapters.original_names import Update, to_native
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.exporting import chat_files
from luthier.exporting.verify import Closeness, compare_merged
from luthier.lora.layers import scaling
from luthier.models.chat_format import ChatFormat
from luthier.models.checkpoint_reader import read_json, weight_files
from luthier.models.families import Rule
from luthier.models.native_model import empty_model, is_linear, published_tensors
from luthier.types import Log

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

SHARD = 5_000_000_000  # bytes per file, as usual on the hubs
LAYOUTS = ("native", "original")


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model: its directory, the number of tensors, how many the adapter changed, and how close it is."""

    path: Path
    tensors: int
    changed: int
    closeness: Closeness


def write_merged(
    tuned: TunedModel,
    to: Path,
    log: Log = lambda _: None,
    layout: str = "native",
    shard_bytes: int = SHARD,
) -> Merged:
    """Write a merged model directory, and compare its prompts and logits, read from disk, with the tuned model's.

    layout: ``native`` loads in stock transformers; ``original`` has the names and files of the published base model.
    Raises UserError and leaves nothing at ``to`` then.
    """
    must_not_exist(to)
    chat_format = tuned.chat_format()
    check_layout(tuned, chat_format, layout)
    pending = pending_updates(tuned, chat_format)
    with files.new_dir(to, sum(f.stat().st_size for f in weight_files(tuned.base))) as temp:
        (_original_files if layout == "original" else _native_files)(temp, tuned, chat_format)
        dtypes = _write(temp, merged_tensors(tuned, chat_format, pending, layout), shard_bytes, log)
        log("verifying the merged model")
        coarsest = max(set(dtypes.values()), key=lambda d: torch.finfo(d).eps)
        closeness = compare_merged(tuned, chat_format, temp, coarsest)
        _check_closeness(closeness, torch.finfo(coarsest).eps, to)
    return Merged(to, len(dtypes), len(pending), closeness)


def must_not_exist(to: Path) -> None:
    """Raise ConfigError if ``to`` exists and is not an empty directory."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: already exists", "choose another --output-dir, or delete this one")


def check_layout(tuned: TunedModel, chat_format: ChatFormat, layout: str) -> None:
    """Raise ConfigError for an unknown layout, or ``original`` if the published names are the native ones."""
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout}: is not a layout", "write --layout native or --layout original")
    if layout == "original" and not chat_format.modules():
        raise ConfigError(f"{tuned.base}: its module names are already the native ones", "leave --layout original out")


def pending_updates(tuned: TunedModel, chat_format: ChatFormat) -> dict[str, Update]:
    """Return the adapter's updates by native module. Raises AdapterError if one does not fit the base model."""
    pending = to_native(updates(tuned.adapter), chat_format.modules())
    shapes = {
        name: (m.out_features, m.in_features)
        for name, m in empty_model(chat_format.config).named_modules()
        if is_linear(m)
    }
    unknown = [n for n in pending if n not in shapes]
    if unknown:
        raise AdapterError(
            f"{tuned.adapter.path}: adapts {', '.join(unknown[:8])}, which the base model does not have",
            "use the base model it was trained on",
        )
    ranks = next((n for n, u in pending.items() if u.a.shape[0] != u.b.shape[1]), None)
    if ranks:
        a, b = pending[ranks].a, pending[ranks].b
        raise AdapterError(
            f"{tuned.adapter.path}: is damaged: A of {ranks} is {list(a.shape)} and its B is {list(b.shape)}",
            "use an undamaged copy of the adapter",
        )
    wrong = next((n for n, u in pending.items() if (u.b.shape[0], u.a.shape[1]) != shapes[n]), None)
    if wrong:
        raise AdapterError(
            f"{tuned.adapter.path}: does not fit the base: {wrong} is {list(shapes[wrong])}",
            "use the base model it was trained on",
        )
    return pending


def merged_tensors(
    tuned: TunedModel,
    chat_format: ChatFormat,
    pending: Mapping[str, Update],
    layout: str = "native",
    rounded: bool = True,
) -> Iterator[tuple[str, Shaped[Tensor, " ..."]]]:
    """Yield every tensor with the updates added, under native or published names.

    rounded: to the stored dtype; false yields fp32 (with native names only).
    """
    for name, rule, tensor in published_tensors(tuned.base, chat_format.config):
        if layout == "original":
            yield name, _with_updates(tuned, name, rule, tensor, pending)
        elif rule:
            for part, piece in rule.split(tensor, tensor.dtype):
                update = pending.get(part.removesuffix(".weight"))
                value = piece if update is None else piece.float() + delta(update)
                yield part, value.to(tensor.dtype if rounded else torch.float32)


def delta(update: Update) -> Float[Tensor, "out in"]:
    """Compute what an update adds to its weight, [out, in] in fp32."""
    return scaling(update.config) * (update.b.float() @ update.a.float())


def _with_updates(
    tuned: TunedModel,
    name: str,
    rule: Rule | None,
    tensor: Shaped[Tensor, "*shape"],
    pending: Mapping[str, Update],
) -> Shaped[Tensor, "*shape"]:
    """Add the updates of the parts of a published tensor to its rows; without updates it is returned unchanged."""
    updates_of_parts = [pending.get(part.removesuffix(".weight")) for part in rule.parts] if rule else []
    if not rule or not any(updates_of_parts):
        return tensor
    if rule.unit_rows:
        raise AdapterError(
            f"{tuned.adapter.path}: changes {name}, whose rows the published model code rescales",
            "leave --layout original out",
        )
    whole, row = tensor.float(), 0
    for update, rows in zip(updates_of_parts, rule.rows or (len(tensor),), strict=True):
        if update:
            whole[row : row + rows] += delta(update)
        row += rows
    return whole.to(tensor.dtype)


def _write(
    folder: Path, tensors: Iterator[tuple[str, Shaped[Tensor, " ..."]]], shard_bytes: int, log: Log
) -> dict[str, torch.dtype]:
    """Write shards of at most ``shard_bytes`` and their index; return the dtype of each tensor."""
    shards: list[list[str]] = []
    dtypes: dict[str, torch.dtype] = {}
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / _temporary(len(shards)), metadata={"format": "pt"})
        log(f"merged {len(shard)} tensors ({size / 1e9:.2f} GB)")
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if shard and size + bytes_ > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        dtypes[name] = tensor.dtype
        size += bytes_
        total += bytes_
    flush()
    if len(shards) == 1:
        (folder / _temporary(0)).rename(folder / "model.safetensors")
        return dtypes
    files_of: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _temporary(i)).rename(folder / file)
        files_of.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files_of.items()))}
    files.write_json(folder / "model.safetensors.index.json", index)
    return dtypes


def _temporary(number: int) -> str:
    return f"part-{number}.safetensors"


def _native_files(folder: Path, tuned: TunedModel, chat_format: ChatFormat) -> None:
    """Write configuration, stop ids, tokenizer and template for stock transformers."""
    _write_config(folder, tuned.base, chat_format.config)
    chat_files.write_generation_config(folder, tuned.base, chat_format)
    chat_files.write(folder, tuned.base, chat_format, tuned.system)
    chat_files.verify_own(folder, chat_format, tuned.system)


def _write_config(folder: Path, base: Path, config: PretrainedConfig) -> None:
    """Write config.json for readers of today and for older ones. Raises ModelError if an older one reads another model.

    transformers 5 moves the rotary settings to ``rope_parameters`` and names the dtype ``dtype``. A reader that does
    not know these keys (transformers 4.57, vLLM) would silently use its defaults.
    """
    config.architectures = [type(empty_model(config)).__name__]
    config.save_pretrained(folder)
    file = folder / "config.json"
    content = with_older_keys(read_json(file), read_json(base / "config.json"))
    files.write_json(file, content)
    older = type(config)(**{k: v for k, v in content.items() if k not in ("rope_parameters", "dtype", "model_type")})
    rope, read = (getattr(c.get_text_config(), "rope_parameters", None) for c in (config, older))
    if isinstance(rope, dict) and "rope_type" in rope and read != rope:
        raise ModelError(
            f"{base}: readers without rope_parameters would compute rotary positions with {read} instead of {rope}",
            "report this bug of luthier, with the output of luthier doctor",
        )


def with_older_keys(config: Mapping[str, object], published: Mapping[str, object]) -> dict[str, object]:
    """Add the keys that older readers need to the content of a config.json that transformers 5 has written.

    published: the base model's config.json; its keys stay as they are if both have the same ``model_type``.
    """
    native = published.get("model_type") == config.get("model_type")
    content = {k: v for k, v in published.items() if native and k not in _OF_THE_FILES} | dict(config)
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:  # the text model of a larger one
            part = published.get(key)
            content[key] = with_older_keys(value, part if isinstance(part, dict) else {})
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        alone = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
        scaling = {k: v for k, v in rope.items() if k not in alone}
        content |= alone
        content.setdefault("rope_scaling", None if rope["rope_type"] == "default" else scaling)
    if dtype := published.get("torch_dtype", published.get("dtype")):
        content |= {"dtype": dtype, "torch_dtype": dtype}
    return content


_OF_THE_FILES = ("_name_or_path", "auto_map", "transformers_version", "quantization_config")  # not of the model


def _original_files(folder: Path, tuned: TunedModel, chat_format: ChatFormat) -> None:
    """Copy every published file but the weights, with the tuned model's stop ids, and add the template as a file."""
    for file in sorted(tuned.base.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not _holds_weights(file):
            shutil.copyfile(file, folder / file.name)
    published = read_json(tuned.base / "generation_config.json")
    files.write_json(folder / "generation_config.json", {**published, "eos_token_id": list(chat_format.stop_ids)})
    chat_files.write_template(folder, chat_format, tuned.system, keep_config=True)
    chat_files.verify_own(folder, chat_format, tuned.system)


def _holds_weights(file: Path) -> bool:
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    return file.suffix in suffixes or file.name.endswith(".index.json")


def _check_closeness(closeness: Closeness, eps: float, to: Path) -> None:
    """Raise ModelError if the logits differ by more than one rounding of each weight explains.

    eps: relative size of that rounding. The logits must also show the part of the adapter's change that it leaves.
    """
    limit = closeness.size * max(8 * eps, 1e-4)
    carried = closeness.carried
    if closeness.mean > limit or (carried is not None and abs(carried - 1) > 0.1):
        share = "" if carried is None else f"; it shows {carried:.2f} of the adapter's change"
        raise ModelError(
            f"{to}: the merged model failed verification and was deleted: mean difference of logits "
            f"{closeness.mean:.2g} (limit {limit:.2g}){share}",
            "report this bug of luthier, with the output of luthier doctor",
        )
