"""Examples -> flat batches, and the reproducible order in which rows are visited.

A step's rows follow from (seed, step) alone, so a run can start again anywhere without replaying anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from luthier.types import Batch, Example, Ids


def collate(examples: Sequence[Example]) -> Batch:
    """Concatenate rows into one stream. The last token of a row predicts nothing and is a target only.

    row        p  p  r  r  stop          trained on r r stop
    stream     p  p  r  r                the only shift: position t predicts token t + 1
    targets       r  r  stop
    """
    assert examples
    lengths = [len(e) - 1 for e in examples]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    longest = max(lengths)
    padded = np.arange(longest)[None, :] + bounds[:-1, None]
    inside = np.arange(longest)[None, :] < np.asarray(lengths)[:, None]
    return Batch(
        input_ids=np.concatenate([e.ids[:-1] for e in examples]),
        position_ids=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
        offsets=tuple(int(b) for b in bounds),
        target_index=np.concatenate(
            [np.flatnonzero(e.trained[1:]) + b for e, b in zip(examples, bounds, strict=False)]
        ),
        target_ids=np.concatenate([e.ids[1:][e.trained[1:]] for e in examples]),
        pad_index=np.where(inside, padded, 0).reshape(-1).astype(np.int64),
        unpad_index=np.flatnonzero(inside.reshape(-1)).astype(np.int64),
        sources=tuple(e.source for e in examples),
        tokens=sum(len(e) for e in examples),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows each optimizer step sees.

    The effective batch is ``micro_rows * accumulation`` rows; the last step of an epoch takes what is left, so every
    row is visited exactly once an epoch.
    """

    rows: int
    micro_rows: int
    accumulation: int
    seed: int
    epochs: float
    max_steps: int | None = None

    @property
    def rows_per_step(self) -> int:
        return self.micro_rows * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.rows_per_step)

    @property
    def steps(self) -> int:
        return self.max_steps or math.ceil(self.steps_per_epoch * self.epochs - 1e-9)

    def step(self, index: int) -> list[list[int]]:
        """Micro-batches of row indices of step ``index`` (from 0)."""
        epoch, within = divmod(index, self.steps_per_epoch)
        order = _order(self.rows, self.seed, epoch)
        start = within * self.rows_per_step
        chosen = order[start : start + self.rows_per_step].tolist()
        return [chosen[i : i + self.micro_rows] for i in range(0, len(chosen), self.micro_rows)]

    def batches(self, examples: Sequence[Example], first: int = 0) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches) from step ``first`` on."""
        for index in range(first, self.steps):
            yield index, [collate([examples[i] for i in rows]) for rows in self.step(index)]


_last: dict[tuple[int, int, int], Ids] = {}


def _order(rows: int, seed: int, epoch: int) -> Ids:
    """The epoch's permutation; the latest one is kept, since steps of an epoch come in turn."""
    key = (rows, seed, epoch)
    if key not in _last:
        _last.clear()
        _last[key] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
    return _last[key]
