"""Examples -> one flat batch, on the host and on a device; prefixes that rows share are computed once.

Rows of one optimizer step often begin alike (the system prompt, a shared first turn). Their common beginnings form a
tree: every node is a run of tokens that is computed once, and attends to the nodes above it and to itself.

    rows           s s s a b        nodes    0  s s s            seen by 1 and 2
                   s s s c d e               1  a b    above: 0
                                             2  c d e  above: 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from luthier.encoding.store import common_prefix
from luthier.types import Batch, Example, Ids, Mask

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
class Varlen:
    """What variable-length attention asks for: each segment's queries, and one after the other all keys that it sees.

    starts: [S + 1] int32, of queries and of keys. longest: the same. keys: [K] places in the stream; None: the stream.
    """

    starts: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    keys: Tensor | None


@dataclass(frozen=True)
class Segments:
    """Boundaries and parents of a flat stream (host integers), and the gathers to and from a padded row a segment."""

    offsets: tuple[int, ...]
    parents: tuple[int, ...]
    query_index: Tensor
    key_index: Tensor
    stream_index: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.offsets))

    def above(self, segment: int) -> tuple[int, ...]:
        """The segments that this one sees besides itself, from the top."""
        found: list[int] = []
        parent = self.parents[segment]
        while parent >= 0:
            found.append(parent)
            parent = self.parents[parent]
        return tuple(found[::-1])

    def before(self) -> tuple[int, ...]:
        """How many tokens of other segments each one sees."""
        sizes = self.lengths
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + sizes[parent] if parent >= 0 else 0)
        return tuple(found)

    @cached_property
    def varlen(self) -> Varlen:
        """Made once a batch, used by every layer."""
        device, own = self.query_index.device, self.lengths
        seen = [before + size for before, size in zip(self.before(), own, strict=True)]

        def starts(sizes: Sequence[int]) -> Tensor:
            return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)

        keys = None
        if any(parent >= 0 for parent in self.parents):
            rows = self.key_index.view(len(own), -1)
            keys = torch.cat([row[:size] for row, size in zip(rows, seen, strict=True)])
        return Varlen((starts(own), starts(seen)), (max(own), max(seen)), keys)


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """``Batch`` as tensors: input_ids and position_ids [1, T], target_index and target_ids [N]."""

    input_ids: Tensor
    position_ids: Tensor
    target_index: Tensor
    target_ids: Tensor
    segments: Segments


def to_device(batch: Batch, device: torch.device | str) -> DeviceBatch:
    def put(array: object) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return DeviceBatch(
        input_ids=put(batch.input_ids)[None],
        position_ids=put(batch.position_ids)[None],
        target_index=put(batch.target_index),
        target_ids=put(batch.target_ids),
        segments=Segments(
            batch.offsets, batch.parents, put(batch.query_index), put(batch.key_index), put(batch.stream_index)
        ),
    )
