"""What a run records of itself: a line a step, and a summary."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. ``step`` counts from 1; tokens count each row whole; loss in nats a supervised token."""

    step: int
    steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 4), "tokens_per_s": round(self.tokens_per_s, 1)}


class MetricsFile:
    """``metrics.jsonl``: every ``every``-th step and the last one, flushed at once."""

    def __init__(self, path: Path, every: int) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._every = every

    def write(self, record: StepRecord) -> None:
        if record.step % self._every == 0 or record.step in (1, record.steps):
            self._file.write(json.dumps(record.as_dict()) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished loop. train_seconds runs from the first step's start to the last step's end."""

    losses: list[float]
    tokens: int
    supervised_tokens: int
    train_seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.train_seconds


def peak_rss_bytes() -> int:
    """The process's largest resident size so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
