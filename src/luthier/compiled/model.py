"""Compute a model's loss and its adapters' gradients layer by layer with compiled layers, without autograd inside.

``compiled_model`` raises Unsuitable, with the reason, if the compiled layers do not support a model; training then uses
transformers' own layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier._util import files
from luthier.batching.collate import DeviceBatch
from luthier.compiled.group import Arena, Bump, Group
from luthier.compiled.layer import Heads, Layer, Saved, Stream
from luthier.devices.device import trim_freed_memory
from luthier.kernels import native
from luthier.kernels.dropout import DropoutState
from luthier.lora.layers import LoraLinear, frozen_dtype
from luthier.models.native_model import rows_of
from luthier.models.protocols import CausalLM, Decoder
from luthier.models.quantization import QuantLinear
from luthier.types import Log

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LOGITS = 40_000_000  # elements of logits that exist at the same time
# transformers' decoder layers with exactly this computation, and whether rotary pairs are adjacent
LAYERS = {
    "LlamaDecoderLayer": False,
    "MistralDecoderLayer": False,
    "Qwen2DecoderLayer": False,
    "Phi3DecoderLayer": False,
    "GlmDecoderLayer": True,
}


def input_projections(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the linear layers of a decoder layer that read its normalised input: q, k and v; gate and up."""
    attention: Any = block.self_attn
    mlp: Any = block.mlp
    fused_qkv, fused_gate_up = hasattr(attention, "qkv_proj"), hasattr(mlp, "gate_up_proj")
    qkv = [attention.qkv_proj] if fused_qkv else [attention.q_proj, attention.k_proj, attention.v_proj]
    return qkv, [mlp.gate_up_proj] if fused_gate_up else [mlp.gate_proj, mlp.up_proj]


class Unsuitable(Exception):
    """The compiled layers do not support a model; the message is the reason."""


@dataclass(frozen=True, slots=True)
class MicroBatchState:
    """One micro-batch between its forward and its backward pass. grad [U, H]: of the last layer's output.

    saved: tensors of each layer, from the first trained layer on; with recomputation only its input [T, H].
    """

    stream: Stream
    saved: list[Saved | Float[Tensor, "tokens hidden"]]
    grad: Float[Tensor, "outputs hidden"]
    generation: int


@dataclass(frozen=True, slots=True)
class LayerPass:
    """One layer's output, the gradient of its input if an earlier layer is trained, and its adapters' gradients.

    gradients: by index into ``CompiledModel.parameters``.
    """

    out: Float[Tensor, "outputs hidden"]
    below: Float[Tensor, "tokens hidden"] | None
    gradients: dict[int, Float[Tensor, " ..."]]


class CompiledModel:
    """The compiled form of a model with attached adapters. recompute: save the input of each layer only."""

    def __init__(self, model: CausalLM, layers: Mapping[str, LoraLinear], state: DropoutState, recompute: bool) -> None:
        decoder, dtype = suited(model, layers), frozen_dtype(model)
        try:
            self.kernels = native.kernels(dtype)
        except native.Unavailable as e:
            raise Unsuitable(str(e)) from None
        self.parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
        self.names = [f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")]
        self.recompute, self._dropout_state = recompute, state
        self._decoder, self._head = decoder, model.get_output_embeddings()
        self._arena = Arena(dtype)
        index = {id(layer): i for i, layer in enumerate(layers.values())}
        self.layers = [self._layer(block, index) for block in decoder.layers]
        trained = [i for i, layer in enumerate(self.layers) if any(g.parts for g in layer.groups())]
        self.first = trained[0]
        trim_freed_memory()  # the layers' former weights

    def _layer(self, block: Any, index: Mapping[int, int]) -> Layer:
        attention, mlp, config = block.self_attn, block.mlp, block.self_attn.config
        qkv, gate_up = input_projections(block)

        def group(modules: list[nn.Module]) -> Group:
            return Group(modules, self.kernels, self._arena, self._dropout_state, index)

        dim = int(attention.head_dim)
        window = window_of(block)
        heads = Heads(
            query=int(config.num_attention_heads),
            key=int(config.num_key_value_heads),
            dim=dim,
            interleaved=LAYERS[type(block).__name__],
            window=window,
            scale=float(attention.scaling),
        )
        norm, norm2 = block.input_layernorm, block.post_attention_layernorm
        return Layer(
            self.kernels, self._arena, heads, norm.weight.detach(), norm2.weight.detach(), norm.variance_epsilon,
            norm2.variance_epsilon, group(qkv), group([attention.o_proj]), group(gate_up), group([mlp.down_proj]),
        )  # fmt: skip

    def release(self) -> None:
        """Give the model its own copies of the weights again."""
        for layer in self.layers:
            for group in layer.groups():
                group.release()

    def bytes_held(self) -> int:
        """Bytes of the latest micro-batch, logits included."""
        return self._arena.bytes_held()

    def loss_sum(self, batch: DeviceBatch) -> Float[Tensor, ""]:
        """Sum the cross-entropy of the batch's supervised tokens, [] fp32, with gradients for the adapters."""
        if not torch.is_grad_enabled():
            return self._loss_only(batch)
        loss: Tensor = _Loss.apply(self, batch, *self.parameters)  # type: ignore[no-untyped-call]
        return loss

    def _loss_only(self, batch: DeviceBatch) -> Float[Tensor, ""]:
        """Compute the loss without a state for ``backward``, in the memory of one layer."""
        x, stream = self.embedded(batch, backward=False)
        for i, layer in enumerate(self.layers):
            self._arena.layers.reset()
            x, _ = layer.forward(x, stream, i == len(self.layers) - 1)
        return self.head_loss(x, stream, batch, gradient=False)[0]

    def forward(self, batch: DeviceBatch) -> tuple[Float[Tensor, ""], MicroBatchState]:
        """Compute the loss and the state for ``backward``, which includes the gradient of the last layer's output."""
        x, stream = self.embedded(batch)
        saved: list[Saved | Tensor] = []
        for i, layer in enumerate(self.layers):
            if self.recompute:
                self._arena.layers.reset()
            below = x
            x, layer_saved = layer.forward(below, stream, i == len(self.layers) - 1)
            if i >= self.first:
                saved.append(below if self.recompute else layer_saved)
        loss, grad = self.head_loss(x, stream, batch)
        return loss, MicroBatchState(stream, saved, grad, self._arena.generation)

    def embedded(self, batch: DeviceBatch, backward: bool = True) -> tuple[Float[Tensor, "tokens hidden"], Stream]:
        """Begin a micro-batch with the adapters' current values; return its embeddings [T, H] and index tensors.

        backward: a backward pass follows, so layers are saved.
        """
        self._begin(batch.input_ids.shape[1], backward)
        for layer in self.layers:
            for group in layer.groups():
                group.refresh()
        x = self._decoder.embed_tokens(batch.input_ids)[0]
        cos, sin = self._decoder.rotary_emb(x[None], batch.position_ids)
        return x, _stream(batch, cos[0], sin[0], torch.unique(batch.target_index))

    def one_layer(
        self, i: int, x: Float[Tensor, "tokens hidden"], stream: Stream, grad: Float[Tensor, "outputs hidden"]
    ) -> LayerPass:
        """Compute layer ``i`` only, forward and backward, in a micro-batch that ``embedded`` began.

        x [T, H]: its input; grad [T, H]: of its output, for the last layer [U, H] at the stream's ``rows``.
        """
        layer, last = self.layers[i], i == len(self.layers) - 1
        self._arena.streams.reset()
        self._arena.layers.reset()
        out, saved = layer.forward(x, stream, last)
        gradients: list[Tensor | None] = [None] * len(self.parameters)
        below = torch.empty_like(x) if i > self.first else None
        if i >= self.first:
            layer.backward(grad, saved, stream, last, gradients, below)
        return LayerPass(out.clone(), below, {n: g for n, g in enumerate(gradients) if g is not None})

    def _begin(self, tokens: int, backward: bool) -> None:
        """Reserve the memory that the layers save for ``tokens`` tokens; of one layer if there is no backward pass."""
        layers = [layer.saved_elements(tokens) for layer in self.layers]
        streams = Bump.rounded(tokens * int(self._decoder.norm.weight.shape[0]), self._arena.dtype)
        one = self.recompute or not backward
        self._arena.begin(streams * len(self.layers), max(layers) if one else sum(layers))

    def head_loss(
        self, x: Float[Tensor, "outputs hidden"], stream: Stream, batch: DeviceBatch, gradient: bool = True
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "outputs hidden"]]:
        """Compute the loss of the last layer's output x [U, H] and its gradient [U, H]; zero without ``gradient``."""
        order = torch.argsort(batch.target_index, stable=True)
        targets = batch.target_ids[order]
        # the row of each target, needed if a row has several targets
        which = torch.searchsorted(stream.rows, batch.target_index[order]) if len(order) > len(x) else None
        norm = self._decoder.norm
        n, k = x.shape
        h, rstd = torch.empty_like(x), torch.empty(n)
        none = (0, None, None, 0, 0, None)
        self.kernels.norm_forward(n, k, x, norm.weight, norm.variance_epsilon, *none, h, k, None, rstd)
        grad = torch.zeros_like(h) if which is not None else torch.empty_like(h)
        losses = torch.empty(len(targets))
        vocabulary = int(self._head.weight.shape[0])
        step = max(1, LOGITS // vocabulary)
        for first in range(0, len(targets), step):
            part = slice(first, min(first + step, len(targets)))
            inputs = h[part] if which is None else h[which[part]]
            with self._arena.scratch("logits", len(inputs), vocabulary) as logits:
                self._logits(inputs, logits)
                self.kernels.cross_entropy(
                    len(inputs), vocabulary, logits, vocabulary, targets[part].contiguous(), losses[part]
                )  # in place: the gradient overwrites the logits
                part_grad = self._logits_backward(logits) if gradient else None
            if part_grad is None:
                continue
            if which is None:
                grad[part] = part_grad
            else:
                grad.index_add_(0, which[part], part_grad)
        if not gradient:
            return losses.double().sum().float(), grad.zero_()
        below = torch.empty_like(x)
        self.kernels.norm_backward(n, k, x, norm.weight, rstd, *none, grad, k, torch.zeros_like(x), below, None)
        return losses.double().sum().float(), below

    def _blocks(self) -> Iterator[tuple[slice, Float[Tensor, "rows hidden"]]]:
        """Yield the head's weight in the model's dtype: whole, or in pieces if it must be converted.

        A piece is overwritten by the next one.
        """
        weight = self._head.weight.detach()
        if weight.dtype is self._arena.dtype:
            yield slice(0, len(weight)), weight
            return
        size = rows_of(weight)
        for first in range(0, len(weight), size):
            rows = slice(first, min(first + size, len(weight)))
            with self._arena.scratch("head", *weight[rows].shape) as piece:
                yield rows, piece.copy_(weight[rows])

    def _logits(self, h: Float[Tensor, "targets hidden"], out: Float[Tensor, "targets vocab"]) -> None:
        """Compute the logits ``out`` [N, vocabulary] of h [N, H]."""
        for rows, block in self._blocks():
            if len(block) == out.shape[1]:
                torch.mm(h, block.t(), out=out)
            else:
                out[:, rows] = h @ block.t()

    def _logits_backward(self, grad: Float[Tensor, "targets vocab"]) -> Float[Tensor, "targets hidden"]:
        parts = [grad[:, rows] @ block for rows, block in self._blocks()]
        total: Tensor = sum(parts[1:], parts[0])
        return total

    def backward(self, state: MicroBatchState, scale: Float[Tensor, ""]) -> list[Float[Tensor, " ..."] | None]:
        """Compute the gradients of every adapter's A and B, in the order of ``parameters``."""
        stream, saved, grad = state.stream, state.saved, state.grad
        assert state.generation == self._arena.generation, "another micro-batch has been computed since"
        into: list[Tensor | None] = [None] * len(self.parameters)
        current = grad * scale.to(grad.dtype)
        for i in range(len(self.layers) - 1, self.first - 1, -1):
            layer, last, tensors = self.layers[i], i == len(self.layers) - 1, saved.pop()
            if not isinstance(tensors, Saved):
                tensors = layer.recomputed(tensors, stream, last)
            below = self._arena.buffer("below", *tensors.x.shape) if i > self.first else None
            layer.backward(current, tensors, stream, last, into, below)
            if below is not None:
                current = below
        return into


class _Loss(torch.autograd.Function):
    """The connection of the hand-written gradients to autograd."""

    @staticmethod
    def forward(ctx: Any, model: CompiledModel, batch: DeviceBatch, *_: Float[Tensor, " ..."]) -> Float[Tensor, ""]:
        loss, ctx.state = model.forward(batch)
        ctx.model = model
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Float[Tensor, ""]) -> tuple[Float[Tensor, " ..."] | None, ...]:
        state, ctx.state = ctx.state, None  # so that a loss that is kept does not keep the activations
        return (None, None, *ctx.model.backward(state, scale))


def _stream(
    batch: DeviceBatch,
    cos: Float[Tensor, "tokens rotary"],
    sin: Float[Tensor, "tokens rotary"],
    rows: Int[Tensor, " outputs"],
) -> Stream:
    segments = batch.segments
    offsets, parents = torch.tensor(segments.offsets), torch.tensor(segments.parents)
    shared = int(segments.offsets[max(segments.parents) + 1])
    return Stream(offsets, parents, shared, cos.contiguous(), sin.contiguous(), rows, torch.searchsorted(rows, offsets))


def window_of(block: nn.Module) -> int:
    """Return the number of keys that a query of this layer attends to; 0: all."""
    attention: Any = block.self_attn
    config = attention.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[attention.layer_idx] == "full_attention":
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


@contextmanager
def compiled_model(
    model: CausalLM, layers: Mapping[str, LoraLinear], state: DropoutState, recompute: bool
) -> Iterator[CompiledModel]:
    """Build the compiled form of a model for the block; the model's frozen weights become views of its memory.

    Raises Unsuitable.
    """
    compiled = CompiledModel(model, layers, state, recompute)
    try:
        yield compiled
    finally:
        compiled.release()


def report_compilation(model: CausalLM, layers: Mapping[str, LoraLinear], what: str, log: Log) -> None:
    """Log that ``what`` is compiled now, if the compiled layers support the model and are not compiled yet."""
    if native.needs_compilation() and not unsuitable(model, layers):
        log(f"compiling {what} for this processor{', once' if files.can_cache(log) else ''} (about 10 s)")


def unsuitable(model: CausalLM, layers: Mapping[str, LoraLinear]) -> str | None:
    """Return why the compiled layers do not support this model, None if they do; does not look for a compiler."""
    try:
        suited(model, layers)
    except Unsuitable as e:
        return str(e)
    return None


def suited(model: CausalLM, layers: Mapping[str, LoraLinear]) -> Decoder:
    """Return the decoder of a supported model. Raises Unsuitable."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    blocks = list(getattr(decoder, "layers", ()))
    kinds = {type(b).__name__ for b in blocks}
    config = model.config
    reasons = {
        f"they support the layers of Llama, Mistral, Qwen2, Phi-3 and GLM-4, not {', '.join(sorted(kinds))}": not kinds
        or not kinds <= set(LAYERS),
        "they run on the CPU only": model.device.type not in ("cpu", "meta"),
        "they support the activation SiLU only": getattr(config, "hidden_act", "silu") != "silu",
        "they support no dropout except LoRA's": any(
            getattr(config, k, 0.0) for k in ("attention_dropout", "resid_pdrop", "embd_pdrop")
        ),
        "the head has a bias or an adapter": getattr(head, "bias", None) is not None or isinstance(head, LoraLinear),
    }
    if kinds and kinds <= set(LAYERS):
        reasons |= {
            "a linear layer other than q, k and v has a bias": any(_biased(b) for b in blocks),
            "widths must be multiples of 16": any(_uneven(b) for b in blocks),
            "quantised layers must compute in the model's own dtype": any(
                isinstance(m, QuantLinear) and m.compute is not decoder.norm.weight.dtype for m in decoder.modules()
            ),
        }
    inside = {id(m) for m in decoder.modules()}
    reasons["an adapter is outside the decoder's layers"] = any(id(layer) not in inside for layer in layers.values())
    for reason, holds in reasons.items():
        if holds:
            raise Unsuitable(reason)
    return decoder


def _linears(block: nn.Module) -> dict[str, Any]:
    """Return the linear layers of a decoder layer by name, without the adapters around them."""
    linears = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear | QuantLinear)]
    return {n.removesuffix(".base").rpartition(".")[2]: m for n, m in linears}


def _biased(block: nn.Module) -> bool:
    inputs = ("q_proj", "k_proj", "v_proj", "qkv_proj")
    return any(m.bias is not None for n, m in _linears(block).items() if n not in inputs)


def _uneven(block: nn.Module) -> bool:
    widths = [int(block.self_attn.head_dim)]  # type: ignore[union-attr, arg-type]
    return any(w % 16 for w in widths + [m.in_features for m in _linears(block).values()])
