"""Linear layers that read the same input, as one product: frozen weights and adapters side by side.

A layer with an adapter is x W^T + z B^T with z = scaling * dropout(x) A^T. Stacked by rows and written as one,

    [x | z] [W | B]^T

is a single product of the frozen one's speed; its gradient with respect to the input holds that of z in the same
way. Rows of [W | B] are padded to a whole number of the processor's tiles.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.kernels.dropout import DropoutState, threshold
from luthier.kernels.native import Argument, Kernels
from luthier.lora.layers import LoraLinear
from luthier.models.quantization import BLOCK, QuantLinear, absolute_maxima, code_table

_ALIGNED = 64  # bytes: a cache line
_SPARE = 1.5
Linear = nn.Linear | QuantLinear


def mapped(elements: int, dtype: torch.dtype) -> Tensor:
    """[elements] fresh memory, zero where it is read before it is written."""
    size = max(1, elements) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)


class Bump:
    """Tensors one after the other in one block; ``reset`` takes all of them back at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._block = mapped(0, dtype)
        self._used = self._reserved = 0

    @staticmethod
    def rounded(elements: int, dtype: torch.dtype) -> int:
        step = _ALIGNED // dtype.itemsize
        return -(-elements // step) * step

    def reserve(self, elements: int) -> None:
        """Take everything back, and have room for so many elements."""
        self._used, self._reserved = 0, elements
        if self._block.numel() < elements:
            self._block = mapped(0, self._dtype)  # the old one goes before the new one comes
            self._block = mapped(int(elements * _SPARE), self._dtype)

    def take(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        found = self._block[self._used : self._used + size]
        assert found.numel() == size, "more was taken than was reserved"
        self._used += self.rounded(size, self._dtype)
        return found.view(shape)

    def reset(self) -> None:
        self._used = 0

    @property
    def reserved(self) -> int:
        """Elements that were asked for last."""
        return self._reserved


class Arena:
    """streams: what every layer was given. layers: what else it keeps. Scratch is lent for a block of code.

    generation: counts the micro-batches; what an earlier one kept is gone.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.streams, self.layers = Bump(dtype), Bump(dtype)
        self._named: dict[str, Tensor] = {}
        self._lent: set[str] = set()
        self.generation = 0

    def begin(self, streams: int, layers: int) -> None:
        """A new micro-batch that keeps so many elements of each kind."""
        self.streams.reserve(streams)
        self.layers.reserve(layers)
        self.generation += 1

    def bytes_held(self) -> int:
        """Of the latest micro-batch: what its layers keep, and the scratch that is held, without what was spared."""
        named = sum(t.numel() for t in self._named.values()) / _SPARE
        return int((self.streams.reserved + self.layers.reserved + named) * self.dtype.itemsize)

    @contextmanager
    def scratch(self, name: str, *shape: int) -> Iterator[Tensor]:
        """Memory that is the block's alone; its content is undefined at the start and lost at the end."""
        assert name not in self._lent, f"{name} is in use"
        self._lent.add(name)
        try:
            yield self.buffer(name, *shape)
        finally:
            self._lent.remove(name)

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory under a name that no other caller asks for: the same again at the next call, if it is large enough."""
        size = math.prod(shape)
        if name not in self._named or self._named[name].numel() < size:
            self._named.pop(name, None)
            self._named[name] = mapped(int(size * _SPARE), self.dtype)
        return self._named[name][:size].view(shape)


PAD = 32  # columns: a tile of bf16


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter of a group: its rows of the group's output, its columns of z, its number among the run's."""

    layer: LoraLinear
    rows: slice
    ranks: slice
    index: int


def _base(layer: nn.Module) -> Linear:
    """The frozen linear layer, of one with an adapter too."""
    base = layer.base if isinstance(layer, LoraLinear) else layer
    assert isinstance(base, nn.Linear | QuantLinear)
    return base


class Group:
    """Stacked linear layers of one input width, in the order of their rows.

    k, n: input and output width. wide: k and the ranks, padded. index: of an adapter layer by its identity.
    """

    def __init__(
        self, layers: Sequence[nn.Module], kernels: Kernels, arena: Arena, state: DropoutState, index: Mapping[int, int]
    ) -> None:
        self.bases = [_base(m) for m in layers]
        self.k = int(self.bases[0].in_features)
        self.n = sum(int(b.out_features) for b in self.bases)
        self._kernels, self._arena, self._dropout_state = kernels, arena, state
        self.parts: list[Part] = []
        row = rank = 0
        for layer, base in zip(layers, self.bases, strict=True):
            rows = slice(row, row + base.out_features)
            if isinstance(layer, LoraLinear):
                r = layer.lora_A.shape[0]
                self.parts.append(Part(layer, rows, slice(rank, rank + r), index[id(layer)]))
                rank += r
            row = rows.stop
        self.rank = rank
        self.wide = -(-(self.k + rank) // PAD) * PAD if rank else self.k
        self.quantised = any(isinstance(b, QuantLinear) for b in self.bases)
        self.a = torch.zeros(rank, self.k)
        self._b = torch.zeros(self.n, self.wide - self.k, dtype=arena.dtype)
        self.dropout = self.parts[0].layer.dropout if self.parts else 0.0
        keep = 1 / (1 - self.dropout)
        scales = [torch.full((p.layer.lora_A.shape[0],), p.layer.scaling * keep) for p in self.parts]
        self.factor = torch.cat(scales) if scales else torch.zeros(0)
        self.bias = self._stacked_bias(arena.dtype)
        self._weight = None if self.quantised else self._resident()

    def _stacked_bias(self, dtype: torch.dtype) -> Tensor | None:
        if all(b.bias is None for b in self.bases):
            return None
        zero = [torch.zeros(b.out_features) if b.bias is None else b.bias.detach() for b in self.bases]
        return torch.cat([z.to(dtype) for z in zero])

    def _slices(self) -> Iterator[tuple[Linear, slice]]:
        row = 0
        for base in self.bases:
            yield base, slice(row, row + base.out_features)
            row += base.out_features

    def _resident(self) -> Tensor:
        """The frozen weights moved into [W | B]; the layers keep views of it."""
        weight = torch.zeros(self.n, self.wide, dtype=self._arena.dtype)
        for base, rows in self._slices():
            assert isinstance(base, nn.Linear)
            weight[rows, : self.k] = base.weight.detach()
            base.weight.data = weight[rows, : self.k]
        return weight

    def release(self) -> None:
        """Give the layers weights of their own again."""
        if self._weight is not None:
            for base, _ in self._slices():
                assert isinstance(base, nn.Linear)
                base.weight.data = base.weight.data.clone(memory_format=torch.contiguous_format)
            self._weight = None

    def refresh(self) -> None:
        """Take over the adapters' values, which an optimizer step or a checkpoint may have changed."""
        for part in self.parts:
            self.a[part.ranks] = part.layer.lora_A.detach()
            self._b[part.rows, part.ranks] = part.layer.lora_B.detach().to(self._b.dtype)
        if self._weight is not None:
            self._weight[:, self.k :] = self._b

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """[W | B], [n, wide], within the block: quantised layers are dequantised for it."""
        if self._weight is not None:
            yield self._weight
            return
        with self._arena.scratch("weight", self.n, self.wide) as whole:
            for base, rows in self._slices():
                self._floats(base, whole[rows])
            whole[:, self.k :] = self._b
            yield whole

    @contextmanager
    def input_gradient(self, grad: Tensor) -> Iterator[Tensor]:
        """[T, wide], within the block: the gradient of the input, that of z beside it. grad [T, n]: the output's."""
        with self._arena.scratch("input gradient", len(grad), self.wide) as wide:
            with self.weight() as weight:
                torch.mm(grad, weight, out=wide)
            yield wide

    def _floats(self, base: Linear, out: Tensor) -> None:
        """One layer's weight into the first k columns of ``out``."""
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

    def lora(self, places: Tensor | None = None) -> tuple[Argument, ...]:
        """The arguments that the row kernels share. places: rows of the stream that are computed; None: all."""
        if not self.rank or not self.dropout:
            return (self.rank, self.a, self.factor, 0, 0, None)
        key = self._dropout_state.key(self.parts[0].layer.dropout_group)
        return (self.rank, self.a, self.factor, key, threshold(self.dropout), places)

    def gradients(self, grad: Tensor, z: Tensor, grad_a: Tensor, into: list[Tensor | None]) -> None:
        """Put the gradients of this group's A and B into ``into``: grad [T, n] of the output, z [T, rank or more]."""
        for part in self.parts:
            wide = part.rows.stop - part.rows.start
            rank = part.ranks.stop - part.ranks.start
            grad_b = torch.empty(wide, rank)
            columns, zs = grad[:, part.rows], z[:, part.ranks]
            self._kernels.lora_grad_b(len(grad), wide, columns, grad.stride(0), zs, z.stride(0), rank, grad_b)
            into[2 * part.index] = grad_a[part.ranks]
            into[2 * part.index + 1] = grad_b
