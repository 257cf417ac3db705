"""Rotate each row of a batch by the factors for its own length, for models whose factors depend on it (longrope)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.models.directory import rotary_limit
from luthier.models.protocols import CausalLM

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class RowRotary(nn.Module):
    """Computes what ``base`` computes, row by row: ``base`` chooses one kind of factors by the longest row of a call.

    limit: ``models.directory.rotary_limit``.
    """

    def __init__(self, base: nn.Module, limit: int) -> None:
        super().__init__()
        self.base = base
        self.limit = limit
        self._lengths: Tensor | None = None

    @contextmanager
    def rows_of(self, lengths: Int[Tensor, "rows 1"]) -> Iterator[None]:
        """Within the block, the rows of a call are of these lengths. Outside, the module is ``base``."""
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    def forward(
        self, x: Float[Tensor, "rows tokens hidden"], position_ids: Int[Tensor, "rows tokens"], **options: object
    ) -> tuple[Float[Tensor, "rows tokens rotary"], ...]:
        """Return cos and sin of the positions, [rows, tokens, rotary] each."""
        if self._lengths is None:
            tables: tuple[Tensor, ...] = self.base(x, position_ids, **options)
            return tables
        short = self.base(x, position_ids.clamp_max(self.limit - 1), **options)
        beyond = torch.full_like(position_ids[:, :1], self.limit)  # makes ``base`` choose the factors of long rows
        long = self.base(x, torch.cat([position_ids, beyond], 1), **options)
        is_long = (self._lengths > self.limit)[..., None]
        return tuple(torch.where(is_long, b[:, :-1], a) for a, b in zip(short, long, strict=True))


def rotate_by_row(model: CausalLM) -> RowRotary | None:
    """Replace the model's rotary embedding by a ``RowRotary`` if its factors depend on the length; returns that."""
    decoder: Any = model.get_decoder()
    limit = rotary_limit(model.config)
    if limit is None or not hasattr(decoder, "rotary_emb"):
        return None
    if not isinstance(decoder.rotary_emb, RowRotary):
        decoder.rotary_emb = RowRotary(decoder.rotary_emb, limit)
    return decoder.rotary_emb
