"""One forward pass over a flat batch: the loss of its supervised tokens, and nothing else of the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.batching.collate import DeviceBatch, collate, to_device
from luthier.compiled.model import CompiledModel, Unsuitable
from luthier.errors import ModelError
from luthier.kernels import attention as _attention  # noqa: F401 - registers the attention functions
from luthier.kernels import native
from luthier.lora.layers import frozen_dtype
from luthier.types import Example


def supervised_logits(model: Any, batch: DeviceBatch) -> Tensor:
    """[N, V] logits at the supervised positions only; the head never sees the others."""
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.target_index,
        segments=batch.segments,
    )
    logits: Tensor = out.logits[0]
    return logits


def loss_sum(model: Any, batch: DeviceBatch) -> Tensor:
    """[] fp32: cross-entropy summed over the batch's supervised tokens (the caller divides by the step's count)."""
    return F.cross_entropy(supervised_logits(model, batch).float(), batch.target_ids, reduction="sum")


@torch.no_grad()
def token_losses(model: Any, batch: DeviceBatch) -> Tensor:
    """[N] fp32: cross-entropy of each supervised token."""
    return F.cross_entropy(supervised_logits(model, batch).float(), batch.target_ids, reduction="none")


@contextmanager
def segment_attention(model: Any, name: str = "auto") -> Iterator[None]:
    """Within the block the model attends by segments (``kernels.attention``); afterwards as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(f"luthier_{name}")
    if model.config.get_text_config()._attn_implementation != f"luthier_{name}":
        raise _cannot(model, "its attention cannot be replaced")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def checkpointing(model: Any, enabled: bool) -> Iterator[None]:
    """Within the block decoder layers keep their input only and are recomputed in the backward pass."""
    if not enabled:
        yield
        return
    new = hasattr(model, "activation_checkpointing_enable")  # its name before transformers 5.2x: gradient_...
    getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
    model.disable_input_require_grads()  # without re-entrance nothing below the first adapter needs a gradient
    try:
        yield
    finally:
        getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_disable")()


@torch.no_grad()
def prove_segments(model: Any, examples: Sequence[Example], kernel: str = "auto") -> None:
    """Prove on two rows that this model keeps the rows of a flat batch apart and attends as it does by itself.

    Some architectures carry state from token to token (convolutions, recurrences) or attend in a way that no segment
    kernel knows; trained flat, they would learn from their neighbours. Raises ModelError for those.
    """
    rows = [short(examples[0]), short(examples[min(1, len(examples) - 1)])]
    other = replace(rows[0], ids=rows[0].ids[::-1].copy())  # up to its very last token
    one, two = (to_device(collate([first, rows[1]]), model.device) for first in (rows[0], other))
    alone = torch.from_numpy(rows[1].ids[:-1]).to(model.device)[None]
    count = rows[1].supervised
    try:
        with segment_attention(model, kernel):
            flat, changed = (supervised_logits(model, b)[-count:].float() for b in (one, two))
        expected = model(input_ids=alone, use_cache=False).logits[0].float()[torch.from_numpy(rows[1].trained[1:])]
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError) as e:
        raise _cannot(model, f"a flat batch fails in it ({' '.join(str(e).split())[:120]})") from None
    if _distance(changed, flat) > 1e-3:
        raise _cannot(model, "its layers carry state from one row of a flat batch to the next")
    # 30 layers in bf16 measured 0.06 apart from nothing but the order of sums; fp32 1e-6
    if _distance(flat, expected) > (1e-3 if model.dtype is torch.float32 else 0.2):
        raise _cannot(model, "its own attention differs from plain causal attention")


def _distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of the logits around their mean."""
    return float((a - b).norm() / (b - b.mean()).norm().clamp_min(1e-30))


def short(example: Example, tokens: int = 24) -> Example:
    """The beginning of a row, all but the first token scored."""
    size = min(tokens, len(example))
    return Example(example.ids[:size], np.arange(size) >= 1, example.source)


def _cannot(model: Any, why: str) -> ModelError:
    return ModelError(
        f"models of type {model.config.model_type} cannot be trained yet: {why}",
        "use a model with plain causal attention, such as Llama, Qwen2, Phi-3, Gemma 2 or GLM-4",
    )


# Of the loss, and of the gradients together (norm of the difference over the norm). In bf16 both sides round: measured
# was 0.011 of the gradients, in fp32 7e-7; a fault in a kernel is of the order of 1.
_BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.1)}
_DEPTH = 2  # layers: all are computed by the same kernels, and a 7B model's in autograd would take gigabytes
_TELL = ": tell us, with what luthier doctor prints"


def prove_compiled(compiled: CompiledModel, model: Any, examples: Sequence[Example]) -> None:
    """Loss and gradients of the beginnings of two rows through the first layers that train, both ways.

    Raises Unsuitable where they differ.
    """
    rows = [short(examples[0]), short(examples[min(1, len(examples) - 1)])]
    batch = to_device(collate(rows, share=True), model.device)
    with native.returning_memory(), segment_attention(model), _first_layers(compiled, model):
        found, ours = _taken(compiled.loss_sum(batch), compiled.parameters)
        expected, theirs = _taken(loss_sum(model, batch), compiled.parameters)
    loss_bound, gradient_bound = _BOUNDS[frozen_dtype(model)]
    if not abs(found - expected) <= loss_bound * abs(expected):
        raise Unsuitable(f"on this machine they come to the loss {found:.5g} where {expected:.5g} is right{_TELL}")
    apart = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not apart <= gradient_bound:
        raise Unsuitable(f"on this machine they come to gradients that are {apart:.2g} of their size away{_TELL}")


@contextmanager
def _first_layers(compiled: CompiledModel, model: Any) -> Iterator[None]:
    """Within the block both are cut off after the first layers that train."""
    decoder, depth = model.get_decoder(), compiled.first + _DEPTH
    whole = decoder.layers, compiled.layers
    decoder.layers, compiled.layers = whole[0][:depth], whole[1][:depth]
    try:
        yield
    finally:
        decoder.layers, compiled.layers = whole


def _taken(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[float, Tensor]:
    """The loss, and its gradients as one vector; none of layers that were cut off."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(loss.detach()), torch.cat([g.reshape(-1) for g in found if g is not None])
