"""Adapters in a checkpoint's own module names <-> the native modules they became. Exact both ways.

published  W_pack          A [r, in]     B [3 out, r]      one update on a fused matrix
native     q_proj, k, v    A [r, in]     B [out, r] each   the same A, B cut by rows

native     q_proj, k, v    A [r, in]     B [out, r] each   three updates, each with an A of its own
published  W_pack          A [3r, in]    B [3 out, 3r]     stacked; B block diagonal, zero where nothing trained
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from luthier.config import LoraConfig
from luthier.models.families import Modules


@dataclass(frozen=True, slots=True)
class Update:
    """One module's low-rank update ``scaling * B @ A``: A [r, in], B [out, r]."""

    a: Tensor
    b: Tensor
    config: LoraConfig


def to_native(updates: Mapping[str, Update], modules: Modules) -> dict[str, Update]:
    """Updates of published modules as updates of native ones; names that are native already stay."""
    found: dict[str, Update] = {}
    for name, update in updates.items():
        parts = modules.get(name, ((name, 0),))
        rows = [rows or update.b.shape[0] for _, rows in parts]
        for (part, _), b in zip(parts, torch.split(update.b, rows), strict=True):
            found[part] = replace(update, b=b.contiguous())
    return found


def to_original(updates: Mapping[str, Update], modules: Modules) -> dict[str, Update]:
    """Updates of native modules as updates of the published ones, of the summed rank where several were fused."""
    found: dict[str, Update] = {}
    taken: set[str] = set()
    for source, parts in modules.items():
        there = [(part, rows) for part, rows in parts if part in updates]
        taken.update(part for part, _ in there)
        if len(parts) == 1 and there:
            found[source] = updates[parts[0][0]]
        elif there:
            found[source] = _fused([(updates.get(part), rows) for part, rows in parts])
    return {**found, **{name: update for name, update in updates.items() if name not in taken}}


def _fused(parts: list[tuple[Update | None, int]]) -> Update:
    trained = [u for u, _ in parts if u]
    config = trained[0].config
    rank = sum(u.a.shape[0] for u in trained)
    b = torch.zeros(sum(rows for _, rows in parts), rank, dtype=trained[0].b.dtype)
    row = column = 0
    for update, rows in parts:
        if update:
            width = update.a.shape[0]
            b[row : row + rows, column : column + width] = update.b
            column += width
        row += rows
    # the scaling must stay: alpha / r, or alpha / sqrt(r) where rank-stabilised
    growth = math.sqrt(rank / config.r) if config.use_rslora else rank / config.r
    wider = config.model_copy(update={"r": rank, "lora_alpha": config.lora_alpha * growth})
    return Update(torch.cat([u.a for u in trained]), b, wider)
