"""Compute the loss of a flat batch; the output head sees supervised positions only."""

from __future__ import annotations

import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.batching.collate import DeviceBatch, collate, to_device
from luthier.compiled.layer import Stream
from luthier.compiled.model import CompiledModel, Unsuitable
from luthier.errors import ModelError
from luthier.kernels import attention as _attention  # noqa: F401 - registers the attention functions
from luthier.models.directory import context_length, rotary_limit
from luthier.models.native_model import first_layers, linears_in_fp32
from luthier.models.protocols import CausalLM
from luthier.types import Example, Log

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LossOf = Callable[[DeviceBatch], Tensor]


@dataclass(frozen=True, slots=True)
class LossFunction:
    """Sums the cross-entropy of a batch's supervised tokens, [] fp32. compiled: with the compiled layers."""

    of: LossOf
    compiled: bool

    def __call__(self, batch: DeviceBatch) -> Float[Tensor, ""]:
        return self.of(batch)


def supervised_logits(model: CausalLM, batch: DeviceBatch) -> Float[Tensor, "targets vocab"]:
    """Return the logits [N, V] at the N supervised positions; the head skips all others."""
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.target_index,
        segments=batch.segments,
    )
    logits: Tensor = out.logits[0]
    return logits


def loss_sum(model: CausalLM, batch: DeviceBatch) -> Float[Tensor, ""]:
    """Sum the cross-entropy of the batch's supervised tokens, [] fp32; the caller divides by the step's token count."""
    return F.cross_entropy(supervised_logits(model, batch).float(), batch.target_ids, reduction="sum")


@contextmanager
def segment_attention(model: CausalLM, name: str = "auto") -> Iterator[None]:
    """Use attention by segments (``kernels.attention``) within the block.

    Raises ModelError if the model's attention cannot be replaced.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(f"luthier_{name}")
    if model.config.get_text_config()._attn_implementation != f"luthier_{name}":
        raise _cannot(model, "its attention cannot be replaced")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def checkpointing(model: CausalLM, enabled: bool) -> Iterator[None]:
    """Use gradient checkpointing within the block, if enabled: layers save their input only and are recomputed."""
    if not enabled:
        yield
        return
    new = hasattr(model, "activation_checkpointing_enable")  # its name before transformers 5.2x: gradient_...
    getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
    model.disable_input_require_grads()  # non-reentrant checkpointing needs no gradient below the first adapter
    try:
        yield
    finally:
        getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_disable")()


@contextmanager
def announced(log: Log, text: str, seconds: float = 2.0) -> Iterator[None]:
    """Log ``text`` if the block takes longer than ``seconds``, as soon as it has."""
    timer = threading.Timer(seconds, log, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_FAILURES = (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError, IndexError)


@torch.no_grad()
def verify_segments(
    model: CausalLM, examples: Sequence[Example], kernel: str = "auto", log: Log = lambda _: None
) -> None:
    """Verify on two rows that this model keeps the rows of a flat batch apart and gives the same logits as unpacked.

    Some architectures carry state from token to token (convolutions, recurrences) or use an attention that the segment
    kernels do not support: rows of a flat batch would influence each other. Raises ModelError for those.

    Runs the first layers, up to one of the last kind (see ``first_layers``), and compares a few hundred of the logits;
    all layers and all logits if that fails.
    """
    _verify_rotary(model)
    tokens = min(24, rotary_limit(model.config) or 24)
    rows = [short(examples[0], tokens), short(examples[min(1, len(examples) - 1)], tokens)]
    with announced(log, "verifying on two short rows that the model keeps the rows of a batch apart"):
        try:
            with first_layers(model) as depth, _few_logits(model):
                others, own = _influences(model, rows, kernel)
        except _FAILURES:
            try:
                depth = int(model.config.get_text_config().num_hidden_layers)
                others, own = _influences(model, rows, kernel)
            except _FAILURES as e:
                raise _cannot(model, f"it fails on a flat batch ({' '.join(str(e).split())[:120]})") from None
    if others > 1e-3:
        raise _cannot(model, "its layers carry state from one row of a flat batch to the next")
    if own > rounding_bound(model.dtype, depth):
        raise _cannot(model, "its own attention differs from causal self-attention")


@contextmanager
def _few_logits(model: CausalLM) -> Iterator[None]:
    """Compute only every n-th logit within the block: the head of a large vocabulary costs more than a layer."""
    head = model.get_output_embeddings()
    model.set_output_embeddings(_FewLogits(head.weight.detach()))
    try:
        yield
    finally:
        model.set_output_embeddings(head)


class _FewLogits(nn.Module):
    """A head with about ``count`` rows of ``weight``: x [..., in] -> [..., count]."""

    def __init__(self, weight: Float[Tensor, "vocab hidden"], count: int = 512) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight[:: max(1, len(weight) // count)], requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch rows"]:
        return F.linear(x, self.weight.to(x.dtype))


def _influences(model: CausalLM, rows: Sequence[Example], kernel: str) -> tuple[float, float]:
    """Return by how much the logits of the second row change with the first row, and if it is computed by itself."""
    first, second = rows
    other = replace(first, ids=first.ids[::-1].copy())  # reversed, so that even its last token differs
    batches = [to_device(collate([row, second]), model.device) for row in (first, other)]
    unpacked = torch.from_numpy(second.ids[:-1]).to(model.device)[None]
    with segment_attention(model, kernel):
        flat, changed = (supervised_logits(model, b)[-second.supervised :].float() for b in batches)
    logits = model(input_ids=unpacked, use_cache=False).logits[0].float()
    return relative_distance(changed, flat), relative_distance(flat, logits[torch.from_numpy(second.trained[1:])])


def rounding_bound(dtype: torch.dtype, layers: int) -> float:
    """Return the relative difference of logits that rounding explains if sums are taken in another order.

    Measured: 1e-6 in fp32; in bf16 0.007 after one layer, 0.012 after four and up to 0.06 after thirty.
    """
    return 1e-3 if dtype is torch.float32 else 0.03 * math.sqrt(layers)


@torch.no_grad()
def _verify_rotary(model: CausalLM) -> None:
    """Verify that a row is rotated alike alone and beside the longest row that may share its micro-batch."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    arguments = set(inspect.signature(rotary.forward).parameters) if rotary else set()
    if not rotary or not arguments <= {"x", "position_ids", "layer_type"}:
        return
    limit, longest = rotary_limit(model.config), context_length(model.config) or 2**17
    kinds = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()))
    options = [{"layer_type": kind} for kind in kinds] if "layer_type" in arguments else [{}]
    x = torch.zeros(1, 1, 1, dtype=model.dtype, device=model.device)

    def rotated(*positions: int) -> list[Tensor]:
        ids = torch.tensor([positions], device=model.device)
        results = [rotary(x, position_ids=ids, **option) for option in options]
        return [t for result in results for t in (result if isinstance(result, tuple) else (result,))]

    for row, other in [(24, longest)] if limit is None else [(min(24, limit), limit), (limit + 1, longest)]:
        pairs = zip(rotated(1, row - 1), rotated(1, row - 1, other - 1), strict=True)
        if any(not torch.equal(single, beside[:, :2]) for single, beside in pairs):
            raise _cannot(model, "the rotation of a row depends on longer rows beside it")


def relative_distance(a: Float[Tensor, "targets vocab"], b: Float[Tensor, "targets vocab"]) -> float:
    """Norm of the difference, divided by the norm of ``b`` minus its mean."""
    return float((a - b).norm() / (b - b.mean()).norm().clamp_min(1e-30))


def short(example: Example, tokens: int = 24) -> Example:
    """Truncate a row to ``tokens`` tokens, all supervised except the first."""
    size = min(tokens, len(example))
    return Example(example.ids[:size], np.arange(size) >= 1, example.source)


def _cannot(model: CausalLM, why: str) -> ModelError:
    return ModelError(
        f"models of type {model.config.model_type} cannot be trained yet: {why}",
        "use a model with causal self-attention, such as Llama, Qwen2, Phi-3, Gemma 2 or GLM-4",
    )


# A compiled layer's error may be this many times that of transformers' own layer, which rounds at least as often. In
# fp32 that layer is itself the reference, and the compiled ones measured 1e-6. The loss is a single number, in which
# roundings may cancel by chance.
_ROUNDINGS, _ERROR_IN_FP32, _ERROR_OF_LOSS = 3, 1e-4, 0.01


def verify_compiled(compiled: CompiledModel, model: CausalLM, examples: Sequence[Example]) -> None:
    """Verify every compiled layer and the loss, forward and backward, on two short rows.

    Compares outputs, input gradients and the gradient of each adapter matrix, layer by layer from the same input, with
    transformers' own layer computed in fp32. Raises Unsuitable if an error is more than rounding.
    """
    rows = [short(e, 48) for e in (examples[0], examples[min(1, len(examples) - 1)])]  # long: roundings average out
    batch = to_device(collate(rows, share=True), model.device)
    generator = torch.Generator().manual_seed(0)
    with segment_attention(model), _random_adapters(compiled, generator):
        x, stream = compiled.embedded(batch)
        blocks, errors = list(model.get_decoder().layers), list[_Error]()
        for i, block in enumerate(blocks):
            out_rows = stream.rows if i == len(blocks) - 1 else torch.arange(len(x))
            grad = torch.randn(len(out_rows), x.shape[1], generator=generator).to(x.dtype)
            ours = compiled.one_layer(i, x, stream, grad)
            own = _OwnLayer(block, batch, stream, out_rows, [compiled.parameters[n] for n in ours.gradients])
            names = [f"the output of layer {i}", f"the input gradient of layer {i}"]
            names += [f"the gradient of {compiled.names[n]}" for n in ours.gradients]
            tensors = [ours.out, ours.below, *ours.gradients.values()]
            errors += _errors(names, tensors, own.forward_backward, block, x, grad)
            x = ours.out

        head = model.get_output_embeddings()

        def own_loss(x: Tensor, _: Tensor) -> list[Tensor]:
            x = x.detach().requires_grad_()
            logits = head(model.get_decoder().norm(x))
            places = torch.searchsorted(stream.rows, batch.target_index)
            loss = F.cross_entropy(logits[places].float(), batch.target_ids, reduction="sum")
            return [loss.detach(), *torch.autograd.grad(loss, x)]

        loss_names = ["the loss", "the input gradient of the loss"]
        errors += _errors(loss_names, list(compiled.head_loss(x, stream, batch)), own_loss, head, x, x)
    _check_errors(errors)


@dataclass(frozen=True, slots=True)
class _OwnLayer:
    """One of transformers' decoder layers and its arguments. out_rows [U]: the rows to output."""

    block: nn.Module
    batch: DeviceBatch
    stream: Stream
    out_rows: Int[Tensor, " outputs"]
    parameters: Sequence[nn.Parameter]

    def forward_backward(
        self, x: Float[Tensor, "tokens hidden"], grad: Float[Tensor, "outputs hidden"]
    ) -> list[Float[Tensor, " ..."]]:
        """x [T, H], grad [U, H] -> output [U, H], input gradient [T, H], gradients of the parameters."""
        x = x.detach().requires_grad_()
        cos_sin = (self.stream.cos[None].to(x.dtype), self.stream.sin[None].to(x.dtype))
        out = self.block(
            x[None],
            attention_mask=None,
            position_ids=self.batch.position_ids,
            position_embeddings=cos_sin,
            segments=self.batch.segments,
        )
        out = (out[0] if isinstance(out, tuple) else out)[0][self.out_rows]
        return [out.detach(), *torch.autograd.grad(out, [x, *self.parameters], grad)]


@dataclass(frozen=True, slots=True)
class _Error:
    """The relative error of a compiled result, and that of transformers' own result in the model's dtype."""

    name: str
    compiled: float
    own: float

    @property
    def kind(self) -> str:
        """The name without the number of the layer."""
        return re.sub(r"\d+", "N", self.name)


def _errors(
    names: Sequence[str],
    ours: Sequence[Float[Tensor, " ..."] | None],
    own: Callable[[Tensor, Tensor], list[Tensor]],
    module: nn.Module,
    x: Float[Tensor, "tokens hidden"],
    grad: Float[Tensor, "outputs hidden"],
) -> list[_Error]:
    """Compare the tensors of ``ours`` (None: not computed) and of ``own`` with ``own`` in fp32."""
    rounded = own(x, grad)
    with linears_in_fp32(module):
        expected = own(x.float(), grad.float())
    return [
        _Error(name, _relative_error(name, result, right), _relative_error(name, usual, right))
        for name, result, usual, right in zip(names, ours, rounded, expected, strict=True)
        if result is not None
    ]


def _relative_error(name: str, result: Float[Tensor, "*shape"], right: Float[Tensor, "*shape"]) -> float:
    """The norm of the difference over the norm; of outputs and input gradients, the mean over the tokens.

    Some models have a token whose activations are a thousand times those of the others: in one norm over all tokens,
    the last bits of that token would decide.
    """
    per_token = name.startswith(("the output", "the input gradient"))
    difference, size = (result - right).float(), right.float()
    if not per_token:
        difference, size = difference.reshape(1, -1), size.reshape(1, -1)
    return float((difference.norm(dim=1) / size.norm(dim=1).clamp_min(1e-30)).mean())


def _check_errors(errors: Sequence[_Error]) -> None:
    """Raises Unsuitable if an error is larger than rounding explains.

    The rounding of a result is that of transformers' own result, or the median over the layers if that is larger.
    """
    kinds: dict[str, list[float]] = {}
    for error in errors:
        kinds.setdefault(error.kind, []).append(error.own)
    medians = {kind: float(np.median(values)) for kind, values in kinds.items()}
    for error in errors:
        rounding = max(error.own, medians[error.kind])
        bound = _ERROR_OF_LOSS if error.name == "the loss" else _ROUNDINGS * rounding + _ERROR_IN_FP32
        if not error.compiled <= bound:
            raise Unsuitable(
                f"on this machine {error.name} has a relative error of {error.compiled:.2g} "
                f"(rounding explains {bound:.2g}): please report this with the output of luthier doctor"
            )


@contextmanager
def _random_adapters(compiled: CompiledModel, generator: torch.Generator) -> Iterator[None]:
    """Fill every B with random values within the block: with B = 0, as at the start, the gradient of A is zero."""
    matrices = [p for p, name in zip(compiled.parameters, compiled.names, strict=True) if name.endswith("lora_B")]
    before = [b.detach().clone() for b in matrices]
    try:
        for b in matrices:
            b.data.copy_(torch.randn(b.shape, generator=generator) / b.shape[1])
        yield
    finally:
        for b, value in zip(matrices, before, strict=True):
            b.data.copy_(value)
