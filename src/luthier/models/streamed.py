"""A whole model's forward pass with one layer's weights in memory at a time, in fp32: what proving a model costs.

Names are the native ones. Each module fetches its parameters when it is entered and drops them when it is left.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from luthier.models.checkpoint_reader import Shards
from luthier.models.directory import family_of
from luthier.models.native_model import empty_model, hollow, match, refuse_unfit
from luthier.models.protocols import CausalLM

Read = Callable[[str], Tensor]


def reader(path: Path, config: PretrainedConfig) -> Read:
    """native name -> its tensor in fp32, from a checkpoint in any layout. Raises ModelError where it does not fit."""
    shards = Shards.open(path)
    model = empty_model(config)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    fit = match(shards.shapes, family_of(path).rules(config), model)
    refuse_unfit(shards, fit)
    sources = {part: (name, rule) for name, rule in fit.rules.items() for part in rule.parts}
    same = {**{b: a for a, b in tied.items()}, **tied}  # a tied pair may be there once, under either name

    def read(name: str) -> Tensor:
        if name in tied or name not in sources:
            name = next(n for n in (same[name], name) if n in sources)
        source, rule = sources[name]
        return dict(rule.split(shards.read(source), torch.float32))[name]

    return read


def streamed(config: PretrainedConfig, read: Read) -> CausalLM:
    """The model without weights; ``read`` gives each one [as stored, fp32] whenever its module runs."""
    model = hollow(config, torch.float32).eval().requires_grad_(False)
    for prefix, module in model.named_modules():
        names = {leaf: f"{prefix}.{leaf}" for leaf, p in module._parameters.items() if p is not None}
        if names:
            _on_demand(module, names, read)
    return model


def _on_demand(module: nn.Module, names: dict[str, str], read: Read) -> None:
    hollow_ones = {leaf: module._parameters[leaf] for leaf in names}

    def fetch(*_: object) -> None:
        for leaf, name in names.items():
            module._parameters[leaf] = nn.Parameter(read(name), requires_grad=False)

    def drop(*_: object) -> None:
        module._parameters.update(hollow_ones)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)
