"""Convert adapters between a checkpoint's own module names and native ones, exactly in both directions.

published  W_pack          A [r, in]     B [3 out, r]      one update on a fused matrix
native     q_proj, k, v    A [r, in]     B [out, r] each   the same A, B cut by rows

native     q_proj, k, v    A [r, in]     B [out, r] each   three updates, each with its own A
published  W_pack          A [3r, in]    B [3 out, 3r]     stacked; B block diagonal, zero for untrained parts
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.config import LoraConfig
from luthier.models.families import Modules

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class Update:
    """The low-rank update of one module, ``scaling * B @ A``: A [r, in], B [out, r].

    The ranks of A and B from a file may differ; applying, merging and exporting refuse such an adapter.
    """

    a: Float[Tensor, "_rank in"]
    b: Float[Tensor, "out _rank"]
    config: LoraConfig


def to_native(updates: Mapping[str, Update], modules: Modules) -> dict[str, Update]:
    """Convert updates of published modules to native ones; native names stay as they are."""
    native: dict[str, Update] = {}
    for name, update in updates.items():
        parts = modules.get(name, ((name, 0),))
        rows = [rows or update.b.shape[0] for _, rows in parts]
        for (part, _), b in zip(parts, torch.split(update.b, rows), strict=True):
            native[part] = replace(update, b=b.contiguous())
    return native


def to_original(updates: Mapping[str, Update], modules: Modules) -> dict[str, Update]:
    """Convert updates of native modules to published ones; the ranks of fused modules add up."""
    original: dict[str, Update] = {}
    converted: set[str] = set()
    for source, parts in modules.items():
        trained = [part for part, _ in parts if part in updates]
        converted.update(trained)
        if len(parts) == 1 and trained:
            original[source] = updates[parts[0][0]]
        elif trained:
            original[source] = _fused([(updates.get(part), rows) for part, rows in parts])
    return {**original, **{name: update for name, update in updates.items() if name not in converted}}


def _fused(parts: list[tuple[Update | None, int]]) -> Update:
    """Join updates of the parts of one fused matrix; None stands for an untrained part of that many rows."""
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
    # the scaling must stay the same: alpha / r, or alpha / sqrt(r) if rank-stabilised
    growth = math.sqrt(rank / config.r) if config.use_rslora else rank / config.r
    wider = config.model_copy(update={"r": rank, "lora_alpha": config.lora_alpha * growth})
    return Update(torch.cat([u.a for u in trained]), b, wider)
