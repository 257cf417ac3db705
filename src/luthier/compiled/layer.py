"""One decoder layer, forward and backward, as a dozen calls: products by torch, everything between them compiled.

    x -> norm -> [q k v] -> rotary -> attention -> o -> + x -> norm -> [gate up] -> SwiGLU -> down -> + -> next layer

Kept for the backward pass: the two residual streams, q k v, the attention's output and gate and up. The norms' and
SwiGLU's outputs are made again where the gradients need them, a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.compiled.group import Arena, Bump, Group
from luthier.kernels.native import Argument, Kernels


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
    """Shape of the attention. window: 0 if every earlier token is seen."""

    query: int
    key: int
    dim: int
    interleaved: bool
    window: int
    scale: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer keeps for its backward pass.

    x [T, H], x2 [U, H]: the residual streams before attention and MLP. rstd, rstd2: 1 / rms of their rows.
    z_*: the adapters' inner values [., rank]. U is T but for the last layer.
    """

    x: Tensor
    rstd: Tensor
    z_qkv: Tensor
    q: Tensor
    kv: Tensor
    attended: Tensor
    z_o: Tensor
    x2: Tensor
    rstd2: Tensor
    z_gate_up: Tensor
    gate_up: Tensor
    z_down: Tensor


@dataclass(slots=True)
class Layer:
    """The parts of one decoder layer. norm, norm2: RMS norms' weights; eps: theirs."""

    kernels: Kernels
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
        """Elements of the arena that ``attention`` and ``mlp`` keep, the residual stream that goes on left out."""
        widths = (self.qkv.n, self.o.wide, self.o.n, self.gate_up.n, *(g.rank for g in self.groups()))
        return sum(Bump.rounded(tokens * w, self.arena.dtype) for w in widths) + 64  # q and k v apart

    def forward(self, x: Tensor, stream: Stream, last: bool) -> tuple[Tensor, Kept]:
        """x [T, H] -> [T, H], or [U, H] at the stream's ``rows`` of the last layer; and what backward needs."""
        out = self.arena.streams.take(len(stream.rows) if last else len(x), x.shape[1])
        return out, self._forward(x, stream, last, out)

    def recomputed(self, x: Tensor, stream: Stream, last: bool) -> Kept:
        """What ``forward`` kept of this input, made again."""
        self.arena.layers.reset()
        return self._forward(x, stream, last, None)

    def _forward(self, x: Tensor, stream: Stream, last: bool, out: Tensor | None) -> Kept:
        """out: None if only what is kept is wanted."""
        keep, places = self.arena.layers.take, stream.rows if last else None
        rstd, z_qkv, q, kv = self._project(x, stream, last)
        self._turn(q, kv, stream, last)
        attended = self._attend(q, kv, stream, last)
        z_o = keep(len(attended), self.o.rank)
        self.kernels.lora_forward(len(attended), self.o.k, attended, self.o.wide, *self.o.lora(places), z_o)
        above = x[stream.rows] if last else x
        with self.o.weight() as weight:
            x2 = torch.addmm(above, attended, weight.t(), out=keep(*above.shape))
        n = len(x2)
        rstd2, z_gate_up = torch.empty(n), keep(n, self.gate_up.rank)
        with self.arena.scratch("normed", n, self.gate_up.wide) as h, self.gate_up.weight() as weight:
            self._norm(x2, self.norm2, self.eps2, self.gate_up, places, h, z_gate_up, rstd2)
            gate_up = torch.mm(h, weight.t(), out=keep(n, self.gate_up.n))
        z_down = keep(n, self.down.rank)
        with self.arena.scratch("act", n, self.down.wide) as act:
            self.kernels.swiglu_forward(n, self.down.k, gate_up, *self.down.lora(places), act, self.down.wide, z_down)
            if out is not None:
                with self.down.weight() as weight:
                    torch.addmm(x2, act, weight.t(), out=out)
        return Kept(x, rstd, z_qkv, q, kv, attended, z_o, x2, rstd2, z_gate_up, gate_up, z_down)

    def _project(self, x: Tensor, stream: Stream, last: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """1 / rms of the rows, z, and q and k v [T, .] before rotary positions; q only at the stream's rows if last."""
        keep, width, n = self.arena.layers.take, self.heads.query * self.heads.dim, len(x)
        rstd, z = torch.empty(n), keep(n, self.qkv.rank)
        with self.arena.scratch("normed", n, self.qkv.wide) as h, self.qkv.weight() as weight:
            self._norm(x, self.norm, self.eps, self.qkv, None, h, z, rstd)
            if last:
                q = torch.mm(h[stream.rows], weight[:width].t(), out=keep(len(stream.rows), width))
                return rstd, z, q, torch.mm(h, weight[width:].t(), out=keep(n, self.qkv.n - width))
            both = torch.mm(h, weight.t(), out=keep(n, self.qkv.n))
        return rstd, z, both[:, :width], both[:, width:]

    def _norm(
        self, x: Tensor, weight: Tensor, eps: float, group: Group, places: Tensor | None, h: Tensor, z: Tensor,
        rstd: Tensor,
    ) -> None:  # fmt: skip
        """Fill h [T, wide] with normalised rows and z beside them, z by itself, and 1 / rms."""
        self.kernels.norm_forward(len(x), x.shape[1], x, weight, eps, *group.lora(places), h, group.wide, z, rstd)

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

    def _place(self, stream: Stream, last: bool) -> tuple[Argument, ...]:
        h, count = self.heads, len(stream.parents)
        queries = (stream.row_offsets, stream.rows) if last else (stream.offsets, None)
        segments = (count, stream.offsets, stream.parents, stream.shared)
        return (*segments, *queries, h.query, h.key, h.dim, h.window, h.scale)

    def _attend(self, q: Tensor, kv: Tensor, stream: Stream, last: bool) -> Tensor:
        out = self.arena.layers.take(len(q), self.o.wide)
        k, v = kv, kv[:, self.heads.key * self.heads.dim :]
        self.kernels.attend_forward(*self._place(stream, last), q, q.stride(0), k, v, kv.stride(0), out, out.stride(0))
        return out

    def backward(
        self, grad: Tensor, kept: Kept, stream: Stream, last: bool, into: list[Tensor | None], below: Tensor | None
    ) -> None:
        """Put the adapters' gradients into ``into``, and that of the input into ``below`` [T, H].

        grad [U, H]: of the output; its memory may be ``below``'s. below: None if nothing before this layer trains.
        """
        places, n = stream.rows if last else None, len(grad)
        with self.arena.scratch("middle", *grad.shape) as grad2:
            with self.arena.scratch("gate_up gradient", n, self.gate_up.n) as grad_gate_up:
                self._down_backward(grad, kept, places, grad_gate_up, into)
                self._gate_up_backward(grad_gate_up, grad, kept, places, grad2, into)
            with self.arena.scratch("qkv gradient", len(kept.kv), self.qkv.n) as grad_qkv:
                with self.arena.scratch("attended gradient", n, self.o.k) as grad_attended:
                    self._o_backward(grad2, kept, places, grad_attended, into)
                    self._attention_backward(grad_attended, kept, stream, last, grad_qkv)
                above = torch.zeros_like(kept.x).index_copy_(0, stream.rows, grad2) if last else grad2
                self._qkv_backward(grad_qkv, above, kept, below, into)

    def _down_backward(
        self, grad: Tensor, kept: Kept, places: Tensor | None, out: Tensor, into: list[Tensor | None]
    ) -> None:
        """grad [U, H] -> out [U, gate and up], through down and SwiGLU."""
        grad_a = torch.empty(self.down.rank, self.down.k)
        with self.down.input_gradient(grad) as wide:
            self.kernels.swiglu_backward(
                len(grad), self.down.k, kept.gate_up, *self.down.lora(places), wide, self.down.wide, out, grad_a
            )
        self.down.gradients(grad, kept.z_down, grad_a, into)

    def _o_backward(
        self, grad: Tensor, kept: Kept, places: Tensor | None, out: Tensor, into: list[Tensor | None]
    ) -> None:
        """grad [U, H] -> out [U, attention's output]."""
        grad_a = torch.empty(self.o.rank, self.o.k)
        with self.o.input_gradient(grad) as wide:
            self.kernels.lora_backward(
                len(grad), self.o.k, kept.attended, self.o.wide, *self.o.lora(places), wide, self.o.wide, out, grad_a
            )
        self.o.gradients(grad, kept.z_o, grad_a, into)

    def _gate_up_backward(
        self, grad: Tensor, above: Tensor, kept: Kept, places: Tensor | None, out: Tensor, into: list[Tensor | None]
    ) -> None:
        """grad [U, gate and up] -> out [U, H], through the norm; above: the residual stream's gradient, added."""
        group, grad_a = self.gate_up, torch.empty(self.gate_up.rank, self.gate_up.k)
        with group.input_gradient(grad) as wide:
            self.kernels.norm_backward(
                len(grad), above.shape[1], kept.x2, self.norm2, kept.rstd2, *group.lora(places), wide, group.wide,
                above, out, grad_a,
            )  # fmt: skip
        group.gradients(grad, kept.z_gate_up, grad_a, into)

    def _qkv_backward(
        self, grad: Tensor, above: Tensor, kept: Kept, out: Tensor | None, into: list[Tensor | None]
    ) -> None:
        """grad [T, q k v] -> out [T, H], as ``_gate_up_backward``; None if it is not wanted."""
        group, grad_a = self.qkv, torch.empty(self.qkv.rank, self.qkv.k)
        with group.input_gradient(grad) as wide:
            self.kernels.norm_backward(
                len(kept.x), kept.x.shape[1], kept.x, self.norm, kept.rstd, *group.lora(), wide, group.wide,
                above, out, grad_a,
            )  # fmt: skip
        group.gradients(grad, kept.z_qkv, grad_a, into)

    def _attention_backward(self, grad: Tensor, kept: Kept, stream: Stream, last: bool, out: Tensor) -> None:
        """grad [U, attention's output] -> out [T, q k v], of the projections' outputs."""
        h, q, kv = self.heads, kept.q, kept.kv
        width, keys = h.query * h.dim, h.key * h.dim
        grad_q = torch.empty_like(grad) if last else out[:, :width]
        grad_kv = out[:, width:]
        self.kernels.attend_backward(
            *self._place(stream, last), q, q.stride(0), kv, kv[:, keys:], kv.stride(0), grad, grad.stride(0),
            grad_q, grad_q.stride(0), grad_kv, grad_kv[:, keys:], out.stride(0),
        )  # fmt: skip
        self._turn(grad_q, grad_kv, stream, last, back=True)
        if last:
            out[:, :width] = 0
            out[stream.rows, :width] = grad_q
