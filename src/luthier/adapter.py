"""The adapter directory: PEFT's layout, plus ``luthier.json`` for what PEFT does not keep.

adapter_config.json         PEFT's own, so stock peft (and vLLM) load the directory
adapter_model.safetensors   base_model.model.<module>.lora_A.weight, .lora_B.weight
luthier.json                system prompt, template, stop ids, the base's fingerprint, digests, versions
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier import __version__, files
from luthier.config import LoraConfig
from luthier.errors import AdapterError
from luthier.lora import LoraLinear, Targets, attach, resolve
from luthier.models.directory import Fingerprint

FORMAT = 1
WEIGHTS, CONFIG, META = "adapter_model.safetensors", "adapter_config.json", "luthier.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Facts:
    """What an adapter needs to be run as it was trained."""

    system: str | None
    template: dict[str, Any]
    template_sha256: str
    stop_ids: tuple[int, ...]
    base: Fingerprint
    tokenizer_sha256: str
    data_sha256: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """A directory that was read and found whole. ``tensors`` are named as in the file."""

    path: Path
    lora: LoraConfig
    targets: tuple[str, ...]
    tensors: dict[str, Tensor]
    facts: Facts
    base_path: str


def save(
    path: Path, layers: Mapping[str, LoraLinear], lora: LoraConfig, targets: Targets, facts: Facts, base: Path
) -> None:
    """Write the directory atomically; tensors in fp32."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    with files.new_dir(path) as temp:
        save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        files.write_json(temp / CONFIG, _peft_config(lora, targets, base))
        meta = {
            "format": FORMAT,
            "system": facts.system,
            "template": {**facts.template, "sha256": facts.template_sha256},
            "stop_ids": list(facts.stop_ids),
            "base": {"shape": facts.base.shape, "weights": facts.base.weights},
            "tokenizer_sha256": facts.tokenizer_sha256,
            "data_sha256": facts.data_sha256,
            "files": {WEIGHTS: files.sha256(temp / WEIGHTS)},
            "versions": {
                "python": platform.python_version(),
                "luthier": __version__,
                **{p: version(p) for p in ("torch", "transformers", "tokenizers")},
            },
        }
        files.write_json(temp / META, meta)


def load(path: Path) -> Adapter:
    """Read and check a directory. Raises AdapterError where it is incomplete or damaged."""
    config, meta = _json(path / CONFIG), _json(path / META)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise AdapterError(f"{path}: holds no {WEIGHTS}", "train again, or copy the whole adapter directory")
    if meta.get("format") != FORMAT:
        raise AdapterError(
            f"{path / META}: format {meta.get('format')!r}, this version reads {FORMAT}", "upgrade luthier"
        )
    try:
        if files.sha256(weights) != meta["files"][WEIGHTS]:
            raise AdapterError(
                f"{weights}: is damaged or was altered (its SHA-256 is not the recorded one)",
                "train again, or copy the adapter directory again",
            )
        tensors = load_file(weights)
        template = dict(meta["template"])
        facts = Facts(
            system=meta["system"],
            template_sha256=template.pop("sha256"),
            template=template,
            stop_ids=tuple(meta["stop_ids"]),
            base=Fingerprint(meta["base"]["shape"], meta["base"]["weights"]),
            tokenizer_sha256=meta["tokenizer_sha256"],
            data_sha256=meta["data_sha256"],
        )
        lora = LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config["lora_dropout"],
            target_modules=tuple(config["target_modules"]),
            use_rslora=config["use_rslora"],
        )
        base = str(config["base_model_name_or_path"])
        if not isinstance(template["name"], str):
            raise TypeError("its template has no name")
    except (KeyError, TypeError, ValueError, SafetensorError) as e:
        raise AdapterError(f"{path}: is incomplete or damaged ({e})", "copy the adapter directory again") from None
    assert lora.target_modules is not None
    return Adapter(path, lora, lora.target_modules, tensors, facts, base)


def verify(adapter: Adapter, base: Path, found: Fingerprint, tokenizer_sha256: str) -> None:
    """Raise AdapterError, every mismatch listed, unless ``base`` is the model that the adapter was trained on."""
    wrong = found.mismatches(adapter.facts.base)
    if tokenizer_sha256 != adapter.facts.tokenizer_sha256:
        wrong.append("the tokenizer differs")
    if wrong:
        raise AdapterError(
            f"{base}: is not the base of {adapter.path}: {'; '.join(wrong)}",
            f"use the base model it was trained on (then: {adapter.base_path})",
        )


def apply(model: nn.Module, adapter: Adapter) -> dict[str, LoraLinear]:
    """Attach the adapter to its base model, in place, and return its layers."""
    targets = resolve(model, adapter.targets)
    layers = attach(model, adapter.lora, targets, seed=0)
    expected = {
        f"{_PREFIX}{name}.{part}.weight": getattr(layer, part) for name, layer in layers.items() for part in _AB
    }
    wrong = [f"lacks {n}" for n in expected if n not in adapter.tensors]
    wrong += [f"has {n}, which the base has no place for" for n in adapter.tensors if n not in expected]
    wrong += [
        f"{n} is {list(t.shape)}, the base needs {list(expected[n].shape)}"
        for n, t in adapter.tensors.items()
        if n in expected and t.shape != expected[n].shape
    ]
    if wrong:
        raise AdapterError(
            f"{adapter.path}: does not fit the base: {'; '.join(wrong[:20])}", "use the right base model"
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(adapter.tensors[name])
    return layers


_AB = ("lora_A", "lora_B")


def _peft_config(lora: LoraConfig, targets: Targets, base: Path) -> dict[str, Any]:
    alpha = int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.r,
        "lora_alpha": alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(targets.leaves),
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.parent}: holds no {path.name}", "give a run or adapter directory") from None
    except (OSError, ValueError) as e:
        raise AdapterError(f"{path}: cannot be read ({e})", "copy the adapter directory again") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: is not a JSON object", "copy the adapter directory again")
    return value
