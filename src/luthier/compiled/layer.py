"""Compute one decoder layer, forward and backward: matrix products by torch, everything else by compiled kernels.

    x -> norm -> [q k v] -> rotary -> attention -> o -> + x -> norm -> [gate up] -> SwiGLU -> down -> + -> next layer

Saved for the backward pass: the two residual streams, q k v, the attention's output, gate and up. The outputs of the
norms and of SwiGLU are recomputed in the backward pass, a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.compiled.group import Arena, Bump, Group
from luthier.kernels.native import Argument, Kernels

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True)
class Stream:
    """A flat batch in the form that the kernels read. Index tensors are int64 on the host.

    rows:   positions that the last layer outputs [U], ascending; row_offsets: their start by segment.
    shared: number of rows at the start of the stream that other segments attend to as well.
    """

    offsets: Int[Tensor, " boundaries"]
    parents: Int[Tensor, " segments"]
    shared: int
    cos: Float[Tensor, "tokens rotary"]
    sin: Float[Tensor, "tokens rotary"]
    rows: Int[Tensor, " outputs"]
    row_offsets: Int[Tensor, " boundaries"]


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of the attention: query and key heads, features per head. window: sliding window; 0 if there is none."""

    query: int
    key: int
    dim: int
    interleaved: bool
    window: int
    scale: float


@dataclass(frozen=True, slots=True)
class Saved:
    """The tensors that one layer saves for its backward pass.

    x [T, H], x2 [U, H]: the residual streams before attention and MLP. rstd, rstd2: 1 / rms of their rows.
    z_*: the adapters' inner values [., rank]. U equals T except in the last layer.
    """

    x: Float[Tensor, "tokens hidden"]
    rstd: Float[Tensor, " tokens"]
    z_qkv: Float[Tensor, "tokens _rank"]
    q: Float[Tensor, "outputs q_width"]
    kv: Float[Tensor, "tokens kv_width"]
    attended: Float[Tensor, "outputs wide"]
    z_o: Float[Tensor, "outputs _rank"]
    x2: Float[Tensor, "outputs hidden"]
    rstd2: Float[Tensor, " outputs"]
    z_gate_up: Float[Tensor, "outputs _rank"]
    gate_up: Float[Tensor, "outputs gate_up"]
    z_down: Float[Tensor, "outputs _rank"]


@dataclass(slots=True)
class Layer:
    """One decoder layer. norm, norm2: weights of the RMS norms; eps, eps2: their epsilons."""

    kernels: Kernels
    arena: Arena
    heads: Heads
    norm: Float[Tensor, " hidden"]
    norm2: Float[Tensor, " hidden"]
    eps: float
    eps2: float
    qkv: Group
    o: Group
    gate_up: Group
    down: Group

    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def saved_elements(self, tokens: int) -> int:
        """Elements of the arena that one layer saves for ``tokens`` tokens, without its output."""
        widths = (self.qkv.n, self.o.wide, self.o.n, self.gate_up.n, *(g.rank for g in self.groups()))
        return sum(Bump.rounded(tokens * w, self.arena.dtype) for w in widths) + 64  # q and k v are separate

    def forward(
        self, x: Float[Tensor, "tokens hidden"], stream: Stream, last: bool
    ) -> tuple[Float[Tensor, "outputs hidden"], Saved]:
        """Compute x [T, H] -> [T, H], in the last layer [U, H] at the stream's ``rows``; save tensors for backward."""
        out = self.arena.streams.take(len(stream.rows) if last else len(x), x.shape[1])
        return out, self._forward(x, stream, last, out)

    def recomputed(self, x: Float[Tensor, "tokens hidden"], stream: Stream, last: bool) -> Saved:
        """Recompute what ``forward`` saved for this input."""
        self.arena.layers.reset()
        return self._forward(x, stream, last, None)

    def _forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        stream: Stream,
        last: bool,
        out: Float[Tensor, "outputs hidden"] | None,
    ) -> Saved:
        """Compute the layer into ``out``; None to compute the saved tensors only."""
        keep, places = self.arena.layers.take, stream.rows if last else None
        rstd, z_qkv, q, kv = self._project(x, stream, last)
        self._rotate(q, kv, stream, last)
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
        return Saved(x, rstd, z_qkv, q, kv, attended, z_o, x2, rstd2, z_gate_up, gate_up, z_down)

    def _project(
        self, x: Float[Tensor, "tokens hidden"], stream: Stream, last: bool
    ) -> tuple[
        Float[Tensor, " tokens"],
        Float[Tensor, "tokens rank"],
        Float[Tensor, "outputs q_width"],
        Float[Tensor, "tokens kv_width"],
    ]:
        """Return 1 / rms, z, q and k v [T, .] before rotary positions; in the last layer q only at ``stream.rows``."""
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
        self,
        x: Float[Tensor, "tokens hidden"],
        weight: Float[Tensor, " hidden"],
        eps: float,
        group: Group,
        places: Int[Tensor, " tokens"] | None,
        h: Float[Tensor, "tokens wide"],
        z: Float[Tensor, "tokens rank"],
        rstd: Float[Tensor, " tokens"],
    ) -> None:
        """Normalise rows: fill h [T, wide] with the rows and z, z with a copy of z, and rstd with 1 / rms."""
        self.kernels.norm_forward(len(x), x.shape[1], x, weight, eps, *group.lora(places), h, group.wide, z, rstd)

    def _rotate(
        self,
        q: Float[Tensor, "outputs q_width"],
        kv: Float[Tensor, "tokens kv_width"],
        stream: Stream,
        last: bool,
        back: bool = False,
    ) -> None:
        """Add the projections' biases and rotate by position, in place; with ``back``, rotate the gradients back."""
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

    def _attend(
        self, q: Float[Tensor, "outputs q_width"], kv: Float[Tensor, "tokens kv_width"], stream: Stream, last: bool
    ) -> Float[Tensor, "outputs wide"]:
        out = self.arena.layers.take(len(q), self.o.wide)
        k, v = kv, kv[:, self.heads.key * self.heads.dim :]
        self.kernels.attend_forward(*self._place(stream, last), q, q.stride(0), k, v, kv.stride(0), out, out.stride(0))
        return out

    def backward(
        self,
        grad: Float[Tensor, "outputs hidden"],
        saved: Saved,
        stream: Stream,
        last: bool,
        into: list[Float[Tensor, " ..."] | None],
        below: Float[Tensor, "tokens hidden"] | None,
    ) -> None:
        """Write the adapters' gradients into ``into`` and the input's gradient into ``below`` [T, H].

        grad [U, H]: of the output; it may share memory with ``below``. below: None if no earlier layer is trained.
        """
        places, n = stream.rows if last else None, len(grad)
        with self.arena.scratch("middle", *grad.shape) as grad2:
            with self.arena.scratch("gate_up gradient", n, self.gate_up.n) as grad_gate_up:
                self._down_backward(grad, saved, places, grad_gate_up, into)
                self._gate_up_backward(grad_gate_up, grad, saved, places, grad2, into)
            with self.arena.scratch("qkv gradient", len(saved.kv), self.qkv.n) as grad_qkv:
                with self.arena.scratch("attended gradient", n, self.o.k) as grad_attended:
                    self._o_backward(grad2, saved, places, grad_attended, into)
                    self._attention_backward(grad_attended, saved, stream, last, grad_qkv)
                above = torch.zeros_like(saved.x).index_copy_(0, stream.rows, grad2) if last else grad2
                self._qkv_backward(grad_qkv, above, saved, below, into)

    def _down_backward(
        self,
        grad: Float[Tensor, "outputs hidden"],
        saved: Saved,
        places: Int[Tensor, " outputs"] | None,
        out: Float[Tensor, "outputs gate_up"],
        into: list[Float[Tensor, " ..."] | None],
    ) -> None:
        """Propagate grad [U, H] through down and SwiGLU to out [U, gate and up]."""
        grad_a = torch.empty(self.down.rank, self.down.k)
        with self.down.input_gradient(grad) as wide:
            self.kernels.swiglu_backward(
                len(grad), self.down.k, saved.gate_up, *self.down.lora(places), wide, self.down.wide, out, grad_a
            )
        self.down.gradients(grad, saved.z_down, grad_a, into)

    def _o_backward(
        self,
        grad: Float[Tensor, "outputs hidden"],
        saved: Saved,
        places: Int[Tensor, " outputs"] | None,
        out: Float[Tensor, "outputs q_width"],
        into: list[Float[Tensor, " ..."] | None],
    ) -> None:
        """Propagate grad [U, H] through o to out [U, attention output]."""
        grad_a = torch.empty(self.o.rank, self.o.k)
        with self.o.input_gradient(grad) as wide:
            self.kernels.lora_backward(
                len(grad), self.o.k, saved.attended, self.o.wide, *self.o.lora(places), wide, self.o.wide, out, grad_a
            )
        self.o.gradients(grad, saved.z_o, grad_a, into)

    def _gate_up_backward(
        self,
        grad: Float[Tensor, "outputs gate_up"],
        above: Float[Tensor, "outputs hidden"],
        saved: Saved,
        places: Int[Tensor, " outputs"] | None,
        out: Float[Tensor, "outputs hidden"],
        into: list[Float[Tensor, " ..."] | None],
    ) -> None:
        """Propagate grad [U, gate and up] through the projections and the norm to out [U, H], and add ``above``."""
        group, grad_a = self.gate_up, torch.empty(self.gate_up.rank, self.gate_up.k)
        with group.input_gradient(grad) as wide:
            self.kernels.norm_backward(
                len(grad), above.shape[1], saved.x2, self.norm2, saved.rstd2, *group.lora(places), wide, group.wide,
                above, out, grad_a,
            )  # fmt: skip
        group.gradients(grad, saved.z_gate_up, grad_a, into)

    def _qkv_backward(
        self,
        grad: Float[Tensor, "tokens qkv"],
        above: Float[Tensor, "tokens hidden"],
        saved: Saved,
        out: Float[Tensor, "tokens hidden"] | None,
        into: list[Float[Tensor, " ..."] | None],
    ) -> None:
        """Propagate grad [T, q k v] to out [T, H] (None: adapters only), as ``_gate_up_backward``."""
        group, grad_a = self.qkv, torch.empty(self.qkv.rank, self.qkv.k)
        with group.input_gradient(grad) as wide:
            self.kernels.norm_backward(
                len(saved.x), saved.x.shape[1], saved.x, self.norm, saved.rstd, *group.lora(), wide, group.wide,
                above, out, grad_a,
            )  # fmt: skip
        group.gradients(grad, saved.z_qkv, grad_a, into)

    def _attention_backward(
        self,
        grad: Float[Tensor, "outputs q_width"],
        saved: Saved,
        stream: Stream,
        last: bool,
        out: Float[Tensor, "tokens qkv"],
    ) -> None:
        """Propagate grad [U, attention output] through attention and rotation to out [T, q k v]."""
        h, q, kv = self.heads, saved.q, saved.kv
        width, keys = h.query * h.dim, h.key * h.dim
        grad_q = torch.empty_like(grad) if last else out[:, :width]
        grad_kv = out[:, width:]
        self.kernels.attend_backward(
            *self._place(stream, last), q, q.stride(0), kv, kv[:, keys:], kv.stride(0), grad, grad.stride(0),
            grad_q, grad_q.stride(0), grad_kv, grad_kv[:, keys:], out.stride(0),
        )  # fmt: skip
        self._rotate(grad_q, grad_kv, stream, last, back=True)
        if last:
            out[:, :width] = 0
            out[stream.rows, :width] = grad_q
