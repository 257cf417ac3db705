"""Learning rates as plain functions of the step."""

from __future__ import annotations

import math

from luthier.config import TrainConfig


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of ``step`` (from 0): linear warm-up, then cosine or linear to zero, or constant."""
    warmup = math.ceil(steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate
