"""Whether a checkpoint's tensors are a model's, decided from names and shapes alone, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from luthier.errors import ModelError
from luthier.models.checkpoint_reader import Shards
from luthier.models.directory import family_of
from luthier.models.families import Rule
from luthier.models.protocols import CausalLM

Shape = tuple[int, ...]
# tables that older checkpoints carry and every native class computes for itself
_BUFFERS = re.compile(r"(.*\.)?(inv_freq|rotary_emb\.\w+_cached|masked_bias|rotary_pos_emb\.\w+)")


@dataclass(slots=True)
class Fit:
    """rules: published name -> what becomes of it; ignored: known buffers; missing: native names that tie to others."""

    rules: dict[str, Rule] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def told(self, limit: int = 20) -> str:
        more = f"; and {len(self.problems) - limit} more" if len(self.problems) > limit else ""
        return "; ".join(self.problems[:limit]) + more


def match(shapes: Mapping[str, Shape], rules: Sequence[Rule], model: CausalLM) -> Fit:
    """Hold a checkpoint's headers against a model on the meta device.

    rules: the family's; empty: published names are the native ones.
    """
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    known = {r.source: r for r in rules or (Rule(name, (name,)) for name in expected)}
    fit, wrong = Fit(), dict[str, str]()
    for name, shape in shapes.items():
        rule = known.get(name)
        if rule is None:
            ignored = _BUFFERS.fullmatch(name) or _on_its_list(model, name)
            (fit.ignored if ignored else fit.problems).append(name if ignored else f"unexpected: {name}")
            continue
        fit.rules[name] = rule
        needed = _shape(rule, expected)
        if needed != shape:
            wrong[name] = f"mismatched: {name} is {list(shape)}, expected {list(needed)}"
    there = {part for rule in fit.rules.values() for part in rule.parts}
    missing = [name for name in expected if name not in there]
    pairs = {**tied, **{source: target for target, source in tied.items()}}
    fit.missing = [name for name in missing if pairs.get(name) in there]
    lost = [name for name in missing if name not in fit.missing]
    source = {part: rule.source for rule in known.values() for part in rule.parts}
    absent = dict.fromkeys(source.get(name, name) for name in lost)
    fit.problems = [
        *(f"missing: {name}" for name in collapse(absent)),
        *(f"unexpected: {name}" for name in collapse(p.removeprefix("unexpected: ") for p in fit.problems)),
        *wrong.values(),
    ]
    return fit


def collapse(names: Iterable[str]) -> list[str]:
    """``model.layers.0-31.mlp.up_proj.weight`` for 32 names that differ in the layer alone."""
    groups: dict[str, list[int | None]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        key = name[: found.start(1)] + "{}" + name[found.end(1) :] if found else name
        groups.setdefault(key, []).append(int(found.group(1)) if found else None)
    return [key.replace("{}", _numbers([n for n in found if n is not None])) for key, found in groups.items()]


def _numbers(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _shape(rule: Rule, expected: Mapping[str, Shape]) -> Shape:
    parts = [expected[name] for name in rule.parts]
    return (sum(p[0] for p in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]


def _on_its_list(model: CausalLM, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(p, name) for p in patterns)


def empty_model(config: PretrainedConfig) -> CausalLM:
    """The model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return _build(config)


def base_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model itself, tied ones once."""
    return sum(p.numel() for p in empty_model(config).parameters())


def _build(config: PretrainedConfig, dtype: torch.dtype | None = None) -> CausalLM:
    try:
        model: CausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as e:  # sizes that do not fit each other, unknown activations, ...
        raise ModelError(
            f"config.json describes no model that can be built ({' '.join(str(e).split())[:200]})",
            "download the model again",
        ) from None
    return model


def finish(model: CausalLM, path: Path, fit: Fit, device: torch.device | str) -> CausalLM:
    """Tie what is tied, read generation_config.json, and hand the model over in evaluation mode."""
    model.tie_weights(missing_keys=set(fit.missing), recompute_mapping=False)
    if (path / "generation_config.json").is_file():
        model.generation_config = _generation_config(path)
    return model.to(device).eval()


def native_names(path: Path, config: PretrainedConfig) -> list[str]:
    """Native names of the checkpoint's tensors, in file order; only headers are read. Raises ModelError."""
    shards = Shards.open(path)
    fit = match(shards.shapes, family_of(path).rules(config), empty_model(config))
    refuse_unfit(shards, fit)
    return [part for name in shards.in_file_order() if name in fit.rules for part in fit.rules[name].parts]


def published_tensors(path: Path, config: PretrainedConfig) -> Iterator[tuple[str, Rule | None, torch.Tensor]]:
    """(published name, what becomes of it, tensor as stored), one at a time; no rule: the model computes it itself.

    Raises ModelError as ``load_weights`` does, before the first one is read.
    """
    shards = Shards.open(path)
    fit = match(shards.shapes, family_of(path).rules(config), empty_model(config))
    refuse_unfit(shards, fit)
    for name in shards.in_file_order():
        yield name, fit.rules.get(name), shards.read(name)


def native_tensors(
    shards: Shards, fit: Fit, dtype: torch.dtype | None = None, as_stored: Collection[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every native tensor in ``dtype`` (None, and those named in ``as_stored``: in the type it is stored in).

    Raises ModelError where the checkpoint does not fit.
    """
    refuse_unfit(shards, fit)
    for name in shards.in_file_order():
        if rule := fit.rules.get(name):
            tensor = shards.read(name)
            kept = dtype is None or not set(rule.parts).isdisjoint(as_stored)
            yield from rule.split(tensor, tensor.dtype if kept else dtype, own=True)  # type: ignore[arg-type]


def refuse_unfit(shards: Shards, fit: Fit) -> None:
    """Raise ModelError where a checkpoint is not this model's."""
    if fit.problems:
        raise ModelError(f"{shards.path}: the weights do not fit the model ({fit.told()})", "download the model again")


def hollow(config: PretrainedConfig, dtype: torch.dtype) -> CausalLM:
    """The model with parameters on meta and its computed tables in memory, as ``from_pretrained`` makes them."""
    with init_empty_weights(include_buffers=False):
        return _build(config, dtype)


def put(model: CausalLM, name: str, tensor: torch.Tensor) -> None:
    """Give a parameter or a buffer its value."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def _generation_config(path: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as e:  # transformers validates with many kinds of error
        file = path / "generation_config.json"
        raise ModelError(f"{file}: cannot be read ({' '.join(str(e).split())[:200]})", "download it again") from None
