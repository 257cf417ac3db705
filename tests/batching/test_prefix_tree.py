"""Which rows come together, against the plain definition of a common beginning."""

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
    """Rows that begin with some of the same three parts, so that trees become deep."""
    parts = draw(st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=3, max_size=3))
    cut = st.tuples(st.integers(0, 3), row)
    return [[t for part in parts[:n] for t in part] + tail for n, tail in draw(st.lists(cut, min_size=1, max_size=12))]


rows = _rows()


def _alike(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _examples(rows: list[list[int]]) -> list[Example]:
    where = RowRef("rows", 1)
    return [Example(np.array(r, dtype=np.int32), np.arange(len(r)) > 0, where) for r in rows]


@given(row, row)
def test_a_common_prefix_ends_at_the_first_difference(a: list[int], b: list[int]) -> None:
    assert common_prefix(np.array(a), np.array(b)) == _alike(a, b)


@given(rows)
def test_the_order_is_that_of_the_tokens(given_rows: list[list[int]]) -> None:
    order = in_order([np.array(r) for r in given_rows])
    assert [given_rows[i] for i in order] == sorted(given_rows)


@given(rows)
def test_the_tree_holds_every_row_and_shares_what_neighbours_share(given_rows: list[list[int]]) -> None:
    examples = _examples(given_rows)
    tree = prefix_tree(examples)
    for i, tokens in enumerate(given_rows):
        parts = [tree.nodes[n] for n in tree.chain(tree.last[i])]
        assert [t for p in parts for t in given_rows[p.row][p.start : p.end]] == tokens[:-1]
    assert all(n.parent < i for i, n in enumerate(tree.nodes))
    kinds = [n.inner for n in tree.nodes]
    assert kinds == sorted(kinds, reverse=True)
    computed = sum(n.end - n.start for n in tree.nodes)
    assert computed <= sum(len(r) - 1 for r in given_rows)
    ordered = sorted(r[:-1] for r in given_rows)
    shared = max((_alike(a, b) for a, b in pairwise(ordered)), default=0)
    assert (computed < sum(len(r) - 1 for r in given_rows)) == (shared >= SHORTEST_SHARED)


@given(rows, st.integers(1, 60))
def test_micro_batches_hold_every_row_once_within_the_budget(given_rows: list[list[int]], budget: int) -> None:
    for share in (True, False):
        examples = _examples(given_rows)
        batches = by_tokens(examples, budget, share)
        assert sorted(i for b in batches for i in b) == list(range(len(given_rows)))
        for batch in batches:
            nodes = prefix_tree([examples[i] for i in batch]).nodes if share else []
            computed = sum(n.end - n.start for n in nodes) if share else sum(len(given_rows[i]) - 1 for i in batch)
            apart = (SHORTEST_SHARED - 1) * (len(batch) - 1) if share else 0  # too short to be nodes of their own
            assert computed <= budget + apart or len(batch) == 1


def test_a_deeper_tree_shares_more() -> None:
    a, b = list(range(20)), list(range(100, 120))
    rows = _examples([[*a, *b, 1, 9], [*a, *b, 2, 9], [*a, 3, 3, 9], [*a, *b, 1, 9]])
    tree = prefix_tree(rows)
    assert [(n.start, n.end, n.inner) for n in tree.nodes][:2] == [(0, 20, True), (20, 40, True)]
    assert sum(n.end - n.start for n in tree.nodes) < 50
    batch = collate(rows, share=True)
    assert len(batch.target_index) == sum(e.supervised for e in rows)


def test_what_the_settings_ask_for() -> None:
    assert Packing.of(TrainConfig(micro_batch_tokens=0, shared_prefix=False)) == Packing(0, False)
    assert Packing.of(TrainConfig()).share
