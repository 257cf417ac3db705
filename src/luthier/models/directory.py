"""Read the configuration, family and fingerprint of a base model directory without loading the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from luthier.errors import ConfigError, ModelError, nearest
from luthier.models.checkpoint_reader import Shards, read_json, weight_files
from luthier.models.families import FAMILIES, Family
from luthier.types import DATA_SUFFIXES

_SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def must_be_directory(path: Path) -> None:
    """Raise ModelError if a path is not a directory; the fix names the most similar directory beside it."""
    if path.suffix in DATA_SUFFIXES and path.is_file():
        raise ModelError(f"{path}: is a data file, not a model directory", f"give it with --data {path}")
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        guess = nearest(path.name, siblings)
        raise ModelError(
            f"{path}: is not a model directory" if path.exists() else f"{path}: does not exist",
            f"did you mean {path.parent / guess}?" if guess else "get one with: luthier pull smollm2-135m",
        )


def refuse_run(path: Path) -> None:
    """Raise ModelError for a run, an adapter or a checkpoint: none of them is a model; the fix names the way to one."""
    if any((folder / "adapter_config.json").is_file() for folder in (path, path / "adapter")):
        raise ModelError(
            f"{path}: is a run or an adapter, not a base model",
            f"use the model that this command writes to the directory merged: luthier merge {path} --output-dir merged",
        )
    if (path / "run.yaml").is_file():
        raise ModelError(f"{path}: the run has no adapter yet", f"finish it: luthier train {path / 'run.yaml'}")
    if (path / "state.safetensors").is_file() or any(path.glob("step-*/state.safetensors")):
        raise ModelError(
            f"{path}: is a checkpoint, which only chat and eval can open, by its run and its step",
            "luthier chat RUN --checkpoint N; for another command, finish the run with luthier train and give the run",
        )


def read_config(path: Path, rope_theta: float | None = None) -> PretrainedConfig:
    """Read the configuration of a model as that of a native transformers class, whatever its published layout.

    rope_theta: overrides the published rotary base (``model.rope_theta``).
    Raises ModelError if the directory holds no causal LM that transformers supports natively.
    """
    must_be_directory(path)
    file = path / "config.json"
    if not file.is_file():
        refuse_run(path)
        raise ModelError(f"{path}: contains no config.json, so it is not a model directory", "pass a model directory")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read ({e})", "download the model again") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILIES}:
        raise ModelError(
            f"{file}: model_type {kind!r} is not a chat model that can be loaded without running the model's own code",
            "use a model whose type transformers supports natively",
        )
    if raw.get("quantization_config"):
        raise ModelError(f"{file}: the checkpoint is already quantised", "download the model's 16-bit checkpoint")
    config = _native_config(path, raw)
    if rope_theta is not None:
        _set_rope_theta(config, rope_theta)
    return config


def _native_config(path: Path, raw: dict[str, object]) -> PretrainedConfig:
    family, file = recognise(raw), path / "config.json"
    try:
        if family.config is None:
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return family.config(raw)
    except ModelError as e:
        raise ModelError(f"{file}: {e.message}", e.fix) from None
    except Exception as e:  # transformers raises many kinds of error for an invalid file
        raise ModelError(f"{file}: is not a valid configuration ({e})", "download the model again") from None


def _set_rope_theta(config: PretrainedConfig, theta: float) -> None:
    """Set the rotary base. Raises ConfigError if the model has no single one."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        raise ConfigError(
            f"model.rope_theta would be ignored: {config.model_type} models have no single rotary base",
            "leave model.rope_theta out",
        )
    config.rope_parameters = {**parameters, "rope_theta": float(theta)}


def context_length(config: PretrainedConfig) -> int | None:
    """Return the largest number of tokens that the model can read; None if its config has no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def head_size(config: PretrainedConfig) -> int:
    """Return the number of values per attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def cache_bytes(config: PretrainedConfig, itemsize: int) -> int:
    """Return the size in bytes of one token's keys and values in all layers, for ordinary and grouped-query attention.

    itemsize: bytes per value. Attention with a window, shared latent keys or layers of another kind can need much less.
    """
    config = config.get_text_config()
    if not getattr(config, "num_attention_heads", None):  # a model without attention has neither
        return 0
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return 2 * int(config.num_hidden_layers) * heads * head_size(config) * itemsize


def attention_windows(config: PretrainedConfig) -> int | dict[str, int | None] | None:
    """Return the attention window: one for all layers, or one per type of layer as named in the configuration.

    None: no window.
    """
    config = config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return window
    if "sliding_attention" not in kinds:
        return None
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def rotary_limit(config: PretrainedConfig) -> int | None:
    """Return the tokens beyond which all positions of a row are rotated by other factors; None: they never change.

    transformers chooses the factors of longrope (Phi-3-128k, Phi-3.5, Phi-4-mini) by the longest row of a call, so rows
    of up to this many tokens and longer ones must not share a call. Those of dynamic NTK change beyond the context.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    tables = [parameters, *parameters.values()]  # some models have a table per type of layer
    longrope = [t for t in tables if isinstance(t, dict) and t.get("rope_type") == "longrope"]
    return min((int(t["original_max_position_embeddings"]) for t in longrope), default=None)


def family_of(path: Path) -> Family:
    """Return the family of a model directory, from its config.json."""
    return recognise(read_json(path / "config.json"))


def generation_config(path: Path) -> GenerationConfig:
    """Read generation_config.json. Raises ModelError if it is invalid."""
    try:
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as e:  # transformers raises many kinds of error for an invalid file
        file = path / "generation_config.json"
        raise ModelError(f"{file}: cannot be read ({' '.join(str(e).split())[:200]})", "download it again") from None


def eos_ids(path: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """Return the stop token ids of the published model: generation_config.json first, then config.json."""
    value = read_json(path / "generation_config.json").get("eos_token_id", getattr(config, "eos_token_id", None))
    ids = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(int(str(i)) for i in ids)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of an adapter's base model: shapes that must agree, and a digest of the weights."""

    shape: dict[str, object]
    weights: str

    def mismatches(self, other: Fingerprint) -> list[str]:
        """Describe every difference from ``other``, the adapter's base; empty if they are the same model."""
        differences = [
            f"{key} is {self.shape.get(key)}, the adapter's base has {value}"
            for key, value in other.shape.items()
            if self.shape.get(key) != value
        ]
        if self.weights != other.weights:
            differences.append(
                f"weights differ (digest {self.weights[:12]}, the adapter's base has {other.weights[:12]})"
            )
        return differences


def fingerprint(path: Path, config: PretrainedConfig) -> Fingerprint:
    """Compute the fingerprint of a model from the names, shapes and sampled values of its tensors.

    Values are rounded to bfloat16, so that a copy saved in fp32 or bf16, or in other shards, counts as the same model.
    Tied heads and rotary tables are excluded, since not every copy contains them.
    """
    text = config.get_text_config()
    shape = {key: getattr(text, key, None) for key in _SHAPE_KEYS}
    tied = bool(getattr(text, "tie_word_embeddings", False))
    shards = Shards.open(path)
    parts: list[tuple[str, bytes]] = []
    for name in shards.in_file_order():
        if not name.endswith("inv_freq") and not (tied and name == "lm_head.weight"):
            parts.append((name, _sample(shards, name)))
    digest = hashlib.sha256()
    for name, sample in sorted(parts):
        digest.update(name.encode() + b"\0" + sample)
    return Fingerprint(shape, digest.hexdigest())


def weights_identity(path: Path, config: PretrainedConfig) -> list[object]:
    """Return what a result made from a model's weights depends on: sampled values, names and sizes of its files."""
    sizes = [[file.name, file.stat().st_size] for file in weight_files(path)]
    return [fingerprint(path, config).weights, sizes]


def _sample(shards: Shards, name: str) -> bytes:
    """Serialise the shape and up to 64 values of the first, middle and last row."""
    shape = shards.shapes[name]
    header = repr(list(shape)).encode()
    if not shape or 0 in shape:
        return header
    if len(shape) == 1:
        values = shards.read(name)[:64]
    else:
        values = shards.rows(name, (0, shape[0] // 2, shape[0] - 1)).flatten(1)[:, :64].flatten()
    return header + bytes(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())


def check_names(
    requested: Sequence[str],
    leaves: Sequence[str],
    model_name: str,
    fail: Callable[[str, str], Exception],
    reasons: Mapping[str, str] | None = None,
) -> None:
    """Raise ``fail`` listing every requested module name that the model lacks, with the most similar existing names.

    reasons: of the names that the model has, but not for linear layers: why they cannot be adapted.
    """
    unknown = [n for n in requested if n not in leaves]
    if not unknown:
        return
    listed = ", ".join(leaves)
    names = ", ".join(f"'{n}'" for n in unknown)
    verb = "is not a module" if len(unknown) == 1 else "are not modules"
    reasons = reasons or {}
    guesses = [(n, _counterpart(n, leaves)) for n in unknown if n not in reasons]
    advice = [f"write {g} for {n}" for n, g in guesses if g]
    advice += [f"leave {' and '.join(reasons)} out"] if reasons else []
    because = "".join(f"; {n} cannot be adapted: {reason}" for n, reason in reasons.items())
    raise fail(
        f"lora.target_modules: {names} {verb} of {model_name}; its linear layers are {listed}{because}",
        f"{', '.join(advice) or 'use names from that list'}, or leave target_modules out to train them all",
    )


_COUNTERPARTS = (  # modules with the same role in different models
    ("q_attn", "q_proj"),
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "W_pack", "query_key_value", "c_attn", "wqkv"),
    ("o_proj", "dense", "out_proj", "wo"),
    ("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h", "w1", "w3"),
    ("down_proj", "dense_4h_to_h", "w2"),
)


def same_role(name: str, other: str) -> bool:
    """Whether two modules have the same name, or the same role in different models."""
    return name == other or any(name in group and other in group for group in _COUNTERPARTS)


def _counterpart(name: str, leaves: Sequence[str]) -> str | None:
    """Return the names of the modules with the same role in this model, otherwise the most similar name."""
    leaf = name.rpartition(".")[2]
    return ", ".join(n for n in leaves if same_role(n, leaf)) or nearest(name, leaves, cutoff=0.5)


def recognise(raw: Mapping[str, object]) -> Family:
    """Return the family for a config.json; a default record if its ``model_type`` has no entry."""
    kind = str(raw.get("model_type"))
    return FAMILIES.get(kind, Family(kind, kind))
