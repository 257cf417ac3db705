"""The types that flow from a row to a batch. numpy only: nothing here knows torch or a tokenizer.

    row -> Conversation -> list[Span] -> Example -> Batch

A ``Span`` says which text the model *sees* and which it *writes*: the loss mask follows from that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Say = Callable[[str], None]  # told what a person should know
Role = Literal["system", "user", "assistant"]
TrainOn = Literal["all_replies", "last_reply"]
SystemRole = Literal["template", "merge"]
TooLong = Literal["truncate", "drop", "error"]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RowRef:
    """Where a row came from. ``row`` counts from 1: the line of a JSONL file, the element of a JSON array."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn, ending with an assistant's reply."""

    messages: tuple[Message, ...]
    source: RowRef


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of rendered text. ``written`` is true where the model writes it (and may be trained on it)."""

    text: str
    written: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row.

    ids:     [n] token ids, the last one a supervised stop token.
    trained: [n] true where the token is a target of the loss; ``trained[0]`` is always false.
    """

    ids: Ids
    trained: Mask
    source: RowRef

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def supervised(self) -> int:
        """How many tokens of this row are targets."""
        return int(np.count_nonzero(self.trained))


@dataclass(frozen=True, slots=True)
class Batch:
    """Several examples as one flat stream without padding; every index is made on the host.

        input_ids     a0 a1 a2 | b0 b1 | c0 c1 c2      T tokens, S segments
        position_ids   0  1  2 |  0  1 |  0  1  2
        offsets        0         3       5          8  S + 1 boundaries
        parents       -1        -1      -1             a segment sees itself, its parent, its parent's parent, ...
        target_index  rows of the stream whose next token is supervised [N]; a shared one may stand there repeatedly
        target_ids    that next token [N]

    Attention by padded rows alone uses: query_index [S * longest] and key_index [S * longest with all above], which
    gather the stream into a row a segment (padding repeats token 0 of the stream), and stream_index [T], the way back.
    """

    input_ids: Ids
    position_ids: Ids
    offsets: tuple[int, ...]
    parents: tuple[int, ...]
    target_index: Ids
    target_ids: Ids
    query_index: Ids
    key_index: Ids
    stream_index: Ids
    sources: tuple[RowRef, ...]
    tokens: int

    @property
    def supervised(self) -> int:
        return int(self.target_ids.shape[0])


class Template(Protocol):
    """How conversations become text: the one renderer for training, chat and serving."""

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Token texts that end a reply; a trained reply ends in one of them."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must be one token each, the stops among them."""
        ...

    @property
    def reply_prefix(self) -> str:
        """What the model writes before its answer's first character; people do not see it, history has it again."""
        ...

    def spans(self, messages: Sequence[Message], train_on: TrainOn = "all_replies") -> list[Span]:
        """The whole conversation, ending with a reply; written spans include their stop token.

        train_on: a template may prove less when only the last reply is trained; then only that one is written.
        """
        ...

    def prompt(self, messages: Sequence[Message]) -> str:
        """What the model sees before it writes the next reply; ``messages`` ends with the user."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What identifies this template (recorded with every adapter)."""
        ...


class Encoding(Protocol):
    """What ``ChatTokenizer.encode_batch`` returns for one text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class ChatTokenizer(Protocol):
    """The little of a tokenizer that encoding needs."""

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding]:
        """Ids and character offsets of each text. Adds no special tokens: the template writes them."""
        ...

    def encode_ids(self, texts: Sequence[str]) -> list[bytes]:
        """The ids that ``encode_batch`` gives, as int32, 4 bytes a token."""
        ...

    def is_cut(self, token: str) -> bool:
        """Whether ``token``'s text is always that token, and what is before it is encoded as if it ended there."""
        ...

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that become control tokens wherever they stand."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of ``text`` if it is exactly one token, else None."""
        ...

    def digest(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""
        ...
