"""Train the adapter step by step.

    for every step:  rows -> micro-batches -> sum of token losses / supervised tokens of the whole step
                     -> backward, micro-batch by micro-batch -> clip -> AdamW

Because the loss is divided by the supervised tokens of the whole step, the split of a step's rows into micro-batches
does not change the result. Indices come from the host with the batch; the only device values that a step reads are the
loss and the gradient norm. Data-parallel training would need two changes here: each rank computes its share of the
micro-batches, and gradients are summed over ranks before ``update``.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.batching.collate import DeviceBatch, to_device
from luthier.batching.plan import Packing, Plan
from luthier.compiled import Unsuitable, compiled_model, report_compilation
from luthier.config import TrainConfig
from luthier.devices.device import deterministic, keeping_freed_memory
from luthier.encoding.store import row_starts
from luthier.errors import ConfigError, TrainError, listed
from luthier.kernels.dropout import DropoutState
from luthier.lora.layers import LoraLinear, frozen_dtype, share_dropout_state
from luthier.models.directory import rotary_limit
from luthier.models.native_model import verify_once
from luthier.models.protocols import CausalLM
from luthier.training.checkpoint import Checkpoint, restore
from luthier.training.forward import (
    LossFunction,
    LossOf,
    announced,
    checkpointing,
    loss_sum,
    segment_attention,
    verify_compiled,
)
from luthier.training.metrics import Progress, StepRecord
from luthier.training.optimizer import Optimizer, learning_rate
from luthier.types import Batch, Example, Log

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class Session:
    """Callbacks and options of one session of a run (from the start or a checkpoint until it ends or is stopped).

    on_step: called with every step's record.
    save:    called with the optimizer and the progress every ``save_steps`` steps, at the end, and when stopped.
    stop:    called after every step; true ends the session.
    attention: ``model.attn_implementation``.
    log:     called with lines of text for the user, such as why training is slower than it could be.
    evaluate: called after the last step, without dropout, with the function that computes the loss of a batch.
    """

    on_step: Callable[[StepRecord], None] = lambda _: None
    save: Callable[[Optimizer, Progress], None] = lambda *_: None
    stop: Callable[[], bool] = lambda: False
    attention: str = "auto"
    log: Log = lambda _: None
    evaluate: Callable[[LossFunction], None] = lambda _: None


def train(
    model: CausalLM,
    layers: Mapping[str, LoraLinear],
    examples: Sequence[Example],
    config: TrainConfig,
    session: Session | None = None,
    resume: Checkpoint | None = None,
) -> Progress:
    """Train the adapter ``layers`` of ``model`` in place, from the start or from a checkpoint.

    Returns the progress; its ``step`` is less than the plan's steps if ``session.stop`` ended the session.
    Raises TrainError at the first loss or gradient that is not finite, with the step's rows in the message, and
    ConfigError as ``loss_function`` does.
    """
    session = session or Session()
    schedule = Plan.of(len(row_starts(examples)) - 1, config)
    parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    optimizer = Optimizer(parameters, config, fp16=frozen_dtype(model) is torch.float16)
    done = Progress()
    if resume:
        restore(resume, layers, optimizer)
        done = copy.deepcopy(resume.progress)
    packing = Packing.of(config, rotary_limit(model.config))
    dropout = share_dropout_state(layers)
    before = done.seconds
    model.train()
    try:
        with (
            deterministic(model.device),
            loss_function(model, layers, examples, config, session, dropout) as loss_of,
        ):
            start = time.perf_counter()  # compiling and verifying the kernels does not count as training
            steps = _Steps(loss_of, layers, optimizer, dropout, schedule, config)
            for step, batches in schedule.batches(examples, done.step, packing):
                record = steps.take(step, batches)
                done.step = step + 1
                done.losses.append(record.loss)
                done.tokens += record.tokens
                done.supervised_tokens += record.supervised_tokens
                done.seconds = before + time.perf_counter() - start
                session.on_step(record)
                stopped = session.stop() and done.step < schedule.steps
                if stopped or done.step % config.save_steps == 0 or done.step == schedule.steps:
                    began = time.perf_counter()
                    session.save(optimizer, done)
                    start += time.perf_counter() - began  # the time of saving does not count as training
                if stopped:
                    break
            if done.step == schedule.steps:
                model.eval()
                dropout.off = True
                with torch.no_grad():
                    session.evaluate(loss_of)
    finally:
        model.eval()
        dropout.off = False
    return done


@contextmanager
def loss_function(
    model: CausalLM,
    layers: Mapping[str, LoraLinear],
    examples: Sequence[Example],
    config: TrainConfig,
    session: Session,
    dropout: DropoutState,
) -> Iterator[LossFunction]:
    """Yield the function that computes a batch's loss: the compiled layers, verified on two rows, or transformers' own.

    Raises ConfigError if ``train.fused`` is true and the compiled layers are not available.
    """
    recompute = config.gradient_checkpointing is True
    with ExitStack() as stack:
        if config.fused:
            try:
                if session.attention != "auto":
                    raise Unsuitable(f"model.attn_implementation is {session.attention}")
                report_compilation(model, layers, "the training step", session.log)
                with ExitStack() as tried:
                    compiled = tried.enter_context(compiled_model(model, layers, dropout, recompute))
                    settings = [recompute, compiled.names, [tuple(p.shape) for p in compiled.parameters]]
                    with announced(session.log, "verifying the compiled layers on two short rows"):
                        verify = partial(verify_compiled, compiled, model, examples)
                        verify_once("compiled layers", model, settings, verify)
                    stack.push(tried.pop_all())
            except Unsuitable as e:
                if config.fused is True:
                    raise ConfigError(f"train.fused: {e}", "--set train.fused=auto") from None
                session.log(f"note: luthier's compiled layers are not used ({e}); training is slower without them")
            else:
                with keeping_freed_memory():
                    yield LossFunction(compiled.loss_sum, compiled=True)
                return
        stack.enter_context(segment_attention(model, session.attention))
        stack.enter_context(checkpointing(model, recompute))
        yield LossFunction(partial(loss_sum, model), compiled=False)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The optimizer steps of a session: what each needs besides its rows."""

    loss_of: LossOf
    layers: Mapping[str, LoraLinear]
    optimizer: Optimizer
    dropout: DropoutState
    schedule: Plan
    config: TrainConfig

    def take(self, step: int, batches: list[Batch]) -> StepRecord:
        """Take optimizer step ``step`` (counted from 0) and return its record."""
        began = time.perf_counter()
        optimizer, schedule, config = self.optimizer, self.schedule, self.config
        torch.manual_seed((config.seed << 32) + step)  # the model's own random numbers depend on (seed, step) only
        self.dropout.seed, self.dropout.step = config.seed, step
        device = next(iter(self.layers.values())).lora_A.device
        loss = accumulate(self.loss_of, [to_device(b, device) for b in batches], optimizer, self.dropout)
        if step == 0 and not optimizer.skips:
            check_first_gradients(loss, self.layers, batches)
        rate = learning_rate(step, schedule.steps, config)
        norm = float(optimizer.update(rate))
        if not optimizer.skips:
            _finite(norm, step, batches, "gradient norm")
        return StepRecord(
            step=step + 1,
            steps=schedule.steps,
            epoch=round((step + 1) / schedule.steps_per_epoch, 4),
            loss=_finite(float(loss), step, batches),
            grad_norm=norm if math.isfinite(norm) else None,
            learning_rate=rate,
            tokens=sum(b.tokens for b in batches),
            supervised_tokens=sum(b.supervised for b in batches),
            seconds=time.perf_counter() - began,
        )


def accumulate(
    loss_of: LossOf, batches: Sequence[DeviceBatch], optimizer: Optimizer, dropout: DropoutState | None = None
) -> Float[Tensor, ""]:
    """Accumulate the gradients of one step's mean loss over its micro-batches; return it, [] fp32 on the device."""
    supervised = sum(b.target_ids.shape[0] for b in batches)
    total: Tensor | None = None
    for micro, batch in enumerate(batches):
        if dropout:
            dropout.micro = micro
        loss = loss_of(batch) / supervised
        optimizer.backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    optimizer.unscale()
    assert total is not None
    return total


def check_first_gradients(loss: Float[Tensor, ""], layers: Mapping[str, LoraLinear], batches: Sequence[Batch]) -> None:
    """Check, after the first backward pass, that the loss is finite and a gradient reaches every adapter layer.

    Raises TrainError.
    """
    _finite(float(loss), 0, batches)
    dead = [
        name for name, layer in layers.items() if layer.lora_B.grad is None or not bool((layer.lora_B.grad != 0).any())
    ]
    if dead:
        raise TrainError(
            f"no gradient reaches the adapter of {listed(dead)}, so it would not be trained",
            "remove these layers from lora.target_modules",
        )
    broken = [n for n, layer in layers.items() if not _is_finite(layer.lora_B.grad)]
    if broken:
        raise TrainError(
            f"the first gradient is not finite in {listed(broken)}", "train in fp32: --set model.dtype=float32"
        )


def _is_finite(tensor: Float[Tensor, " ..."] | None) -> bool:
    return tensor is not None and bool(torch.isfinite(tensor).all())


def _finite(value: float, step: int, batches: Sequence[Batch], what: str = "loss") -> float:
    if math.isfinite(value):
        return value
    rows = [str(s) for b in batches for s in b.sources]
    raise TrainError(
        f"the {what} is {value} at step {step + 1}; rows of that step: {listed(rows)}",
        "lower the learning rate (--set train.learning_rate=...), or train in fp32 (--set model.dtype=float32)",
    )
