"""Law "nothing lost": every row is trained once per epoch, and batches contain every supervised token of their rows.

The law can fail: it detects a plan that omits the last, smaller step of an epoch (``drop_last``), and a collate
function that loses each row's stop token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.batching.collate import collate
from luthier.batching.plan import Plan
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.types import Batch, Example
from tests.helpers.rows import examples, fails


def visits(plan: Plan, epoch: int) -> Counter[int]:
    first = epoch * plan.steps_per_epoch
    return Counter(i for s in range(first, first + plan.steps_per_epoch) for rows in plan.step(s) for i in rows)


def once_per_epoch(plan: Plan, epoch: int = 0) -> None:
    assert visits(plan, epoch) == Counter(range(plan.rows))


def tokens_kept(rows: Sequence[Example], pack: Callable[[Sequence[Example]], Batch]) -> None:
    batch = pack(rows)
    assert batch.supervised == sum(e.supervised for e in rows)
    assert batch.tokens == sum(map(len, rows))
    expected = np.concatenate([e.ids[e.trained] for e in rows])
    assert batch.target_ids.tolist() == expected.tolist()


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 200), micro=st.integers(1, 9), accumulation=st.integers(1, 5), seed=st.integers(0, 2**32 - 1)
)
def test_every_row_is_trained_exactly_once_per_epoch(rows: int, micro: int, accumulation: int, seed: int) -> None:
    plan = Plan(rows, micro, accumulation, seed, epochs=2)
    for epoch in range(3):
        once_per_epoch(plan, epoch)
    assert all(len(m) <= micro for s in range(plan.steps) for m in plan.step(s))


def test_the_order_depends_on_epoch_and_seed(tokenizer: Tokenizer) -> None:
    a, b = Plan(50, 4, 1, 7, 2), Plan(50, 4, 1, 8, 2)
    assert [a.step(s) for s in range(5)] == [Plan(50, 4, 1, 7, 9).step(s) for s in range(5)]
    assert a.step(0) != a.step(a.steps_per_epoch)
    assert a.step(0) != b.step(0)


def test_batches_contain_every_supervised_token(tokenizer: Tokenizer) -> None:
    tokens_kept(examples(tokenizer), collate)


def test_every_target_follows_its_position(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer)
    batch = collate(rows)
    for segment, row in enumerate(rows):
        start, end = batch.offsets[segment], batch.offsets[segment + 1]
        assert batch.input_ids[start:end].tolist() == row.ids[:-1].tolist()
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        inside = (batch.target_index >= start) & (batch.target_index < end)
        followed = batch.target_index[inside] - start + 1
        assert row.ids[followed].tolist() == batch.target_ids[inside].tolist()
        assert row.trained[followed].all()
    gathered = batch.input_ids[batch.query_index][batch.stream_index]
    assert gathered.tolist() == batch.input_ids.tolist()


def test_the_law_detects_drop_last(tokenizer: Tokenizer) -> None:
    class DropLast(Plan):
        @property
        def steps_per_epoch(self) -> int:
            return self.rows // self.rows_per_step

    assert fails(lambda: once_per_epoch(DropLast(10, 4, 1, 0, 1)))


@pytest.mark.parametrize("lost", [1, 2])
def test_the_law_detects_a_lost_stop_token(lost: int, tokenizer: Tokenizer) -> None:
    def forgetful(rows: Sequence[Example]) -> Batch:
        return collate([Example(e.ids[:-lost], e.trained[:-lost], e.source) for e in rows])

    assert fails(lambda: tokens_kept(examples(tokenizer), forgetful))
