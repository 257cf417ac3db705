"""Examples -> flat batches, and the reproducible order in which rows are visited.

A step's rows follow from (seed, step) alone, so a run can start again anywhere without replaying anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from luthier.batching.collate import SHORTEST_SHARED, collate, in_order
from luthier.config import TrainConfig
from luthier.encoding.store import common_prefix
from luthier.types import Batch, Example, Ids

AUTO_TOKENS = 2048  # enough for the machine's GEMM rate, few enough for a small machine's memory


@dataclass(frozen=True, slots=True)
class Packing:
    """How a step's rows become micro-batches.

    tokens: computed together, rows regrouped to fill it; 0: so many rows as the plan says, in its order.
    share:  common beginnings are computed once.
    """

    tokens: int = 0
    share: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> Packing:
        tokens = AUTO_TOKENS if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
        return cls(tokens, config.shared_prefix)

    def cut(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The rows of a step, in micro-batches of at most ``tokens`` (which must not be 0) computed tokens."""
        return [[examples[i] for i in rows] for rows in by_tokens(examples, self.tokens, self.share)]


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

    @classmethod
    def of(cls, rows: int, config: TrainConfig) -> Plan:
        """The order of ``rows`` rows that ``config`` asks for."""
        return cls(
            rows=rows,
            micro_rows=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            epochs=config.num_train_epochs,
            max_steps=config.max_steps,
        )

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

    def batches(
        self, examples: Sequence[Example], first: int = 0, packing: Packing = Packing()
    ) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches) from step ``first`` on."""
        for index in range(first, self.steps):
            cut = [[examples[i] for i in rows] for rows in self.step(index)]
            if packing.tokens:
                cut = packing.cut([e for micro in cut for e in micro])
            yield index, [collate(rows, packing.share) for rows in cut]


_last: dict[tuple[int, int, int], Ids] = {}


def _order(rows: int, seed: int, epoch: int) -> Ids:
    """The epoch's permutation; the latest one is kept, since steps of an epoch come in turn."""
    key = (rows, seed, epoch)
    if key not in _last:
        _last.clear()
        _last[key] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
    return _last[key]


def by_tokens(examples: Sequence[Example], budget: int, share: bool) -> list[list[int]]:
    """Cut rows into micro-batches of at most ``budget`` computed tokens (one row alone may be longer), evenly filled.

    Rows that begin alike, or without sharing those of like length, come together. What neighbours share is counted
    whole, of which ``prefix_tree`` leaves less than SHORTEST_SHARED tokens a row apart: so much more may be computed.
    """
    rows = [e.ids[:-1] for e in examples]
    order = in_order(rows) if share else sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    costs = [len(rows[i]) for i in order]
    for at in range(1, len(order) if share else 0):
        common = common_prefix(rows[order[at - 1]], rows[order[at]])
        costs[at] -= common if common >= SHORTEST_SHARED else 0
    fill = sum(costs) / -(-sum(costs) // budget)
    batches: list[list[int]] = []
    spent, whole = 0.0, 0
    for i, cost in zip(order, costs, strict=True):
        size = cost if batches and batches[-1] else len(rows[i])
        if not batches or spent + size > budget or whole >= fill * len(batches):
            batches.append([])
            spent, size = 0.0, len(rows[i])
        batches[-1].append(i)
        spent += size
        whole += cost
    return batches
