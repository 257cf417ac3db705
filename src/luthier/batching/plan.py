"""Plan which rows each optimizer step sees, and group them into micro-batches.

The rows of a step depend only on (seed, step), so a run can resume at any step without replaying earlier ones. A row
that was encoded as several examples (one per reply) counts as one, so that all of them belong to the same micro-batch
of the plan and their shared prefix is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from luthier.batching.collate import SHORTEST_SHARED, collate, in_order
from luthier.config import TrainConfig
from luthier.encoding.store import common_prefix, row_starts
from luthier.types import Batch, Example, Ids

AUTO_TOKENS = 2048  # enough for full GEMM throughput, few enough for the memory of a small machine


@dataclass(frozen=True, slots=True)
class Packing:
    """How the rows of a step are grouped into micro-batches.

    tokens: regroup the rows into micro-batches of at most this many computed tokens; 0: the micro-batches of the plan.
    share:  compute shared prefixes once.
    rotary_limit: rows of up to this many tokens never share a micro-batch with longer ones (see ``apart``).
    """

    tokens: int = 0
    share: bool = False
    rotary_limit: int | None = None

    @classmethod
    def of(cls, config: TrainConfig, rotary_limit: int | None = None) -> Packing:
        """Return the packing that the settings ask for."""
        tokens = AUTO_TOKENS if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
        return cls(tokens, config.shared_prefix, rotary_limit)

    def group(self, micro_batches: Sequence[Sequence[Example]]) -> list[list[Example]]:
        """Group the rows of a step into micro-batches, starting from those of the plan."""
        if self.tokens:
            micro_batches = [[e for micro_batch in micro_batches for e in micro_batch]]
        groups = [rows for micro_batch in micro_batches for rows in apart(micro_batch, self.rotary_limit)]
        if not self.tokens:
            return groups
        return [[rows[i] for i in cut] for rows in groups for cut in by_tokens(rows, self.tokens, self.share)]


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows that each optimizer step sees.

    The effective batch is ``micro_rows * accumulation`` rows. The last step of an epoch gets the remaining rows, so
    every row is used exactly once per epoch.
    """

    rows: int
    micro_rows: int
    accumulation: int
    seed: int
    epochs: float
    max_steps: int | None = None

    @classmethod
    def of(cls, rows: int, config: TrainConfig) -> Plan:
        """Return the plan for ``rows`` rows (see ``row_starts``) that the settings ask for."""
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
        """Return the micro-batches of step ``index`` (from 0), as row indices."""
        epoch, step_in_epoch = divmod(index, self.steps_per_epoch)
        order = _order(self.rows, self.seed, epoch)
        start = step_in_epoch * self.rows_per_step
        rows = order[start : start + self.rows_per_step].tolist()
        return [rows[i : i + self.micro_rows] for i in range(0, len(rows), self.micro_rows)]

    def batches(
        self, examples: Sequence[Example], first: int = 0, packing: Packing = Packing()
    ) -> Iterator[tuple[int, list[Batch]]]:
        """Yield every step from ``first`` on, with its micro-batches."""
        starts = row_starts(examples)
        for index in range(first, self.steps):
            micro_batches = packing.group(
                [[e for i in rows for e in examples[starts[i] : starts[i + 1]]] for rows in self.step(index)]
            )
            yield index, [collate(rows, packing.share) for rows in micro_batches]


_latest: dict[tuple[int, int, int], Ids] = {}


def _order(rows: int, seed: int, epoch: int) -> Ids:
    """Return the epoch's permutation of the rows; the latest one is cached, since steps of an epoch are consecutive."""
    key = (rows, seed, epoch)
    if key not in _latest:
        _latest.clear()
        _latest[key] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
    return _latest[key]


def apart(examples: Sequence[Example], rotary_limit: int | None) -> list[list[Example]]:
    """Separate rows of up to ``rotary_limit`` tokens from longer ones; the last token, never read, does not count.

    rotary_limit: ``models.directory.rotary_limit``; None leaves the rows together.
    """
    if rotary_limit is None:
        return [list(examples)]
    sides = [[e for e in examples if (len(e) - 1 > rotary_limit) is beyond] for beyond in (False, True)]
    return [rows for rows in sides if rows]


def by_tokens(examples: Sequence[Example], budget: int, share: bool) -> list[list[int]]:
    """Group rows into evenly filled micro-batches of at most ``budget`` computed tokens; return row indices.

    A row longer than the budget gets a micro-batch of its own. With ``share``, rows with long shared prefixes are
    grouped, otherwise rows of similar length. Examples of one row stay together if they fit. The shared prefix of two
    neighbours is counted once, but ``prefix_tree`` may compute up to SHORTEST_SHARED - 1 of its tokens again per row: a
    micro-batch may exceed the budget by that much.
    """
    rows = [e.ids[:-1] for e in examples]
    order = in_order(rows) if share else sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    costs = [len(rows[i]) for i in order]
    for at in range(1, len(order) if share else 0):
        common = common_prefix(rows[order[at - 1]], rows[order[at]])
        costs[at] -= common if common >= SHORTEST_SHARED else 0
    fill = sum(costs) / -(-sum(costs) // budget)  # tokens per micro-batch, if all are equally full
    batches: list[list[int]] = []
    in_batch, in_total = 0, 0
    for part in _parts(examples, order, costs, budget if share else 0):
        size = sum(costs[at] for at in part)
        if not batches or in_batch + size > budget or in_total >= fill * len(batches):
            batches.append([])
            in_batch = len(rows[order[part[0]]]) - costs[part[0]]  # no neighbour shares its prefix there
        batches[-1] += [order[at] for at in part]
        in_batch += size
        in_total += size
    return batches


def _parts(examples: Sequence[Example], order: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Return the positions in ``order`` that belong together: the examples of a row, unless they exceed the budget.

    costs: computed tokens of each position, without the prefix that it shares with the one before.
    """
    row_of = np.cumsum([e.shared < 0 for e in examples])
    parts: list[list[int]] = []
    for at, i in enumerate(order):
        if at and row_of[i] == row_of[order[at - 1]]:
            whole = len(examples[order[parts[-1][0]]]) + sum(costs[k] for k in parts[-1][1:]) + costs[at]
            if whole <= budget:
                parts[-1].append(at)
                continue
        parts.append([at])
    return parts
