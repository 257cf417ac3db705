"""Record a run: one line per step in ``metrics.jsonl``, and the progress of the whole run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from luthier._util import files


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record of one optimizer step.

    step: counted from 1. loss: nats per supervised token. grad_norm: before clipping; None if fp16 overflowed and the
    step was skipped. tokens: all tokens of the step's rows, each row counted in full.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    supervised_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "seconds": round(self.seconds, 4), "tokens_per_s": round(self.tokens_per_s, 1)}


class MetricsFile:
    """Writer of ``metrics.jsonl``: the first, every ``every``-th and the last step, flushed immediately.

    resumed: steps already done; lines of later steps, written by a session that was killed, are removed.
    """

    def __init__(self, path: Path, every: int, resumed: int = 0) -> None:
        lines = [line for line in _lines(path) if _step(line, resumed + 1) <= resumed] if resumed else []
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._path, self._file = path, open(path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._every = every

    def write(self, record: StepRecord) -> None:
        if record.step % self._every == 0 or record.step in (1, record.steps):
            line = json.dumps(record.as_dict()).encode() + b"\n"
            try:
                while line:  # the system may write only a part
                    line = line[self._file.write(line) :]
            except OSError as e:
                raise files.user_error_of(self._path, e) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _step(line: Mapping[str, object], absent: int) -> int:
    step = line.get("step")
    return step if isinstance(step, int) else absent


def _lines(path: Path) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(dict(json.loads(line)))
            except ValueError:
                continue  # a partial line, left by a killed session
    return lines


@dataclass(slots=True)
class Progress:
    """How far a run has come. seconds: from the first step's start to the last step's end, summed over sessions."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
