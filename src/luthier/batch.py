"""Examples -> flat batches, and the reproducible order in which rows are visited.

A step's rows follow from (seed, step) alone, so a run can start again anywhere without replaying anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from luthier.config import TrainConfig
from luthier.packing import Tree, by_tokens, flat, prefix_tree
from luthier.types import Batch, Example, Ids, Mask

AUTO_TOKENS = 2048  # enough for the machine's GEMM rate, few enough for a small machine's memory


def collate(examples: Sequence[Example], share: bool = False) -> Batch:
    """Concatenate rows into one stream. The last token of a row predicts nothing and is a target only.

    row        p  p  r  r  stop          trained on r r stop
    stream     p  p  r  r                the only shift: position t predicts token t + 1
    targets       r  r  stop

    share: tokens that rows have in common at their beginning stand in the stream once (``packing.prefix_tree``).
    """
    assert examples
    tree = prefix_tree(examples) if share and len(examples) > 1 else flat(examples)
    nodes = tree.nodes
    lengths = np.asarray([n.end - n.start for n in nodes])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    above = [_places(tree, i, offsets) for i in range(len(nodes))]
    queries, inside = _rows([np.arange(a, b) for a, b in pairwise(offsets)])
    keys, _ = _rows(above)
    return Batch(
        input_ids=np.concatenate([examples[n.row].ids[n.start : n.end] for n in nodes]),
        position_ids=np.concatenate([np.arange(n.start, n.end, dtype=np.int64) for n in nodes]),
        offsets=tuple(int(b) for b in offsets),
        parents=tuple(n.parent for n in nodes),
        target_index=np.concatenate([above[i][e.trained[1:]] for e, i in zip(examples, tree.last, strict=True)]),
        target_ids=np.concatenate([e.ids[1:][e.trained[1:]] for e in examples]),
        query_index=queries.reshape(-1),
        key_index=keys.reshape(-1),
        stream_index=np.flatnonzero(inside.reshape(-1)).astype(np.int64),
        sources=tuple(e.source for e in examples),
        tokens=sum(len(e) for e in examples),
    )


def _places(tree: Tree, node: int, offsets: Ids) -> Ids:
    """Where the tokens of a node and of those above it stand in the stream."""
    chain = tree.chain(node)
    return np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in chain]).astype(np.int64)


def _rows(ragged: list[Ids]) -> tuple[Ids, Mask]:
    """[n, longest] with 0 past the end of each, and where it is not past."""
    longest = max(map(len, ragged))
    found = np.zeros((len(ragged), longest), dtype=np.int64)
    inside = np.zeros(found.shape, dtype=bool)
    for i, row in enumerate(ragged):
        found[i, : len(row)] = row
        inside[i, : len(row)] = True
    return found, inside


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
