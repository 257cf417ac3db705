"""AdamW for the adapter's parameters, with 32-bit or 8-bit state, gradient clipping, and loss scaling for fp16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.config import TrainConfig
from luthier.models.quantization import bitsandbytes_functions

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


def substitute(name: str, device: str) -> str | None:
    """Name the optimizer that replaces ``train.optim`` on this device; None if it needs no replacement."""
    return "adamw_torch" if name == "paged_adamw_32bit" and device != "cuda" else None


def check_packages(name: str, device: str) -> None:
    """Raise MissingPackageError if an optimizer needs bitsandbytes and that is not installed."""
    if (substitute(name, device) or name) != "adamw_torch":
        bitsandbytes_functions()


def _build(name: str, parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer. Raises MissingPackageError if it needs bitsandbytes and that is not installed."""
    device = parameters[0].device.type
    if name == "adamw_torch":
        fused = device in ("cpu", "cuda")
        return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    bitsandbytes_functions()  # bitsandbytes, imported safely
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW32bit

    kind = {"adamw_8bit": AdamW8bit, "paged_adamw_32bit": PagedAdamW32bit}[name]
    optimizer: torch.optim.Optimizer = kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return optimizer


class Optimizer:
    """AdamW and the gradients of one step: call ``backward`` per micro-batch, then ``unscale`` and ``update``.

    No method reads a value from the device, except loss scaling for fp16 (CUDA without native bf16), which must know
    whether a gradient overflowed. That path has not yet run on a GPU.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig, fp16: bool = False) -> None:
        self.parameters = list(parameters)
        self.max_grad_norm = config.max_grad_norm
        device = self.parameters[0].device.type
        self.kind = substitute(config.optim, device) or config.optim
        self.adamw = _build(self.kind, self.parameters, config)
        self._scaler = torch.amp.GradScaler(device) if fp16 else None
        self.skips = fp16  # a step whose gradients overflow is skipped, and the scale is halved

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradients of ``loss``, scaled if fp16."""
        scaled: Tensor = self._scaler.scale(loss) if self._scaler else loss
        scaled.backward()  # type: ignore[no-untyped-call]

    def unscale(self) -> None:
        """Undo loss scaling in the gradients."""
        if self._scaler:
            self._scaler.unscale_(self.adamw)

    def update(self, lr: float) -> Float[Tensor, ""]:
        """Clip the gradients, take a step and clear them. Call ``unscale`` first.

        Returns [] fp32: the norm of the gradients before clipping.
        """
        limit = self.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self._scaler:
            self._scaler.step(self.adamw)
            self._scaler.update()
        else:
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def moments(self, parameter: nn.Parameter) -> dict[str, Shaped[Tensor, " ..."]]:
        """Return the optimizer state of one parameter, without tables that all parameters share."""
        state = self.adamw.state[parameter]
        shared = ("step", "qmap1", "qmap2")
        return {name: t for name, t in state.items() if isinstance(t, Tensor) and name not in shared}

    def restore(self, parameter: nn.Parameter, step: int, moments: dict[str, Shaped[Tensor, " ..."]]) -> None:
        """Restore the state that one parameter had after ``step`` steps."""
        state = self.adamw.state[parameter]
        if self.kind == "adamw_torch":
            device = parameter.device if self.adamw.defaults["fused"] else "cpu"
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
        else:
            index = next(i for i, p in enumerate(self.parameters) if p is parameter)
            adamw: Any = self.adamw
            adamw.init_state(adamw.param_groups[0], parameter, 0, index)
            state["step"] = step
        state.update(moments)

    def scaler_state(self) -> dict[str, object]:
        """Return the state of loss scaling; empty if not fp16."""
        return dict(self._scaler.state_dict()) if self._scaler else {}

    def restore_scaler(self, state: dict[str, object]) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then cosine or linear decay to zero, or constant."""
    warmup = math.ceil(steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate
