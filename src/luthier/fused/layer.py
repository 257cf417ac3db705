"""One decoder layer, forward and backward, as a dozen calls: products by torch, everything between them compiled.

    x -> norm -> [q k v] -> rotary -> attention -> o -> + x -> norm -> [gate up] -> SwiGLU -> down -> + -> next layer

Kept for the backward pass: the two residual streams, q k v, the attention's output and gate and up. The norms' and
SwiGLU's outputs are made again where the gradients need them, a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.fused.arena import Arena, Bump
from luthier.fused.group import Group


@dataclass(frozen=True, slots=True)
class Stream:
    """A flat batch as the kernels want it. All index tensors int64 on the host.

    rows:   the positions whose output is wanted of the last layer [U], in order; row_offsets: theirs by segment.
    shared: how many rows of the stream, the first ones, are seen by other segments.
    """

    offsets: Tensor
    parents: Tensor
    shared: int
    cos: Tensor
    sin: Tensor
    rows: Tensor
    row_offsets: Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of the attention. window: 0 where every earlier token is seen."""

    query: int
    key: int
    dim: int
    interleaved: bool
    window: int
    scale: float


@dataclass(slots=True)
class Kept:
    """What one layer keeps for its backward pass; with recomputation ``x`` alone."""

    x: Tensor
    rstd: Tensor | None = None
    z_qkv: Tensor | None = None
    q: Tensor | None = None
    kv: Tensor | None = None
    attended: Tensor | None = None
    z_o: Tensor | None = None
    x2: Tensor | None = None
    rstd2: Tensor | None = None
    z_gate_up: Tensor | None = None
    gate_up: Tensor | None = None
    z_down: Tensor | None = None


@dataclass(slots=True)
class Layer:
    """The parts of one decoder layer. norm, norm2: RMS norms' weights; eps: theirs."""

    kernels: Any
    arena: Arena
    heads: Heads
    norm: Tensor
    norm2: Tensor
    eps: float
    eps2: float
    qkv: Group
    o: Group
    gate_up: Group
    down: Group

    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def kept(self, tokens: int) -> int:
        """Elements of the arena that ``forward`` takes, the residual stream that goes on left out."""
        widths = (self.qkv.n, self.o.wide, self.o.n, self.gate_up.n, *(g.rank for g in self.groups()))
        return sum(Bump.rounded(tokens * w, self.arena.dtype) for w in widths) + 64  # q and k v apart

    def forward(self, x: Tensor, stream: Stream, last: bool, again: bool = False) -> tuple[Tensor, Kept]:
        """x [T, H] -> [T, H], or [U, H] at the stream's ``rows`` of the last layer.

        again: for what it keeps alone; the output is not made.
        """
        keep, places = self.arena.layers.take, stream.rows if last else None
        kept = Kept(x)
        h, kept.rstd, kept.z_qkv = self._norm(x, self.norm, self.eps, self.qkv, None)
        width = self.heads.query * self.heads.dim
        weight = self.qkv.weight()
        if last:
            kept.q = torch.mm(h[stream.rows], weight[:width].t(), out=keep(len(stream.rows), width))
            kept.kv = torch.mm(h, weight[width:].t(), out=keep(len(h), self.qkv.n - width))
        else:
            both = torch.mm(h, weight.t(), out=keep(len(h), self.qkv.n))
            kept.q, kept.kv = both[:, :width], both[:, width:]
        self._turn(kept.q, kept.kv, stream, last)
        kept.attended = self._attend(kept.q, kept.kv, stream, last)
        kept.z_o = self._z(kept.attended, self.o, places)
        above = x[stream.rows] if last else x
        kept.x2 = torch.addmm(above, kept.attended, self.o.weight().t(), out=keep(*above.shape))
        h, kept.rstd2, kept.z_gate_up = self._norm(kept.x2, self.norm2, self.eps2, self.gate_up, places)
        kept.gate_up = torch.mm(h, self.gate_up.weight().t(), out=keep(len(h), self.gate_up.n))
        act = self.arena.scratch("act", len(h), self.down.wide)
        kept.z_down = keep(len(h), self.down.rank)
        self.kernels.swiglu_forward(
            len(h), self.down.k, kept.gate_up, *self.down.lora(places), act, self.down.wide, kept.z_down
        )
        if again:
            return x, kept
        out = self.arena.streams.take(*kept.x2.shape)
        return torch.addmm(kept.x2, act, self.down.weight().t(), out=out), kept

    def _norm(self, x: Tensor, weight: Tensor, eps: float, group: Group, places: Tensor | None) -> tuple[Tensor, ...]:
        """[T, wide] normalised rows with z beside them, 1 / rms, and z alone."""
        n, k = x.shape
        out, z = self.arena.scratch("normed", n, group.wide), self.arena.layers.take(n, group.rank)
        rstd = torch.empty(n)
        self.kernels.norm_forward(n, k, x, weight, eps, *group.lora(places), out, group.wide, z, rstd)
        return out, rstd, z

    def _turn(self, q: Tensor, kv: Tensor, stream: Stream, last: bool, back: bool = False) -> None:
        """Rotary positions (and the projections' biases, on the way forward), in place."""
        h, bias = self.heads, None if back else self.qkv.bias
        width = h.query * h.dim
        cos, sin = (stream.cos[stream.rows], stream.sin[stream.rows]) if last else (stream.cos, stream.sin)
        shape = (h.dim, stream.cos.shape[1], h.interleaved, back)
        bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
        self.kernels.rotate(len(q), q, q.stride(0), h.query, *shape, cos, sin, cos.stride(0), bias_q, width)
        self.kernels.rotate(
            len(kv), kv, kv.stride(0), h.key, *shape, stream.cos, stream.sin, cos.stride(0), bias_kv, kv.shape[1]
        )

    def _place(self, stream: Stream, last: bool) -> tuple[Any, ...]:
        h, count = self.heads, len(stream.parents)
        queries = (stream.row_offsets, stream.rows) if last else (stream.offsets, None)
        segments = (count, stream.offsets, stream.parents, stream.shared)
        return (*segments, *queries, h.query, h.key, h.dim, h.window, h.scale)

    def _attend(self, q: Tensor, kv: Tensor, stream: Stream, last: bool) -> Tensor:
        out = self.arena.layers.take(len(q), self.o.wide)
        k, v = kv, kv[:, self.heads.key * self.heads.dim :]
        self.kernels.attend_forward(*self._place(stream, last), q, q.stride(0), k, v, kv.stride(0), out, out.stride(0))
        return out

    def _z(self, x: Tensor, group: Group, places: Tensor | None) -> Tensor:
        """z of ``x`` [T, wide], written beside its first k columns and returned."""
        z = self.arena.layers.take(len(x), group.rank)
        self.kernels.lora_forward(len(x), group.k, x, group.wide, *group.lora(places), z)
        return z

    def backward(
        self, grad: Tensor, kept: Kept, stream: Stream, last: bool, wants_input: bool, into: list[Tensor | None]
    ) -> Tensor | None:
        """grad [T, H] of the output -> that of the input, None where nothing below trains. Fills ``into``."""
        if kept.q is None:
            self.arena.layers.reset()
            _, kept = self.forward(kept.x, stream, last, again=True)
        assert kept.q is not None and kept.kv is not None and kept.attended is not None and kept.x2 is not None
        assert kept.gate_up is not None and kept.z_down is not None and kept.rstd2 is not None
        assert kept.z_gate_up is not None and kept.z_o is not None and kept.z_qkv is not None
        places = stream.rows if last else None
        n = len(grad)
        wide = self._product("wide", grad, self.down)
        grad_gate_up = self.arena.scratch("gate_up", n, self.gate_up.n)
        grad_a = torch.empty(self.down.rank, self.down.k)
        self.kernels.swiglu_backward(
            n, self.down.k, kept.gate_up, *self.down.lora(places), wide, self.down.wide, grad_gate_up, grad_a
        )
        self.down.gradients(grad, kept.z_down, grad_a, into)
        wide, grad_a = self._product("wide", grad_gate_up, self.gate_up), torch.empty(self.gate_up.rank, self.gate_up.k)
        grad2 = self.arena.scratch("middle", *grad.shape)
        self.kernels.norm_backward(
            n, grad.shape[1], kept.x2, self.norm2, kept.rstd2, *self.gate_up.lora(places), wide, self.gate_up.wide,
            grad, grad2, grad_a,
        )  # fmt: skip
        self.gate_up.gradients(grad_gate_up, kept.z_gate_up, grad_a, into)
        wide, grad_a = self._product("wide", grad2, self.o), torch.empty(self.o.rank, self.o.k)
        grad_attended = self.arena.scratch("attended", n, self.o.k)
        self.kernels.lora_backward(
            n, self.o.k, kept.attended, self.o.wide, *self.o.lora(places), wide, self.o.wide, grad_attended, grad_a
        )
        self.o.gradients(grad2, kept.z_o, grad_a, into)
        grad_qkv = self._attention_backward(grad_attended, kept, stream, last)
        if last:
            grad2 = torch.zeros_like(kept.x).index_copy_(0, stream.rows, grad2)
        wide, grad_a = self._product("wide", grad_qkv, self.qkv), torch.empty(self.qkv.rank, self.qkv.k)
        below = self.arena.scratch("below", *kept.x.shape) if wants_input else None
        self.kernels.norm_backward(
            len(kept.x), kept.x.shape[1], kept.x, self.norm, kept.rstd, *self.qkv.lora(), wide, self.qkv.wide,
            grad2, below, grad_a,
        )  # fmt: skip
        self.qkv.gradients(grad_qkv, kept.z_qkv, grad_a, into)
        return below

    def _product(self, name: str, grad: Tensor, group: Group) -> Tensor:
        """[T, wide]: the gradient of a group's input, that of z beside it."""
        return torch.mm(grad, group.weight(), out=self.arena.scratch(name, len(grad), group.wide))

    def _attention_backward(self, grad: Tensor, kept: Kept, stream: Stream, last: bool) -> Tensor:
        """[T, q k v] gradient of the projections' outputs."""
        h, q, kv = self.heads, kept.q, kept.kv
        assert q is not None and kv is not None
        width, keys = h.query * h.dim, h.key * h.dim
        found = self.arena.scratch("qkv", len(kv), self.qkv.n)
        grad_q = torch.empty_like(grad) if last else found[:, :width]
        grad_kv = found[:, width:]
        self.kernels.attend_backward(
            *self._place(stream, last), q, q.stride(0), kv, kv[:, keys:], kv.stride(0), grad, grad.stride(0),
            grad_q, grad_q.stride(0), grad_kv, grad_kv[:, keys:], found.stride(0),
        )  # fmt: skip
        self._turn(grad_q, grad_kv, stream, last, back=True)
        if last:
            found[:, :width] = 0
            found[stream.rows, :width] = grad_q
        return found
