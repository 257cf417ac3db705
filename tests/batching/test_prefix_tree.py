"""The prefix tree and the grouping of rows agree with a simple definition of a shared prefix."""

from __future__ import annotations

from itertools import pairwise, takewhile

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier.batching.collate import SHORTEST_SHARED, collate, in_order, prefix_tree
from luthier.batching.plan import Packing, by_tokens
from luthier.config import TrainConfig
from luthier.encoding.store import common_prefix
from luthier.types import Example, RowRef

row = st.lists(st.integers(0, 2), min_size=2, max_size=40)


@st.composite
def _rows(draw: st.DrawFn) -> list[list[int]]:
    """Draw rows that start with 0 to 3 of the same parts, so that trees become deep."""
    parts = draw(st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=3, max_size=3))
    part_count_and_tail = st.tuples(st.integers(0, 3), row)
    drawn = draw(st.lists(part_count_and_tail, min_size=1, max_size=12))
    return [[t for part in parts[:n] for t in part] + tail for n, tail in drawn]


rows_of_ids = _rows()


def _shared(a: list[int], b: list[int]) -> int:
    """Return the length of the shared prefix, by its definition."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _examples(rows: list[list[int]]) -> list[Example]:
    source = RowRef("rows", 1)
    return [Example(np.array(r, dtype=np.int32), np.arange(len(r)) > 0, source) for r in rows]


@given(row, row)
def test_a_common_prefix_ends_at_the_first_difference(a: list[int], b: list[int]) -> None:
    assert common_prefix(np.array(a), np.array(b)) == _shared(a, b)


@given(rows_of_ids)
def test_rows_are_sorted_by_their_tokens(rows: list[list[int]]) -> None:
    order = in_order([np.array(r) for r in rows])
    assert [rows[i] for i in order] == sorted(rows)


@given(rows_of_ids)
def test_the_tree_contains_every_row_and_shares_the_prefixes_of_neighbours(rows: list[list[int]]) -> None:
    examples = _examples(rows)
    tree = prefix_tree(examples)
    for i, tokens in enumerate(rows):
        parts = [tree.nodes[n] for n in tree.chain(tree.last[i])]
        assert [t for p in parts for t in rows[p.row][p.start : p.end]] == tokens[:-1]
    assert all(n.parent < i for i, n in enumerate(tree.nodes))
    kinds = [n.inner for n in tree.nodes]
    assert kinds == sorted(kinds, reverse=True)
    computed = sum(n.end - n.start for n in tree.nodes)
    assert computed <= sum(len(r) - 1 for r in rows)
    ordered = sorted(r[:-1] for r in rows)
    shared = max((_shared(a, b) for a, b in pairwise(ordered)), default=0)
    assert (computed < sum(len(r) - 1 for r in rows)) == (shared >= SHORTEST_SHARED)


@given(rows_of_ids, st.integers(1, 60))
def test_micro_batches_contain_every_row_once_within_the_budget(rows: list[list[int]], budget: int) -> None:
    for share in (True, False):
        examples = _examples(rows)
        batches = by_tokens(examples, budget, share)
        assert sorted(i for b in batches for i in b) == list(range(len(rows)))
        for batch in batches:
            nodes = prefix_tree([examples[i] for i in batch]).nodes if share else []
            computed = sum(n.end - n.start for n in nodes) if share else sum(len(rows[i]) - 1 for i in batch)
            repeated = (SHORTEST_SHARED - 1) * (len(batch) - 1) if share else 0  # prefixes too short for a node
            assert computed <= budget + repeated or len(batch) == 1


def test_a_deeper_tree_shares_more() -> None:
    a, b = list(range(20)), list(range(100, 120))
    rows = _examples([[*a, *b, 1, 9], [*a, *b, 2, 9], [*a, 3, 3, 9], [*a, *b, 1, 9]])
    tree = prefix_tree(rows)
    assert [(n.start, n.end, n.inner) for n in tree.nodes][:2] == [(0, 20, True), (20, 40, True)]
    assert sum(n.end - n.start for n in tree.nodes) < 50
    batch = collate(rows, share=True)
    assert len(batch.target_index) == sum(e.supervised for e in rows)


def test_packing_follows_the_settings() -> None:
    assert Packing.of(TrainConfig(micro_batch_tokens=0, shared_prefix=False)) == Packing(0, False)
    assert Packing.of(TrainConfig()).share
