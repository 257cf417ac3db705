"""Run a model's forward pass in fp32 with the weights of one module in memory at a time, to verify exports.

Names are native. Each module loads its parameters before its forward pass and drops them after it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from luthier.models.checkpoint_reader import Shards
from luthier.models.directory import family_of
from luthier.models.native_model import empty_model, empty_with_buffers, match, refuse_unfit
from luthier.models.protocols import CausalLM

if TYPE_CHECKING:
    from jaxtyping import Float

    Read = Callable[[str], Float[Tensor, " ..."]]  # reads a tensor by native name


def reader(path: Path, config: PretrainedConfig) -> Read:
    """Return a function that reads tensors in fp32 by native name, from any layout.

    Raises ModelError if the checkpoint does not fit the model.
    """
    shards = Shards.open(path)
    model = empty_model(config)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    fit = match(shards.shapes, family_of(path).rules(config), model)
    refuse_unfit(shards, fit)
    sources = {part: rule for rule in fit.rules.values() for part in rule.parts}
    partner = {**{b: a for a, b in tied.items()}, **tied}  # a tied pair may be stored once, under either name

    def read(name: str) -> Tensor:
        if name in tied or name not in sources:
            name = next(n for n in (partner[name], name) if n in sources)
        return dict(sources[name].read(shards, torch.float32))[name]

    return read


def streamed(config: PretrainedConfig, read: Read) -> CausalLM:
    """Build the model without weights; each module loads its own with ``read`` (fp32) when it runs."""
    model = empty_with_buffers(config, torch.float32).eval().requires_grad_(False)
    for prefix, module in model.named_modules():
        names = {leaf: f"{prefix}.{leaf}" for leaf, p in module._parameters.items() if p is not None}
        if names:
            _load_on_demand(module, names, read)
    return model


def _load_on_demand(module: nn.Module, names: dict[str, str], read: Read) -> None:
    placeholders = {leaf: module._parameters[leaf] for leaf in names}

    def fetch(*_: object) -> None:
        for leaf, name in names.items():
            module._parameters[leaf] = nn.Parameter(read(name), requires_grad=False)

    def drop(*_: object) -> None:
        module._parameters.update(placeholders)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)
