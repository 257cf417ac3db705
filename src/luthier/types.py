"""Define the types that flow from a data row to a batch; they depend on numpy, not on torch or transformers.

    row -> Conversation -> list[Span] -> Example -> Batch

A ``Span`` marks text that the model *reads* or text that it *writes*; the loss mask is derived only from that mark.

Shapes in annotations, such as ``Float[Tensor, "tokens hidden"]``, are jaxtyping's. They are checked while the tests run
(``tests/helpers/shapes.py``), at no other time. Within one call, a name has one size, in all arguments and the result:

    tokens             tokens of a flat stream (T), of a row or of a prompt
    targets            positions whose next token is supervised (N)
    outputs            positions that a compiled layer outputs (U): all tokens, or in the last layer those it needs
    segments           segments of a flat stream (S); boundaries: one more
    rows, columns      rows of a batch, rows and columns of a matrix
    queries, keys      positions that attend, and positions that are attended to
    hidden             width of the residual stream (H)
    heads, kv_heads    heads of the queries; heads of the keys and values
    head_dim, rotary   features per head, and how many of them rotate with the position
    vocab              tokens of the vocabulary (V)
    in, out            input and output width of a linear layer
    rank               rank of an adapter (r)
    wide               input width and ranks of a group of compiled linear layers, padded
    q_width, kv_width  width of the queries of all heads; of the keys and values of all heads; qkv: their sum
    gate_up            width of an MLP's gate and up projections together
    blocks             blocks of a quantised weight that have a scale of their own
    bytes              bytes of a file
    pages              pages of the keys and values of a sequence
    elements           elements of a tensor, counted over all dimensions
    *batch, *shape     any number of leading dimensions; all dimensions
    _name              any size: such a name may have several sizes within one call
    ...                any shape
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

Log = Callable[[str], None]  # called with a line of text for the user
Role = Literal["system", "user", "assistant", "tool"]
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")  # of data files
TrainOn = Literal["all_replies", "last_reply", "each_reply"]
Thinking = Literal["keep", "drop", "empty"]
SystemRole = Literal["template", "merge"]
TooLong = Literal["truncate", "drop", "error"]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RowRef:
    """The position of a row in a data file. ``row`` counts from 1: a line of JSONL, an element of a JSON array."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that a reply asks for. arguments: JSON values by parameter name."""

    name: str
    arguments: Mapping[str, object]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    trained:      of a reply: whether it is a target of the loss, and not only context.
    thought:      of a reply: the reasoning before it, as a field of its own; a thought may also be part of ``content``.
    tool_calls:   of a reply.
    name:         of a tool's result: the tool that it comes from. call_id: the ``id`` of the call that it answers.
    """

    role: Role
    content: str
    trained: bool = True
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""


def json_leaves(value: object) -> Iterator[object]:
    """Yield the texts, numbers and other single values within JSON values, and the keys of objects."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from json_leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from json_leaves(inner)
    else:
        yield value


def as_dict(message: Message) -> dict[str, object]:
    """Return a message in OpenAI's form, as chat templates and data files know it; ``arguments`` is an object."""
    row: dict[str, object] = {"role": message.role, "content": message.content}
    if message.thought:
        row["reasoning_content"] = message.thought
    if message.tool_calls:
        row["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    if message.name:
        row["name"] = message.name
    if message.call_id:
        row["tool_call_id"] = message.call_id
    return row


Tools = tuple[Mapping[str, object], ...]  # descriptions of tools, each {"type": "function", "function": {...}}


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then turns of user, assistant and tools; the last one is a trained reply.

    tools: the tools that the model may call.
    """

    messages: tuple[Message, ...]
    source: RowRef
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of rendered text. ``written``: the model writes it (and may be trained on it), rather than reads it."""

    text: str
    written: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row, or one reply of it with the turns before.

    ids:     [n] token ids; the last one is a supervised stop token.
    trained: [n] the loss mask: true for tokens that are targets of the loss. ``trained[0]`` is always false.
    shared:  number of first tokens that the example shares with the one before it, if both come from the same row;
             -1 for the first example of a row.
    """

    ids: Int[Ids, " tokens"]
    trained: Bool[Mask, " tokens"]
    source: RowRef
    shared: int = -1

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def supervised(self) -> int:
        """The number of tokens of this row that are targets."""
        return int(np.count_nonzero(self.trained))


@dataclass(frozen=True, slots=True)
class Batch:
    """Several examples as one flat stream of tokens without padding; all indices are computed on the host.

        input_ids     a0 a1 a2 | b0 b1 | c0 c1 c2      T tokens, S segments
        position_ids   0  1  2 |  0  1 |  0  1  2
        offsets        0         3       5          8  S + 1 boundaries
        parents       -1        -1      -1             a segment attends to itself, its parent, its parent's parent, ...
        target_index  positions whose next token is supervised [N]; positions in a shared prefix may repeat
        target_ids    that next token [N]
        sources       the row that each example came from
        tokens        number of tokens of the examples, before prefixes are shared

    The other indices are for attention over padded rows: query_index [S * longest segment] and key_index [S * longest
    segment together with its ancestors] gather the stream into one row per segment (padding repeats token 0 of the
    stream), and stream_index [T] maps the queries' rows back to the stream.
    """

    input_ids: Int[Ids, " tokens"]
    position_ids: Int[Ids, " tokens"]
    offsets: tuple[int, ...]
    parents: tuple[int, ...]
    target_index: Int[Ids, " targets"]
    target_ids: Int[Ids, " targets"]
    query_index: Int[Ids, " queries"]
    key_index: Int[Ids, " keys"]
    stream_index: Int[Ids, " tokens"]
    sources: tuple[RowRef, ...]
    tokens: int

    @property
    def supervised(self) -> int:
        return int(self.target_ids.shape[0])


def as_row(conversation: Conversation) -> dict[str, object]:
    """Return a conversation as a row of a data file, from which it can be read again."""
    messages = [
        {**as_dict(m), **({} if m.trained or m.role != "assistant" else {"weight": 0})} for m in conversation.messages
    ]
    return {"messages": messages, **({"tools": list(conversation.tools)} if conversation.tools else {})}


class Template(Protocol):
    """A chat template: renders conversations as text. Training, chat and serving use the same one."""

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts of the tokens that end a reply; a trained reply ends with one of them."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must be a single token each, including the stop tokens."""
        ...

    @property
    def reply_prefix(self) -> str:
        """Text that the model writes before its answer. It is hidden from the user and present in the history."""
        ...

    def spans(self, messages: Sequence[Message], tools: Tools = ()) -> list[Span]:
        """Render a conversation that ends with a trained reply.

        Each trained reply is a written span, with its stop token. Raises HistoryError if the template writes a trained
        reply, or the turns before it, in another form than chat does; TemplateError or RefusedConversation.
        """
        ...

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Render what the model reads before its next reply; the last of ``messages`` is not a reply."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Return what identifies this template; it is recorded with every adapter."""
        ...


class Encoding(Protocol):
    """The token ids of one text, and the [start, end) characters of each token."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def offsets(self) -> list[tuple[int, int]]: ...


class ChatTokenizer(Protocol):
    """The part of a tokenizer that encoding needs."""

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding]:
        """Return ids and character offsets of each text. Adds no special tokens, since the template writes them."""
        ...

    def encode_ids(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of ``encode_batch`` as the bytes of int32 arrays (4 bytes per token)."""
        ...

    def splits_text_at(self, token: str) -> bool:
        """Whether the text of ``token`` always becomes that token, and the text before it is encoded by itself."""
        ...

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that become control tokens wherever they occur."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens included."""
        ...

    def token_id(self, text: str) -> int | None:
        """Return the id of ``text`` if it is exactly one token, else None."""
        ...

    def text_of(self, token: int) -> str | None:
        """Return the text of a token id, or None if the id is unused."""
        ...

    def digest(self) -> str:
        """Return the hex SHA-256 of everything that determines which ids a text becomes."""
        ...
