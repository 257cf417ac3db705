"""Read and write adapter directories: PEFT's layout plus ``luthier.json`` for what PEFT does not store.

adapter_config.json         PEFT's own, so stock peft (and vLLM) load the directory
adapter_model.safetensors   base_model.model.<module>.lora_A.weight, .lora_B.weight
luthier.json                system prompt, template, stop ids, fingerprint of the base model, digests, versions
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier import __version__
from luthier._util import files
from luthier.adapters.original_names import Update, to_native
from luthier.config import LoraConfig
from luthier.errors import AdapterError, listed
from luthier.lora.layers import LoraLinear, Targets, attach
from luthier.models.directory import Fingerprint
from luthier.models.families import Modules
from luthier.models.native_model import is_linear
from luthier.models.protocols import ModuleTree

if TYPE_CHECKING:
    from jaxtyping import Shaped

FORMAT = 1
WEIGHTS, CONFIG, META = "adapter_model.safetensors", "adapter_config.json", "luthier.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Facts:
    """What is needed to run an adapter as it was trained."""

    system: str | None
    template: dict[str, object]
    template_sha256: str
    stop_ids: tuple[int, ...]
    base: Fingerprint
    tokenizer_sha256: str
    data_sha256: str
    rope_theta: float | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter directory that was read and checked.

    tensors: named as in the file. configs: for modules whose rank or alpha differs from ``lora``.
    """

    path: Path
    lora: LoraConfig
    modules: tuple[str, ...]
    tensors: dict[str, Shaped[Tensor, " ..."]]
    facts: Facts | None
    base_path: str
    configs: Mapping[str, LoraConfig] = field(default_factory=dict)


def save(
    path: Path, layers: Mapping[str, LoraLinear], lora: LoraConfig, targets: Targets, facts: Facts, base: Path
) -> None:
    """Write an adapter directory atomically; tensors in fp32."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    with files.new_dir(path, sum(t.nbytes for t in tensors.values())) as temp:
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
            "rope_theta": facts.rope_theta,
            "files": {WEIGHTS: files.sha256(temp / WEIGHTS)},
            "versions": {
                "python": platform.python_version(),
                "luthier": __version__,
                **{p: version(p) for p in ("torch", "transformers", "tokenizers")},
            },
        }
        files.write_json(temp / META, meta)


def save_plain(path: Path, updates: Mapping[str, Update], base: Path) -> None:
    """Write updates as a stock PEFT directory; ranks and alphas that differ become PEFT's patterns."""
    tensors, ranks, alphas = dict[str, Tensor](), dict[str, int](), dict[str, float]()
    configs = [u.config for u in updates.values()]
    lora = max(configs, key=configs.count)
    for name, update in updates.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.b.contiguous()
        if update.config.r != lora.r:
            ranks[name] = update.config.r
        if update.config.lora_alpha != lora.lora_alpha:
            alphas[name] = update.config.lora_alpha
    leaves = tuple(dict.fromkeys(n.rpartition(".")[2] for n in updates))
    with files.new_dir(path, sum(t.nbytes for t in tensors.values())) as temp:
        save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        config = _peft_config(lora, Targets(tuple(updates), leaves), base)
        files.write_json(temp / CONFIG, {**config, "rank_pattern": ranks, "alpha_pattern": alphas})


def load(path: Path) -> Adapter:
    """Read and check an adapter directory; one without ``luthier.json`` is a stock PEFT one. Raises AdapterError."""
    config = _json(path / CONFIG)
    facts: Facts | None = None
    weights = path / WEIGHTS
    if not weights.is_file():
        raise AdapterError(f"{path}: holds no {WEIGHTS}", "train again, or copy the whole adapter directory")
    try:
        if (path / META).exists():
            facts = _facts(path)
        tensors = load_file(weights)
        modules = tuple(dict.fromkeys(n.removeprefix(_PREFIX).rpartition(".lora_")[0] for n in tensors))
        _only_plain_lora(path, config, tensors)
        lora = LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout", 0.0),
            target_modules=modules,
            use_rslora=config.get("use_rslora", False),
        )
        configs = _own_configs(config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}, lora, modules)
        base = str(config.get("base_model_name_or_path"))
    except (KeyError, TypeError, ValueError, SafetensorError) as e:
        raise AdapterError(f"{path}: is incomplete or damaged ({e})", "copy the adapter directory again") from None
    return Adapter(path, lora, modules, tensors, facts, base, configs)


def _own_configs(
    rank_pattern: Mapping[str, float], alpha_pattern: Mapping[str, float], lora: LoraConfig, modules: Sequence[str]
) -> dict[str, LoraConfig]:
    """Apply PEFT's patterns, regular expressions that match a module name or its end after a dot."""

    def of(patterns: Mapping[str, float], module: str, default: float) -> float:
        match = next((k for k in patterns if re.fullmatch(rf"(.*\.)?({k})", module)), None)
        return default if match is None else patterns[match]

    configs = {}
    for module in modules:
        rank, alpha = int(of(rank_pattern, module, lora.r)), float(of(alpha_pattern, module, lora.lora_alpha))
        if (rank, alpha) != (lora.r, lora.lora_alpha):
            configs[module] = lora.model_copy(update={"r": rank, "lora_alpha": alpha})
    return configs


def _facts(path: Path) -> Facts:
    """Read ``luthier.json``. Raises AdapterError if the tensors are not those it was written with."""
    meta = _json(path / META)
    if meta.get("format") != FORMAT:
        raise AdapterError(
            f"{path / META}: format {meta.get('format')!r}, this version reads {FORMAT}", "upgrade luthier"
        )
    if files.sha256(path / WEIGHTS) != meta["files"][WEIGHTS]:
        raise AdapterError(
            f"{path / WEIGHTS}: is damaged or was altered (its SHA-256 differs from the recorded one)",
            "train again, or copy the adapter directory again",
        )
    template = dict(meta["template"])
    if not isinstance(template["name"], str):
        raise TypeError("its template has no name")
    return Facts(
        system=meta["system"],
        template_sha256=template.pop("sha256"),
        template=template,
        stop_ids=tuple(meta["stop_ids"]),
        base=Fingerprint(meta["base"]["shape"], meta["base"]["weights"]),
        tokenizer_sha256=meta["tokenizer_sha256"],
        data_sha256=meta["data_sha256"],
        rope_theta=meta.get("rope_theta"),
    )


def _only_plain_lora(path: Path, config: Mapping[str, object], tensors: Mapping[str, Shaped[Tensor, " ..."]]) -> None:
    """Raise AdapterError for features of PEFT that luthier does not support, listing all of them."""
    foreign = [f"{k} {config[k]!r}" for k in _FOREIGN if config.get(k) not in (None, False, "none", {}, [])]
    if config.get("peft_type") != "LORA":
        foreign.append(f"peft_type {config.get('peft_type')!r}")
    known = (".lora_A.weight", ".lora_B.weight")
    foreign += [f"tensor {n}" for n in tensors if not n.startswith(_PREFIX) or not n.endswith(known)]
    if foreign:
        raise AdapterError(f"{path}: is not a plain LoRA adapter: {', '.join(foreign[:8])}", "use it with peft itself")


_FOREIGN = (
    "use_dora", "bias", "modules_to_save", "fan_in_fan_out", "lora_bias",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "target_parameters",
)  # fmt: skip


def digest(path: Path) -> str:
    """Return a digest of an adapter's values and settings."""
    return " ".join(files.sha256(path / name) for name in (WEIGHTS, CONFIG))


def check_base(adapter: Adapter, base: Path, fingerprint: Fingerprint, tokenizer_sha256: str) -> None:
    """Raise AdapterError, listing every mismatch, unless ``base`` is the model that the adapter was trained on."""
    assert adapter.facts
    wrong = fingerprint.mismatches(adapter.facts.base)
    if tokenizer_sha256 != adapter.facts.tokenizer_sha256:
        wrong.append("the tokenizer differs")
    if wrong:
        raise AdapterError(
            f"{base}: is not the base model of {adapter.path}: {'; '.join(wrong)}",
            f"use the base model it was trained on (then: {adapter.base_path})",
        )


def apply(model: ModuleTree, adapter: Adapter, modules: Modules | None = None) -> dict[str, LoraLinear]:
    """Attach the adapter to its base model in place, and return the new layers by module name.

    modules: published module names of the base model's family, for adapters that use them. Raises AdapterError.
    """
    native = to_native(updates(adapter), modules or {})
    linear = {n: m for n, m in model.named_modules() if is_linear(m)}
    unknown = [n for n in native if n not in linear]
    if unknown:
        raise AdapterError(
            f"{adapter.path}: adapts {listed(unknown)}, which the base model does not have",
            "use the base model it was trained on",
        )
    wrong = [
        f"{name}.{part} is {list(tensor.shape)}, the base needs {list(needed)}"
        for name, u in native.items()
        for part, tensor, needed in (
            ("lora_A", u.a, (u.config.r, linear[name].in_features)),
            ("lora_B", u.b, (linear[name].out_features, u.config.r)),
        )
        if tuple(tensor.shape) != needed
    ]
    if wrong:
        raise AdapterError(
            f"{adapter.path}: does not fit the base: {'; '.join(wrong[:20])}", "use the right base model"
        )
    names, configs = tuple(native), {n: u.config for n, u in native.items()}
    layers = attach(model, adapter.lora, Targets(names, names), seed=0, configs=configs)
    for name, u in native.items():
        layers[name].set_update(u.a, u.b)
    return layers


def updates(adapter: Adapter) -> dict[str, Update]:
    """Return A and B of each module, named as in the file. Raises AdapterError if one is missing."""
    complete, missing = {}, []
    for module in adapter.modules:
        names = [f"{_PREFIX}{module}.{part}.weight" for part in _AB]
        missing += [n for n in names if n not in adapter.tensors]
        if not missing:
            a, b = (adapter.tensors[n] for n in names)
            complete[module] = Update(a, b, adapter.configs.get(module, adapter.lora))
    if missing:
        raise AdapterError(f"{adapter.path}: does not fit the base: lacks {', '.join(missing[:8])}", "copy it again")
    return complete


_AB = ("lora_A", "lora_B")


def _peft_config(lora: LoraConfig, targets: Targets, base: Path) -> dict[str, object]:
    """Build the content of ``adapter_config.json``."""
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
    """Read a JSON object. Raises AdapterError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.parent}: holds no {path.name}", "give a run or adapter directory") from None
    except (OSError, ValueError) as e:
        raise AdapterError(f"{path}: cannot be read ({e})", "copy the adapter directory again") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: is not a JSON object", "copy the adapter directory again")
    return value
