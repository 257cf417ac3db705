"""Collate examples into one flat batch in which shared prefixes are computed once, and copy it to a device.

Rows of one optimizer step often start with the same tokens (the system prompt, a shared first turn). The prefixes form
a tree: every node is a run of tokens that is computed once, and attends to its ancestors and to itself.

    rows           s s s a b        nodes    0  s s s
                   s s s c d e               1  a b    parent: 0
                                             2  c d e  parent: 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from luthier.encoding.store import common_prefix
from luthier.types import Batch, Example, Ids, Mask

if TYPE_CHECKING:
    from jaxtyping import Int

SHORTEST_SHARED = 8  # a shorter shared prefix does not pay for a node of its own


@dataclass(slots=True)
class Node:
    """The tokens of row ``row`` from ``start`` to ``end``.

    parent: index in the list of nodes, -1 for a root. inner: whether the node is a prefix that rows share.
    """

    row: int
    start: int
    end: int
    parent: int
    inner: bool


@dataclass(slots=True)
class Tree:
    """A prefix tree of rows.

    nodes: parents before children, inner nodes before leaves. last: the node in which each row ends, -1 if it is empty.
    """

    nodes: list[Node] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def chain(self, node: int) -> list[int]:
        """Return the path from the root to the node."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]


def flat(examples: Sequence[Example]) -> Tree:
    """Return the tree without sharing: one node per row, without its last token, which is only a target."""
    nodes = [Node(i, 0, len(e) - 1, -1, inner=False) for i, e in enumerate(examples)]
    return Tree(nodes, list(range(len(nodes))))


def prefix_tree(examples: Sequence[Example]) -> Tree:
    """Return the tree in which shared prefixes of at least SHORTEST_SHARED tokens are nodes of their own."""
    rows = [e.ids[:-1] for e in examples]
    order = in_order(rows)
    common = [0, *(common_prefix(rows[a], rows[b]) for a, b in pairwise(order)), 0]  # of each row with the one before
    nodes: list[Node] = []
    last = [-1] * len(rows)

    def grow(low: int, high: int, depth: int, parent: int) -> None:
        """Add the nodes of the rows order[low:high], whose first ``depth`` tokens are equal and already in the tree."""
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
        start = low
        for i in range(low + 1, high + 1):
            if i == high or common[i] - depth < SHORTEST_SHARED:
                grow(start, i, depth, parent)
                start = i

    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or common[i] < SHORTEST_SHARED:
            grow(start, i, 0, -1)
            start = i
    return _inner_first(Tree(nodes, last))


def _inner_first(tree: Tree) -> Tree:
    order = sorted(range(len(tree.nodes)), key=lambda i: not tree.nodes[i].inner)
    new_index = {-1: -1, **{old: new for new, old in enumerate(order)}}
    nodes = [tree.nodes[i] for i in order]
    for node in nodes:
        node.parent = new_index[node.parent]
    return Tree(nodes, [new_index[i] for i in tree.last])


def in_order(rows: Sequence[Ids]) -> list[int]:
    """Return the indices of the rows in lexicographic order, so that rows with shared prefixes are neighbours."""
    keys = [row.astype(">u4").tobytes() for row in rows]
    return sorted(range(len(rows)), key=lambda i: (keys[i], i))


def collate(examples: Sequence[Example], share: bool = False) -> Batch:
    """Concatenate rows into one flat batch. The last token of a row predicts nothing and is only a target.

    row        p  p  r  r  stop          trained on r r stop
    stream     p  p  r  r                position t predicts token t + 1; nothing else shifts the targets
    targets       r  r  stop

    share: a prefix that rows share occurs once in the stream (see ``prefix_tree``).
    """
    assert examples
    tree = prefix_tree(examples) if share and len(examples) > 1 else flat(examples)
    nodes = tree.nodes
    lengths = np.asarray([n.end - n.start for n in nodes])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    visible = [_positions(tree, i, offsets) for i in range(len(nodes))]
    queries, inside = _padded([np.arange(a, b) for a, b in pairwise(offsets)])
    keys, _ = _padded(visible)
    return Batch(
        input_ids=np.concatenate([examples[n.row].ids[n.start : n.end] for n in nodes]),
        position_ids=np.concatenate([np.arange(n.start, n.end, dtype=np.int64) for n in nodes]),
        offsets=tuple(int(b) for b in offsets),
        parents=tuple(n.parent for n in nodes),
        target_index=np.concatenate([visible[i][e.trained[1:]] for e, i in zip(examples, tree.last, strict=True)]),
        target_ids=np.concatenate([e.ids[1:][e.trained[1:]] for e in examples]),
        query_index=queries.reshape(-1),
        key_index=keys.reshape(-1),
        stream_index=np.flatnonzero(inside.reshape(-1)).astype(np.int64),
        sources=tuple(e.source for e in examples),
        tokens=sum(len(e) for e in examples),
    )


def _positions(tree: Tree, node: int, offsets: Ids) -> Ids:
    """Return the positions in the stream of the tokens of a node's ancestors and of the node itself."""
    chain = tree.chain(node)
    return np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in chain]).astype(np.int64)


def _padded(rows: list[Ids]) -> tuple[Ids, Mask]:
    """Return rows padded with 0 to the longest one, and a mask that is true outside the padding: [n, longest] both."""
    longest = max(map(len, rows))
    padded = np.zeros((len(rows), longest), dtype=np.int64)
    inside = np.zeros(padded.shape, dtype=bool)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
        inside[i, : len(row)] = True
    return padded, inside


@dataclass(frozen=True, slots=True)
class Varlen:
    """The index arrays of variable-length attention, where each segment has queries and all keys that they attend to.

    starts:  cumulative lengths of the segments' queries and of their keys, [S + 1] int32 each.
    longest: the largest number of queries and of keys of a segment.
    keys:    [K] positions of the keys in the stream; None if the keys are the stream itself.
    """

    starts: tuple[Int[Tensor, " boundaries"], Int[Tensor, " boundaries"]]
    longest: tuple[int, int]
    keys: Int[Tensor, " keys"] | None


@dataclass(frozen=True)
class Segments:
    """The segments of a flat stream: boundaries and parents on the host, index arrays on the device.

    The fields are those of ``Batch``.
    """

    offsets: tuple[int, ...]
    parents: tuple[int, ...]
    query_index: Int[Tensor, " queries"]
    key_index: Int[Tensor, " keys"]
    stream_index: Int[Tensor, " tokens"]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.offsets))

    def ancestors(self, segment: int) -> tuple[int, ...]:
        """Return the ancestors of a segment, from the root: the other segments that it attends to."""
        path: list[int] = []
        parent = self.parents[segment]
        while parent >= 0:
            path.append(parent)
            parent = self.parents[parent]
        return tuple(path[::-1])

    def prefix_lengths(self) -> tuple[int, ...]:
        """Return for each segment the number of tokens in its ancestors, which precede it in its row."""
        sizes = self.lengths
        counts: list[int] = []
        for parent in self.parents:
            counts.append(counts[parent] + sizes[parent] if parent >= 0 else 0)
        return tuple(counts)

    @cached_property
    def varlen(self) -> Varlen:
        """The index arrays of variable-length attention, computed once per batch and used by every layer."""
        device, query_lengths = self.query_index.device, self.lengths
        key_lengths = [prefix + own for prefix, own in zip(self.prefix_lengths(), query_lengths, strict=True)]

        def starts(sizes: Sequence[int]) -> Tensor:
            return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)

        keys = None
        if any(parent >= 0 for parent in self.parents):
            rows = self.key_index.view(len(query_lengths), -1)
            keys = torch.cat([row[:size] for row, size in zip(rows, key_lengths, strict=True)])
        return Varlen((starts(query_lengths), starts(key_lengths)), (max(query_lengths), max(key_lengths)), keys)


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A ``Batch`` as tensors on a device: input_ids and position_ids [1, T], target_index and target_ids [N]."""

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    target_index: Int[Tensor, " targets"]
    target_ids: Int[Tensor, " targets"]
    segments: Segments


def to_device(batch: Batch, device: torch.device | str) -> DeviceBatch:
    """Copy a batch to a device."""

    def put(array: Ids) -> Tensor:
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
