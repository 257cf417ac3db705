"""Compute linear layers that read the same input as one matrix product, adapters included.

A layer with an adapter is x W^T + z B^T with z = scaling * dropout(x) A^T. With the layers stacked by rows,

    [x | z] [W | B]^T

is one product, about as fast as the frozen layers' own; the gradient of [x | z] likewise contains that of z. The
columns of [W | B] are padded to a multiple of the processor's tile width.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier.kernels.dropout import DropoutState, threshold
from luthier.kernels.native import Argument, Kernels
from luthier.lora.layers import LoraLinear
from luthier.models.quantization import BLOCK, QuantLinear, absolute_maxima, code_table

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

_ALIGNED = 64  # bytes: a cache line
_SPARE = 1.5
Linear = nn.Linear | QuantLinear


def mapped(elements: int, dtype: torch.dtype) -> Shaped[Tensor, " elements"]:
    """Allocate a tensor [elements] in new zero-filled pages."""
    size = max(1, elements) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)


class Bump:
    """Allocator of tensors, one after another in one block of memory; ``reset`` frees all of them at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._block = mapped(0, dtype)
        self._used = self._reserved = 0

    @staticmethod
    def rounded(elements: int, dtype: torch.dtype) -> int:
        step = _ALIGNED // dtype.itemsize
        return -(-elements // step) * step

    def reserve(self, elements: int) -> None:
        """Free everything and make room for ``elements`` elements."""
        self._used, self._reserved = 0, elements
        if self._block.numel() < elements:
            self._block = mapped(0, self._dtype)  # free the old block before allocating the new one
            self._block = mapped(int(elements * _SPARE), self._dtype)

    def take(self, *shape: int) -> Float[Tensor, " ..."]:
        """Allocate an uninitialised tensor of this shape."""
        size = math.prod(shape)
        tensor = self._block[self._used : self._used + size]
        assert tensor.numel() == size, "more elements than were reserved"
        self._used += self.rounded(size, self._dtype)
        return tensor.view(shape)

    def reset(self) -> None:
        self._used = 0

    @property
    def reserved(self) -> int:
        """Elements of the latest ``reserve``."""
        return self._reserved


class Arena:
    """Memory of one micro-batch, reused by the next.

    streams: inputs of the layers. layers: their other saved tensors. Scratch memory is valid within a ``with`` block.
    generation: number of micro-batches so far; tensors of earlier ones are overwritten.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.streams, self.layers = Bump(dtype), Bump(dtype)
        self._named: dict[str, Tensor] = {}
        self._lent: set[str] = set()
        self.generation = 0

    def begin(self, streams: int, layers: int) -> None:
        """Begin a micro-batch that saves ``streams`` and ``layers`` elements."""
        self.streams.reserve(streams)
        self.layers.reserve(layers)
        self.generation += 1

    def bytes_held(self) -> int:
        """Bytes of the latest micro-batch: saved tensors and scratch memory, without the spare allocation."""
        named = sum(t.numel() for t in self._named.values()) / _SPARE
        return int((self.streams.reserved + self.layers.reserved + named) * self.dtype.itemsize)

    @contextmanager
    def scratch(self, name: str, *shape: int) -> Iterator[Float[Tensor, " ..."]]:
        """Lend exclusive memory for the block; its content is undefined at the start and lost at the end."""
        assert name not in self._lent, f"{name} is in use"
        self._lent.add(name)
        try:
            yield self.buffer(name, *shape)
        finally:
            self._lent.remove(name)

    def buffer(self, name: str, *shape: int) -> Float[Tensor, " ..."]:
        """Return the memory of this name, which each caller chooses uniquely; it is reused if large enough."""
        size = math.prod(shape)
        if name not in self._named or self._named[name].numel() < size:
            self._named.pop(name, None)
            self._named[name] = mapped(int(size * _SPARE), self.dtype)
        return self._named[name][:size].view(shape)


PAD = 32  # columns of a bf16 tile


@dataclass(frozen=True, slots=True)
class AdapterSlice:
    """One adapter of a group: its columns of the output, its columns of z, its index among the model's adapters."""

    layer: LoraLinear
    rows: slice
    ranks: slice
    index: int


def _base(layer: nn.Module) -> Linear:
    """Return the frozen linear layer, with or without an adapter around it."""
    base = layer.base if isinstance(layer, LoraLinear) else layer
    assert isinstance(base, nn.Linear | QuantLinear)
    return base


class Group:
    """Linear layers that read the same input, stacked by rows.

    k, n: input and output width. wide: k plus the ranks, padded. index: adapter index by ``id`` of the layer.
    """

    def __init__(
        self, layers: Sequence[nn.Module], kernels: Kernels, arena: Arena, state: DropoutState, index: Mapping[int, int]
    ) -> None:
        self.bases = [_base(m) for m in layers]
        self.k = int(self.bases[0].in_features)
        self.n = sum(int(b.out_features) for b in self.bases)
        self._kernels, self._arena, self._dropout_state = kernels, arena, state
        self.parts: list[AdapterSlice] = []
        row = rank = 0
        for layer, base in zip(layers, self.bases, strict=True):
            rows = slice(row, row + base.out_features)
            if isinstance(layer, LoraLinear):
                r = layer.lora_A.shape[0]
                self.parts.append(AdapterSlice(layer, rows, slice(rank, rank + r), index[id(layer)]))
                rank += r
            row = rows.stop
        self.rank = rank
        self.wide = -(-(self.k + rank) // PAD) * PAD if rank else self.k
        self.quantised = any(isinstance(b, QuantLinear) for b in self.bases)
        self.a = torch.zeros(rank, self.k)
        self._b = torch.zeros(self.n, self.wide - self.k, dtype=arena.dtype)
        self.dropout = self.parts[0].layer.dropout if self.parts else 0.0
        keep = 1 / (1 - self.dropout)
        scales = [torch.full((p.layer.lora_A.shape[0],), p.layer.scaling) for p in self.parts]
        self._scaling = torch.cat(scales) if scales else torch.zeros(0)
        scales = [torch.full((p.layer.lora_A.shape[0],), p.layer.scaling * keep) for p in self.parts]
        self.factor = torch.cat(scales) if scales else torch.zeros(0)
        self.bias = self._stacked_bias(arena.dtype)
        self._weight = None if self.quantised else self._resident()

    def _stacked_bias(self, dtype: torch.dtype) -> Float[Tensor, " out"] | None:
        if all(b.bias is None for b in self.bases):
            return None
        zero = [torch.zeros(b.out_features) if b.bias is None else b.bias.detach() for b in self.bases]
        return torch.cat([z.to(dtype) for z in zero])

    def _slices(self) -> Iterator[tuple[Linear, slice]]:
        row = 0
        for base in self.bases:
            yield base, slice(row, row + base.out_features)
            row += base.out_features

    def _resident(self) -> Float[Tensor, "out wide"]:
        """Move the frozen weights into [W | B]; the layers' weights become views of it."""
        weight = torch.zeros(self.n, self.wide, dtype=self._arena.dtype)
        for base, rows in self._slices():
            assert isinstance(base, nn.Linear)
            weight[rows, : self.k] = base.weight.detach()
            base.weight.data = weight[rows, : self.k]
        return weight

    def release(self) -> None:
        """Give the layers their own copies of the weights again."""
        if self._weight is not None:
            for base, _ in self._slices():
                assert isinstance(base, nn.Linear)
                base.weight.data = base.weight.data.clone(memory_format=torch.contiguous_format)
            self._weight = None

    def refresh(self) -> None:
        """Copy the adapters' current values, which an optimizer step or a checkpoint may have changed."""
        for part in self.parts:
            self.a[part.ranks] = part.layer.lora_A.detach()
            self._b[part.rows, part.ranks] = part.layer.lora_B.detach().to(self._b.dtype)
        if self._weight is not None:
            self._weight[:, self.k :] = self._b

    @contextmanager
    def weight(self) -> Iterator[Float[Tensor, "out wide"]]:
        """Yield [W | B], [n, wide]; quantised layers are dequantised for the block."""
        if self._weight is not None:
            yield self._weight
            return
        with self._arena.scratch("weight", self.n, self.wide) as whole:
            for base, rows in self._slices():
                self._floats(base, whole[rows])
            whole[:, self.k :] = self._b
            yield whole

    @contextmanager
    def input_gradient(self, grad: Float[Tensor, "tokens out"]) -> Iterator[Float[Tensor, "tokens wide"]]:
        """Yield [T, wide]: the gradients of the input and of z, side by side. grad [T, n]: of the output."""
        with self._arena.scratch("input gradient", len(grad), self.wide) as wide:
            with self.weight() as weight:
                torch.mm(grad, weight, out=wide)
            yield wide

    def _floats(self, base: Linear, out: Float[Tensor, "out wide"]) -> None:
        """Write one layer's weight into the first k columns of ``out``."""
        if not isinstance(base, QuantLinear):
            out[:, : self.k] = base.weight.detach()
        elif base.how.kind == "int8":
            self._kernels.eight_bits(len(out), self.k, base.values, base.scale, out, self.wide)
        elif self.k % BLOCK:
            out[:, : self.k] = base.dequantised(out.dtype)
        else:
            parts = {part: getattr(base, part) for part in base.how.parts}
            scales, table = absolute_maxima(parts, base.how), code_table(base.how.kind, out.device)
            self._kernels.four_bits(len(out), self.k, base.packed, scales, table, out, self.wide)

    def lora(self, places: Int[Tensor, " outputs"] | None = None) -> tuple[Argument, ...]:
        """Return the arguments that the row kernels share. places: rows of the stream to compute; None: all."""
        if not self.rank or not self.dropout or self._dropout_state.off:
            return (self.rank, self.a, self._scaling, 0, 0, None)
        key = self._dropout_state.key(self.parts[0].layer.dropout_group)
        return (self.rank, self.a, self.factor, key, threshold(self.dropout), places)

    def gradients(
        self,
        grad: Float[Tensor, "tokens out"],
        z: Float[Tensor, "tokens _rank"],
        grad_a: Float[Tensor, "rank in"],
        into: list[Float[Tensor, " ..."] | None],
    ) -> None:
        """Write the gradients of this group's A and B to ``into``. grad [T, n]: of the output; z [T, rank or more]."""
        for part in self.parts:
            wide = part.rows.stop - part.rows.start
            rank = part.ranks.stop - part.ranks.start
            grad_b = torch.empty(wide, rank)
            columns, zs = grad[:, part.rows], z[:, part.ranks]
            self._kernels.lora_grad_b(len(grad), wide, columns, grad.stride(0), zs, z.stride(0), rank, grad_b)
            into[2 * part.index] = grad_a[part.ranks]
            into[2 * part.index + 1] = grad_b
