"""AdamW over the adapter's parameters, with clipping, and loss scaling where fp16 needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.config import TrainConfig


class Optimizer:
    """backward() any number of times, then update(): one optimizer step.

    No method reads the value of a device tensor, except fp16's loss scaling (CUDA without native bf16), which
    has to know whether a gradient overflowed. That path has not yet run on a GPU.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig, fp16: bool = False) -> None:
        self.parameters = list(parameters)
        self.max_grad_norm = config.max_grad_norm
        device = self.parameters[0].device.type
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=device in ("cpu", "cuda"),
        )
        self._scaler = torch.amp.GradScaler(device) if fp16 else None
        self.skips = fp16  # a step whose gradients overflow is left out, and the scale halved

    def backward(self, loss: Tensor) -> None:
        scaled: Tensor = self._scaler.scale(loss) if self._scaler else loss
        scaled.backward()  # type: ignore[no-untyped-call]

    def unscale(self) -> None:
        """Make gradients what they are without loss scaling."""
        if self._scaler:
            self._scaler.unscale_(self.adamw)

    def update(self, lr: float) -> Tensor:
        """Clip, step, clear. Returns [] fp32: the gradients' norm before clipping. Call ``unscale`` first."""
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

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's running moments of one parameter."""
        state = self.adamw.state[parameter]
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}

    def restore(self, parameter: nn.Parameter, step: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Put one parameter's state back, as after ``step`` steps."""
        device = parameter.device if self.adamw.defaults["fused"] else "cpu"
        self.adamw.state[parameter] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=device),
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
        }

    def scaler_state(self) -> dict[str, Any]:
        """fp16's loss scaling; empty elsewhere."""
        return dict(self._scaler.state_dict()) if self._scaler else {}

    def restore_scaler(self, state: dict[str, Any]) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)
