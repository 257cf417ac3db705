"""Define a family: how a published checkpoint is converted to a native transformers model, and back.

This module handles names, row splits and configuration keys; it opens no files and handles no tokenizers or templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from jaxtyping import Shaped

    from luthier.models.checkpoint_reader import Shards

Modules = Mapping[str, tuple[tuple[str, int], ...]]
"""Published linear module -> its native modules, with the number of rows of each (0: all)."""

_BLOCK = 4096  # rows normalised together


@dataclass(frozen=True, slots=True)
class Rule:
    """The conversion of one published tensor to native ones.

    source:    its published name; ``{i}`` stands for the layer.
    parts:     native names, in the order of their rows.
    rows:      rows of each part; empty if the tensor is not split.
    unit_rows: scale every row to length one (Baichuan2's NormHead).
    """

    source: str
    parts: tuple[str, ...]
    rows: tuple[int, ...] = ()
    unit_rows: bool = False

    def at(self, layer: int) -> Rule:
        """Return the rule for one layer, with ``{i}`` replaced."""

        def name(text: str) -> str:
            return text.replace("{i}", str(layer))

        return Rule(name(self.source), tuple(map(name, self.parts)), self.rows, self.unit_rows)

    def read(self, shards: Shards, dtype: torch.dtype | None = None) -> list[tuple[str, Shaped[Tensor, " ..."]]]:
        """Read the published tensor; returns its parts in ``dtype``, or as stored. Raises ModelError."""
        # only a tensor that is one part is converted while it is read: others are copied or computed with in any case
        tensor = shards.read(self.source, None if self.rows or self.unit_rows else dtype)
        return list(self.split(tensor, dtype or tensor.dtype, own=True))

    def split(
        self, tensor: Shaped[Tensor, "rows ..."], dtype: torch.dtype, own: bool = False
    ) -> Iterator[tuple[str, Shaped[Tensor, "_rows ..."]]]:
        """Split a tensor [sum(rows), ...] into its parts; yields each name and its tensor in ``dtype``.

        own: the caller does not use ``tensor`` any more, so that a part may reuse its memory.
        """
        if self.unit_rows:
            unit = tensor if own and tensor.dtype is dtype else torch.empty_like(tensor, dtype=dtype)
            for start in range(0, len(tensor), _BLOCK):  # converting all of it to fp32 would need gigabytes
                unit[start : start + _BLOCK] = F.normalize(tensor[start : start + _BLOCK].float(), dim=1)
            tensor = unit
        if not self.rows:
            yield self.parts[0], tensor.to(dtype)
            return
        for name, part in zip(self.parts, torch.split(tensor, list(self.rows)), strict=True):
            yield name, part.to(dtype, copy=True)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of published checkpoint and its conversion.

    name:     the name used in messages.
    native:   the transformers model_type that it is converted to.
    template: the name of the chat template, for checkpoints that ship none; None: their own is used.
    config:   published config.json -> native configuration; None: it is already native.
    layer_rules: native configuration -> the published tensors, ``{i}`` for the layer; None: names are already native.
    notes:    native configuration -> notes for the user of this checkpoint.
    """

    name: str
    native: str
    template: str | None = None
    config: Callable[[Mapping[str, object]], PretrainedConfig] | None = None
    layer_rules: Callable[[PretrainedConfig], Sequence[Rule]] | None = None
    notes: Callable[[PretrainedConfig], Sequence[str]] = lambda _: ()

    def rules(self, config: PretrainedConfig) -> list[Rule]:
        """List the rules of every published tensor of this model; empty if published names are already native."""
        if self.layer_rules is None:
            return []
        rules: list[Rule] = []
        for rule in self.layer_rules(config):
            layers = range(config.num_hidden_layers) if "{i}" in rule.source else (0,)
            rules += [rule.at(i) for i in layers]
        return rules

    def modules(self, config: PretrainedConfig) -> Modules:
        """Map the checkpoint's own names of its linear modules to native ones; empty if they are the same."""
        return {
            rule.source.removesuffix(".weight"): tuple(
                (part.removesuffix(".weight"), rows) for part, rows in zip(rule.parts, rule.rows or (0,), strict=True)
            )
            for rule in self.rules(config)
            if ".layers." in rule.source and rule.source.endswith(".weight") and "norm" not in rule.source
        }
