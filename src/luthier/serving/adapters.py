"""Several adapters over one base in memory: every row of a batch gets the update of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.lora.layers import LoraLinear
from luthier.models.quantization import QuantLinear


@dataclass(slots=True)
class Routes:
    """Which rows of the batch in progress belong to which adapter; rows that are in no group are the base's.

    groups: (adapter, row indices), None for a batch that is all the adapter's.
    """

    groups: list[tuple[str, Tensor | None]] = field(default_factory=list)

    def set(self, adapters: list[str | None], device: torch.device) -> None:
        """adapters: of each row, None for the base."""
        names = dict.fromkeys(a for a in adapters if a is not None)
        if len(set(adapters)) == 1:
            self.groups = [(name, None) for name in names]
            return
        self.groups = [
            (name, torch.tensor([i for i, a in enumerate(adapters) if a == name], device=device)) for name in names
        ]


class BankLinear(nn.Module):
    """A frozen linear layer and its updates by adapter; computes what that adapter's ``LoraLinear`` would."""

    def __init__(self, base: nn.Linear | QuantLinear, routes: Routes) -> None:
        super().__init__()
        self.base = base
        self._routes = routes
        self._updates: dict[str, tuple[Tensor, Tensor, float]] = {}

    def add(self, adapter: str, layer: LoraLinear, dtype: torch.dtype) -> None:
        """dtype: the base's, so that A and B are converted once."""
        self._updates[adapter] = (layer.lora_A.detach().to(dtype), layer.lora_B.detach().to(dtype), layer.scaling)

    def forward(self, x: Tensor) -> Tensor:
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


def install(model: nn.Module, adapters: Iterable[tuple[str, Mapping[str, LoraLinear]]], dtype: torch.dtype) -> Routes:
    """Put a ``BankLinear`` in place of every layer that some adapter changes. adapters: name, layers by module."""
    routes = Routes()
    for adapter, layers in adapters:
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            found = model.get_submodule(name)
            if not isinstance(found, BankLinear):
                assert isinstance(found, nn.Linear | QuantLinear)
                found = BankLinear(found, routes)
                setattr(model.get_submodule(parent), leaf, found)
            found.add(adapter, layer, dtype)
    return routes
