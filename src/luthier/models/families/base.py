"""What a family is: how its published checkpoint becomes a native transformers model, and back.

Knows: names, row cuts and configuration keys. Does not know: files, tokenizers, templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

Modules = Mapping[str, tuple[tuple[str, int], ...]]
"""Published linear module -> its native modules and the rows of each (0: all)."""

_BLOCK = 4096  # rows normalised at a time


@dataclass(frozen=True, slots=True)
class Rule:
    """One published tensor and the native ones it becomes.

    source:    its published name; ``{i}`` stands for the layer.
    parts:     native names, in the order of their rows.
    rows:      rows of each part; empty where the tensor stays whole.
    unit_rows: every row is scaled to length one (Baichuan2's NormHead).
    """

    source: str
    parts: tuple[str, ...]
    rows: tuple[int, ...] = ()
    unit_rows: bool = False

    def at(self, layer: int) -> Rule:
        def name(text: str) -> str:
            return text.replace("{i}", str(layer))

        return Rule(name(self.source), tuple(map(name, self.parts)), self.rows, self.unit_rows)

    def split(self, tensor: Tensor, dtype: torch.dtype, own: bool = False) -> Iterator[tuple[str, Tensor]]:
        """[sum(rows), ...] -> each part's name and its tensor in ``dtype``, in memory of its own.

        own: ``tensor`` is nobody else's, and its memory may be a part's.
        """
        if self.unit_rows:
            unit = tensor if own and tensor.dtype is dtype else torch.empty_like(tensor, dtype=dtype)
            for start in range(0, len(tensor), _BLOCK):  # the whole in fp32 would be a spike of gigabytes
                unit[start : start + _BLOCK] = F.normalize(tensor[start : start + _BLOCK].float(), dim=1)
            tensor = unit
        if not self.rows:
            yield self.parts[0], tensor.to(dtype)
            return
        for name, part in zip(self.parts, torch.split(tensor, list(self.rows)), strict=True):
            yield name, part.to(dtype, copy=True)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of published checkpoint.

    name:     how it is called in messages.
    native:   transformers' model_type it becomes.
    template: the chat template's name, for checkpoints that ship none; None: their own decides.
    config:   published config.json -> native configuration; None: it is native already.
    layer_rules: native configuration -> the published tensors, ``{i}`` for the layer; None: names are native already.
    notes:    native configuration -> what a user of this checkpoint should know.
    """

    name: str
    native: str
    template: str | None = None
    config: Callable[[Mapping[str, object]], PretrainedConfig] | None = None
    layer_rules: Callable[[PretrainedConfig], Sequence[Rule]] | None = None
    notes: Callable[[PretrainedConfig], Sequence[str]] = lambda _: ()

    def rules(self, config: PretrainedConfig) -> list[Rule]:
        """Every published tensor of this model; empty where published names are the native ones."""
        if self.layer_rules is None:
            return []
        found: list[Rule] = []
        for rule in self.layer_rules(config):
            layers = range(config.num_hidden_layers) if "{i}" in rule.source else (0,)
            found += [rule.at(i) for i in layers]
        return found

    def modules(self, config: PretrainedConfig) -> Modules:
        """The checkpoint's own names of its linear modules; empty where they are the native ones."""
        return {
            rule.source.removesuffix(".weight"): tuple(
                (part.removesuffix(".weight"), rows) for part, rows in zip(rule.parts, rule.rows or (0,), strict=True)
            )
            for rule in self.rules(config)
            if ".layers." in rule.source and rule.source.endswith(".weight") and "norm" not in rule.source
        }
