"""Which rows are computed together, and which of their tokens only once.

Rows of one optimizer step often begin alike (the system prompt, a shared first turn). Their common beginnings form a
tree: every node is a run of tokens that is computed once, and attends to the nodes above it and to itself.

    rows           s s s a b        nodes    0  s s s            seen by 1 and 2
                   s s s c d e               1  a b    above: 0
                                             2  c d e  above: 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from luthier.types import Example, Ids

SHORTEST_SHARED = 8  # fewer tokens in common are not worth a node of their own


@dataclass(slots=True)
class Node:
    """tokens of row ``row`` from ``start`` to ``end``; ``parent`` indexes the list of nodes, -1 at the top."""

    row: int
    start: int
    end: int
    parent: int
    inner: bool


@dataclass(slots=True)
class Tree:
    """nodes: parents first, inner ones before leaves. last: of each row the node that it ends in, -1 for no tokens."""

    nodes: list[Node] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def chain(self, node: int) -> list[int]:
        """The node and those above it, from the top."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.nodes[node].parent
        return found[::-1]


def flat(examples: Sequence[Example]) -> Tree:
    """Nothing shared: one node a row. The last token of a row is a target only and is never computed."""
    nodes = [Node(i, 0, len(e) - 1, -1, inner=False) for i, e in enumerate(examples)]
    return Tree(nodes, list(range(len(nodes))))


def prefix_tree(examples: Sequence[Example]) -> Tree:
    """Common beginnings of at least SHORTEST_SHARED tokens become nodes of their own."""
    rows = [e.ids[:-1] for e in examples]
    order = in_order(rows)
    common = [0, *(common_prefix(rows[a], rows[b]) for a, b in pairwise(order)), 0]
    nodes: list[Node] = []
    last = [-1] * len(rows)

    def grow(low: int, high: int, depth: int, parent: int) -> None:
        """Nodes of the rows order[low:high], which are equal up to ``depth``."""
        row = order[low]
        if high - low == 1:
            if len(rows[row]) > depth:
                nodes.append(Node(row, depth, len(rows[row]), parent, inner=False))
                parent = len(nodes) - 1
            last[row] = parent
            return
        shared = min(common[low + 1 : high])
        if shared - depth >= SHORTEST_SHARED:
            nodes.append(Node(row, depth, shared, parent, inner=True))
            parent, depth = len(nodes) - 1, shared
        begin = low
        for i in range(low + 1, high + 1):
            if i == high or common[i] - depth < SHORTEST_SHARED:
                grow(begin, i, depth, parent)
                begin = i

    begin = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or common[i] < SHORTEST_SHARED:
            grow(begin, i, 0, -1)
            begin = i
    return _inner_first(Tree(nodes, last))


def _inner_first(tree: Tree) -> Tree:
    order = sorted(range(len(tree.nodes)), key=lambda i: not tree.nodes[i].inner)
    moved = {-1: -1, **{old: new for new, old in enumerate(order)}}
    nodes = [tree.nodes[i] for i in order]
    for node in nodes:
        node.parent = moved[node.parent]
    return Tree(nodes, [moved[i] for i in tree.last])


def in_order(rows: Sequence[Ids]) -> list[int]:
    """Indices of the rows in the order of their tokens, so that rows that begin alike are neighbours."""
    keys = [row.astype(">u4").tobytes() for row in rows]
    return sorted(range(len(rows)), key=lambda i: (keys[i], i))


def common_prefix(a: Ids, b: Ids) -> int:
    """How many first tokens two rows have in common."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


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
