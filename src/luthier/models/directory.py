"""A base model's directory read without its weights: configuration, tokenizer, tensor headers, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from luthier.errors import ModelError, nearest

_SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def read_config(path: Path) -> PretrainedConfig:
    """The model's configuration. Raises ModelError where the directory is not one of a native causal LM."""
    if not path.is_dir():
        guess = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else None
        raise ModelError(
            f"{path}: is not a model directory" if path.exists() else f"{path}: does not exist",
            f"did you mean {path.parent / guess}?" if guess else "get one with: luthier pull smollm2-135m",
        )
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path}: holds no config.json, so it is not a model directory", "give a model directory")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read ({e})", "download the model again") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{file}: model_type {kind!r} is not a chat model that can be loaded without running the model's own code",
            "use a model of a type that transformers knows natively",
        )
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers validates with many kinds of error
        raise ModelError(f"{file}: is not a valid configuration ({e})", "download the model again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the directory, empty where it is absent."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read ({e})", "download the model again") from None
    return value if isinstance(value, dict) else {}


def eos_ids(path: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """Ids on which the published model stops: generation_config.json first, then config.json."""
    value = read_json(path / "generation_config.json").get("eos_token_id", getattr(config, "eos_token_id", None))
    ids = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(int(i) for i in ids)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the model, in name order. Raises ModelError where one is missing."""
    index = read_json(path / "model.safetensors.index.json")
    names = sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]
    files = [path / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing and index:
        raise ModelError(f"{path}: lacks {', '.join(missing)}", "download the model again")
    if missing:
        raise ModelError(
            f"{path}: holds no safetensors weights ({', '.join(missing)})",
            "download the model's safetensors files; pickle files (.bin) are not read",
        )
    return files


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What an adapter remembers of its base: shapes that must agree, and a digest of the weights themselves."""

    shape: dict[str, Any]
    weights: str

    def mismatches(self, other: Fingerprint) -> list[str]:
        """``hidden_size 576, expected 2048`` for everything in which ``other`` (the adapter's base) differs."""
        found = [
            f"{key} is {self.shape.get(key)}, the adapter's base has {value}"
            for key, value in other.shape.items()
            if self.shape.get(key) != value
        ]
        if self.weights != other.weights:
            found.append(f"weights differ (digest {self.weights[:12]}, the adapter's base has {other.weights[:12]})")
        return found


def fingerprint(path: Path, config: PretrainedConfig) -> Fingerprint:
    """Names, shapes and sampled values of every tensor; values rounded to bfloat16, so that a copy saved in fp32 or
    bf16, or in other shards, is still the same model. Tied heads and rotary tables, which not every copy holds, are
    left out."""
    text = config.get_text_config()
    shape = {key: getattr(text, key, None) for key in _SHAPE_KEYS}
    parts: list[tuple[str, bytes]] = []
    tied = bool(getattr(text, "tie_word_embeddings", False))
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 - not a dict
                    if name.endswith("inv_freq") or (tied and name == "lm_head.weight"):
                        continue
                    parts.append((name, _sample(f.get_slice(name))))
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{file}: is damaged ({e})", "download the model again") from None
    digest = hashlib.sha256()
    for name, sample in sorted(parts):
        digest.update(name.encode() + b"\0" + sample)
    return Fingerprint(shape, digest.hexdigest())


def _sample(tensor: Any) -> bytes:
    """Shape, and up to 64 values of the first, middle and last row."""
    shape = tensor.get_shape()
    header = repr(list(shape)).encode()
    if not shape or 0 in shape:
        return header
    if len(shape) == 1:
        rows = [tensor[: min(64, shape[0])]]
    else:
        rows = [tensor[i : i + 1].flatten()[:64] for i in (0, shape[0] // 2, shape[0] - 1)]
    values = torch.cat(rows).to(torch.bfloat16).view(torch.int16).numpy()
    return header + bytes(values.tobytes())


def check_names(
    requested: Sequence[str], leaves: Sequence[str], model_name: str, fail: Callable[[str, str], Exception]
) -> None:
    """Refuse every requested module name that the model does not have, all at once, with the nearest real one."""
    unknown = [n for n in requested if n not in leaves]
    if not unknown:
        return
    listed = ", ".join(leaves)
    names = ", ".join(f"'{n}'" for n in unknown)
    verb = "is not a module" if len(unknown) == 1 else "are not modules"
    guesses = [(n, nearest(n, leaves, cutoff=0.5)) for n in unknown]
    advice = [f"write {g} for {n}" for n, g in guesses if g]
    raise fail(
        f"lora.target_modules: {names} {verb} of {model_name}; its linear layers are {listed}",
        f"{', '.join(advice) or 'use names from that list'}, or leave target_modules out to train them all",
    )
