"""Apply dropout whose mask depends on (seed, step, micro-batch, layer, row, column) only: no state to save.

One mask per input: adapters that read the same activations (q, k and v; gate and up) drop the same elements.
Source of the mixer: "lowbias32", https://github.com/skeeto/hash-prospector (public domain).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.kernels import native

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_WORD = 0xFFFFFFFF


def mixed(x: int) -> int:
    """Hash the low 32 bits of ``x`` to 32 bits."""
    x &= _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


@dataclass(slots=True)
class DropoutState:
    """Seed, step and micro-batch, from which all adapter layers of a model derive their masks. off: no dropout."""

    seed: int = 0
    step: int = 0
    micro: int = 0
    off: bool = False

    def key(self, group: int) -> int:
        """Return the 32-bit key of the mask for one input of one layer."""
        key = mixed(self.seed)
        for part in (self.step, self.micro, group):
            key = mixed(key + 0x9E3779B9 * (part + 1))
        return key


def threshold(p: float) -> int:
    """Return the 32-bit threshold: elements whose hash is below it are dropped."""
    return round(p * 2**32)


def keep(
    key: int, rows: int, columns: int, p: float, device: torch.device | str = "cpu"
) -> Bool[Tensor, "rows columns"]:
    """Return the mask [rows, columns] bool, true to keep; this is its definition, in wrapping 32-bit arithmetic."""
    row = torch.arange(rows, dtype=torch.int32, device=device) * _signed(0x9E3779B9) + _signed(key)
    column = torch.arange(columns, dtype=torch.int32, device=device) * _signed(0x85EBCA6B)
    hashed = _mixed(_mixed(row)[:, None] + column[None])
    low = torch.iinfo(torch.int32).min  # makes the signed comparison an unsigned one
    return (hashed ^ low) >= _signed(threshold(p) ^ 0x80000000)


def _mixed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(x: int) -> int:
    x &= _WORD
    return x - 2**32 if x >= 2**31 else x


def dropout(x: Float[Tensor, "*batch columns"], p: float, key: int) -> Float[Tensor, "*batch columns"]:
    """Apply dropout to x [..., columns]; kept elements are scaled by 1 / (1 - p).

    Rows are counted over all leading dimensions.
    """
    out: Tensor = _Dropout.apply(x, p, key)  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*batch columns"], p: float, key: int) -> Float[Tensor, "*batch columns"]:
        ctx.p, ctx.key = p, key
        return _dropped(x, p, key)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*batch columns"]) -> tuple[Float[Tensor, "*batch columns"], None, None]:
        return _dropped(grad, ctx.p, ctx.key), None, None


def _dropped(x: Float[Tensor, "*batch columns"], p: float, key: int) -> Float[Tensor, "*batch columns"]:
    kernel = _kernel(x.dtype) if x.device.type == "cpu" else None
    columns = x.shape[-1]
    rows = x.numel() // columns
    if kernel is None:
        return _defined(x.reshape(rows, columns), p, key).view(x.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernel(rows, columns, x.contiguous().view(rows, columns), out.view(rows, columns), key, threshold(p), 1 / (1 - p))
    return out


def _defined(x: Float[Tensor, "rows columns"], p: float, key: int) -> Float[Tensor, "rows columns"]:
    """Apply dropout to x [rows, columns] with torch's operations; this is the definition."""
    mask = keep(key, len(x), x.shape[1], p, x.device)
    return torch.where(mask, x * (1 / (1 - p)), torch.zeros((), dtype=x.dtype, device=x.device))


@cache
def _kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """Return the compiled function, verified once against the definition; None if unavailable or different."""
    try:
        kernel = native.kernels(dtype).dropout
    except native.Unavailable:
        return None
    x, p, key = torch.linspace(-4, 4, 32 * 48, dtype=dtype).view(32, 48), 0.3, mixed(1)
    out = torch.empty_like(x)
    kernel(32, 48, x, out, key, threshold(p), 1 / (1 - p))
    return kernel if torch.allclose(out.float(), _defined(x, p, key).float(), rtol=torch.finfo(dtype).eps) else None
