"""The training loop, top to bottom.

    for every step:  rows -> micro-batches -> sum of token losses / supervised tokens of the whole step
                     -> backward, micro-batch by micro-batch -> clip -> AdamW

Dividing by the step's own count makes any cut of the same rows into micro-batches the same step. Indices come from
the host with the batch; no step reads a device value except the loss that is recorded. Data-parallel training
needs two things here: each rank takes its share of the micro-batches, and gradients are summed before ``update``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.batch import Plan
from luthier.config import TrainConfig
from luthier.errors import TrainError
from luthier.kernels.segments import DeviceBatch, to_device
from luthier.lora import LoraLinear
from luthier.models.forward import checkpointing, loss_sum, segment_attention
from luthier.training.metrics import StepRecord, TrainResult
from luthier.training.optim import Optimizer
from luthier.training.schedule import learning_rate
from luthier.types import Batch, Example

OnStep = Callable[[StepRecord], None]


def plan(rows: int, config: TrainConfig) -> Plan:
    """The order of rows that ``config`` asks for."""
    return Plan(
        rows=rows,
        micro_rows=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
    )


def train(
    model: Any,
    layers: Mapping[str, LoraLinear],
    examples: Sequence[Example],
    config: TrainConfig,
    attention: str = "auto",
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train the adapter ``layers`` of ``model`` in place. Raises TrainError at the first loss that is not finite."""
    schedule = plan(len(examples), config)
    optimizer = Optimizer(
        [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)], config, model.dtype is torch.float16
    )
    losses: list[float] = []
    tokens = supervised = 0
    model.train()
    start = time.perf_counter()
    try:
        with segment_attention(model, attention), checkpointing(model, config.gradient_checkpointing):
            for step, batches in schedule.batches(examples):
                began = time.perf_counter()
                torch.manual_seed((config.seed << 32) + step)  # dropout follows from (seed, step) alone
                loss = accumulate(model, [to_device(b, model.device) for b in batches], optimizer)
                if step == 0:
                    gate(loss, layers, batches)
                rate = learning_rate(step, schedule.steps, config)
                norm = optimizer.update(rate)
                value = _finite(float(loss), step, batches)
                _finite(float(norm), step, batches, "gradient's norm")
                losses.append(value)
                tokens += sum(b.tokens for b in batches)
                supervised += sum(b.supervised for b in batches)
                if on_step:
                    on_step(
                        StepRecord(
                            step=step + 1,
                            steps=schedule.steps,
                            epoch=round((step + 1) / schedule.steps_per_epoch, 4),
                            loss=value,
                            grad_norm=float(norm),
                            learning_rate=rate,
                            tokens=sum(b.tokens for b in batches),
                            supervised_tokens=sum(b.supervised for b in batches),
                            seconds=time.perf_counter() - began,
                        )
                    )
    finally:
        model.eval()
    return TrainResult(losses, tokens, supervised, time.perf_counter() - start)


def accumulate(model: Any, batches: Sequence[DeviceBatch], optimizer: Optimizer) -> Tensor:
    """Gradients of one step's mean loss; returns that loss, [] fp32, still on the device."""
    supervised = sum(b.target_ids.shape[0] for b in batches)
    total: Tensor | None = None
    for batch in batches:
        loss = loss_sum(model, batch) / supervised
        optimizer.backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    optimizer.unscale()
    assert total is not None
    return total


def gate(loss: Tensor, layers: Mapping[str, LoraLinear], batches: Sequence[Batch]) -> None:
    """After the first backward: the loss is finite and every adapter is reached by a gradient."""
    _finite(float(loss), 0, batches)
    dead = [
        name for name, layer in layers.items() if layer.lora_B.grad is None or not bool((layer.lora_B.grad != 0).any())
    ]
    if dead:
        shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        raise TrainError(
            f"no gradient reaches the adapter of {shown}: it would never be trained",
            "leave those layers out of lora.target_modules",
        )
    broken = [n for n, layer in layers.items() if not _is_finite(layer.lora_B.grad)]
    if broken:
        raise TrainError(
            f"the first gradient is not finite in {', '.join(broken[:8])}", "train in fp32: --set model.dtype=float32"
        )


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(torch.isfinite(tensor).all())


def _finite(value: float, step: int, batches: Sequence[Batch], what: str = "loss") -> float:
    if math.isfinite(value):
        return value
    rows = [str(s) for b in batches for s in b.sources]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    raise TrainError(
        f"the {what} is {value} at step {step + 1}; its rows: {shown}",
        "lower the learning rate (--set train.learning_rate=...), or train in fp32 (--set model.dtype=float32)",
    )
