"""Run several adapters on one base model in memory: each row of a batch gets the update of its own adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.lora.layers import LoraLinear
from luthier.models.protocols import ModuleTree
from luthier.models.quantization import QuantLinear

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(slots=True)
class Routes:
    """Which rows of the current batch belong to which adapter. Rows in no group use the base model.

    groups:   (adapter, row indices); None instead of indices if the whole batch uses this adapter.
    adapters: the layers of each adapter by module name.
    """

    adapters: dict[str, Mapping[str, LoraLinear]] = field(default_factory=dict)
    groups: list[tuple[str, Int[Tensor, " _rows"] | None]] = field(default_factory=list)

    def set(self, adapters: list[str | None], device: torch.device) -> None:
        """Assign adapters to the rows of the next batch. adapters: one per row, None for the base model."""
        names = dict.fromkeys(a for a in adapters if a is not None)
        if len(set(adapters)) == 1:
            self.groups = [(name, None) for name in names]
            return
        self.groups = [
            (name, torch.tensor([i for i, a in enumerate(adapters) if a == name], device=device)) for name in names
        ]


class BankLinear(nn.Module):
    """A frozen linear layer with the updates of several adapters; equals each adapter's ``LoraLinear`` on its rows."""

    def __init__(self, base: nn.Linear | QuantLinear, routes: Routes) -> None:
        super().__init__()
        self.base = base
        self._routes = routes
        self._updates: dict[str, tuple[Tensor, Tensor, float]] = {}

    def add(self, adapter: str, layer: LoraLinear, dtype: torch.dtype) -> None:
        """Add an adapter's update. dtype: of the base model, so that A and B are converted only once."""
        self._updates[adapter] = (layer.lora_A.detach().to(dtype), layer.lora_B.detach().to(dtype), layer.scaling)

    def forward(self, x: Float[Tensor, "rows tokens in"]) -> Float[Tensor, "rows tokens out"]:
        """x [rows, tokens, in] -> [rows, tokens, out]."""
        out: Tensor = self.base(x)
        for adapter, rows in self._routes.groups:
            if adapter not in self._updates:
                continue
            a, b, scaling = self._updates[adapter]
            part = x if rows is None else x.index_select(0, rows)
            change = F.linear(F.linear(part, a.to(x.dtype)) * scaling, b.to(x.dtype))
            out = out + change if rows is None else out.index_add(0, rows, change)
        return out


def install(model: ModuleTree, adapters: Iterable[tuple[str, Mapping[str, LoraLinear]]], dtype: torch.dtype) -> Routes:
    """Replace every layer that an adapter changes with a ``BankLinear``. Returns the routes that select adapters.

    adapters: (name, layers by module name) of each. dtype: of the base model.
    """
    routes = Routes()
    for adapter, layers in adapters:
        routes.adapters[adapter] = layers
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            bank = model.get_submodule(name)
            if not isinstance(bank, BankLinear):
                assert isinstance(bank, nn.Linear | QuantLinear)
                bank = BankLinear(bank, routes)
                setattr(model.get_submodule(parent), leaf, bank)
            bank.add(adapter, layer, dtype)
    return routes
