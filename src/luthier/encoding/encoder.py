"""Encode rendered conversations as token ids and a loss mask. No other module decides what is trained.

A row is tokenised once, as one text. Every reply of every row is then checked: the prompt that chat would send must be
a prefix of the row's ids, and the reply must end with a token that generation stops on. Tokens after the last
supervised one cannot change the loss and are left out.

A conversation becomes one example per reply, each with the turns before it as chat sends them, if one example cannot
hold them all: the template writes earlier turns in another form (it removes their thoughts), or the tokenizer joins the
end of a prompt with the start of a reply.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from luthier.data.loader import DataReport, Outcome
from luthier.encoding.control import ControlTokens
from luthier.encoding.store import common_prefix
from luthier.errors import HistoryError, TemplateError
from luthier.templates import RefusedConversation, SystemAsUser
from luthier.templates.completeness import without_thought
from luthier.types import ChatTokenizer, Conversation, Example, Ids, Span, Template, Thinking, TooLong, TrainOn

_CHUNK = 512  # rows that are tokenised together
_ReplyTokens = tuple[int | None, int]  # a reply's first token (None if its prompt is not a prefix), and its stop token
_Encoded = tuple[NDArray[np.int32], list[_ReplyTokens]]
_MERGE = " (--set data.system_role=merge puts the system message into the first user message)"
_PER_REPLY = "trained with one example per reply, since {}"
_REWRITES = "the chat template writes earlier turns in another form"
_JOINS = "the tokenizer joins the end of a prompt with the start of a reply"

OUTSIDE_FIX = "leave the token out, or use the checkpoint that the tokenizer belongs to"


def outside_table(ids: Sequence[int] | Ids, tokenizer: ChatTokenizer, rows: int | None) -> str | None:
    """Describe the first token that the model's embedding table has no row for; None if it has one for every token.

    Checkpoints may define more tokens than their table has rows, which is harmless until a text contains one.
    rows: of the table; None: not known.
    """
    if rows is None or int(np.max(ids, initial=0)) < rows:
        return None
    token = next(int(i) for i in ids if i >= rows)
    return f"{tokenizer.text_of(token)}, token {token} of the tokenizer; the model's embedding table has {rows} rows"


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation, or the part of it up to one reply, as text; ``prompts``: the text before each written span."""

    conversation: Conversation
    spans: list[Span]
    prompts: list[str]


_Row = tuple[Conversation, list[_Rendered]]  # a conversation, and the texts of its examples


@dataclass(frozen=True, slots=True)
class _Unfit:
    """Why a conversation does not fit into ``max_length``."""

    reason: str
    outcome: Outcome
    fix: str


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes conversations. Its fields are everything that the result depends on besides the conversation.

    max_length: in tokens. too_long: what to do with a longer row. table: rows of the model's embedding table, if known.
    """

    template: Template
    tokenizer: ChatTokenizer
    stop_ids: tuple[int, ...]
    max_length: int
    too_long: TooLong = "truncate"
    train_on: TrainOn = "all_replies"
    thinking: Thinking = "keep"
    control: ControlTokens | None = None
    table: int | None = None

    def stream(
        self, conversations: Iterable[Conversation], report: DataReport
    ) -> Iterator[tuple[Conversation, list[Example]]]:
        """Encode rows in constant memory; yield every conversation with its examples.

        Rows that cannot be encoded are recorded in ``report`` with the reason.
        """
        source = iter(conversations)
        while chunk := list(itertools.islice(source, _CHUNK)):
            yield from self._examples_of(self._rendered(chunk, report), report)

    def _rendered(self, conversations: Sequence[Conversation], report: DataReport) -> list[_Row]:
        """Render conversations, each as a whole or reply by reply; those that cannot be rendered are dropped."""
        rows: list[_Row] = []
        empty = self.thinking == "empty" and "</think>" not in self.template.reply_prefix
        for conversation in conversations:
            c = self.control.apply(conversation, report) if self.control else conversation
            if c is None:
                continue
            if self.thinking != "keep":
                c = replace(c, messages=tuple(without_thought(m, empty) for m in c.messages))
            with self._dropping(c, report):
                rows.append((c, self._render(c, report)))
        return rows

    @contextmanager
    def _dropping(self, c: Conversation, report: DataReport) -> Iterator[None]:
        """Drop a conversation that cannot be rendered within the block, with the reason."""
        try:
            yield
        except RefusedConversation as e:
            reason = f"the model's chat template refuses this conversation: {e}{self._hint(c)}"
            report.drop_unrendered(c.source, reason, "")
        except TemplateError as e:
            report.drop_unrendered(c.source, e.message, e.fix)

    def _render(self, c: Conversation, report: DataReport) -> list[_Rendered]:
        if self.train_on == "last_reply":
            c = _parts(c)[-1]
        if self.train_on != "each_reply":
            try:
                return [self._render_one(c)]
            except HistoryError:
                parts = [self._render_one(part) for part in _parts(c)]
                if len(parts) > 1:
                    report.notes[_PER_REPLY.format(_REWRITES)] += 1
                return parts
        return [self._render_one(part) for part in _parts(c)]

    def _render_one(self, c: Conversation) -> _Rendered:
        """Render a conversation. Raises TemplateError also if chat would send another prompt before a trained reply."""
        spans = self.template.spans(c.messages, c.tools)
        prompts: list[str] = []
        replies = (i for i, m in enumerate(c.messages) if m.role == "assistant" and m.trained)
        before = ""
        for span in spans:
            if span.written:
                prompt = self.template.prompt(c.messages[: next(replies)], c.tools)
                if prompt != before:
                    raise TemplateError(
                        f"template {self.template.name} writes the training text differently from the prompt",
                        "choose another template: --set data.template=jinja",
                    )
                prompts.append(prompt)
            before += span.text
        return _Rendered(c, spans, prompts)

    def _examples_of(self, rows: Sequence[_Row], report: DataReport) -> Iterator[tuple[Conversation, list[Example]]]:
        encoded = iter(self._encoded([part for _, row in rows for part in row]))
        for conversation, row in rows:
            parts = [(part, *next(encoded)) for part in row]
            if any(start is None for _, _, replies in parts for start, _ in replies):
                parts = []
                with self._dropping(conversation, report):
                    parts = self._joined(row, report)
                if not parts:
                    continue
            examples = self._fitting(parts, report)
            if examples:
                yield conversation, examples

    def _hint(self, conversation: Conversation) -> str:
        """Name the setting with which the template accepts a conversation that it refuses, if there is one."""
        merged = SystemAsUser(self.template)
        if conversation.messages[0].role != "system" or isinstance(self.template, SystemAsUser):
            return ""
        try:
            merged.spans(conversation.messages, conversation.tools)
        except (RefusedConversation, TemplateError):
            return ""
        return _MERGE

    def _encoded(self, rows: Sequence[_Rendered]) -> Iterator[_Encoded]:
        stops = self.template.stop
        splits_at_stops = all(map(self.tokenizer.splits_text_at, stops)) and all(
            span.text.endswith(stops) for row in rows for span in row.spans if span.written
        )
        return self._by_prefixes(rows) if splits_at_stops else self._by_offsets(rows)

    def _by_offsets(self, rows: Sequence[_Rendered]) -> Iterator[_Encoded]:
        """Find the stop tokens by character offsets: the first token that reaches the end of the reply's span.

        This is the definition; ``_by_prefixes`` is faster and gives the same result.
        """
        texts: list[str] = []
        for row in rows:
            texts.append("".join([s.text for s in row.spans]))
            texts += row.prompts
        encodings = iter(self.tokenizer.encode_batch(texts))
        for row in rows:
            encoding = next(encodings)
            ends = [end for _, end in encoding.offsets]
            replies: list[_ReplyTokens] = []
            end = 0
            for span in row.spans:
                end += len(span.text)
                if span.written:
                    prompt = next(encodings).ids
                    start = len(prompt)
                    stop = next(j for j in range(start, len(ends)) if ends[j] >= end)
                    replies.append((start if encoding.ids[:start] == prompt else None, stop))
            yield np.asarray(encoding.ids, dtype=np.int32), replies

    def _by_prefixes(self, rows: Sequence[_Rendered]) -> Iterator[_Encoded]:
        """Find the stop tokens without offsets: the text before one is encoded by itself, and its length is counted.

        The tokenizer must split texts at stop tokens (``ChatTokenizer.splits_text_at``).
        """
        texts: list[str] = []
        for row in rows:
            text = "".join([s.text for s in row.spans])
            texts.append(text)
            prompts = iter(row.prompts)
            end = 0
            for span in row.spans:
                end += len(span.text)
                if span.written:
                    texts += (next(prompts), text[: end - len(self._stop_of(span.text))])
        encoded = iter(self.tokenizer.encode_ids(texts))
        for row in rows:
            ids = next(encoded)
            replies: list[_ReplyTokens] = []
            for span in row.spans:
                if span.written:
                    prompt, before_stop = next(encoded), next(encoded)
                    replies.append((len(prompt) // 4 if ids.startswith(prompt) else None, len(before_stop) // 4))
            yield np.frombuffer(ids, dtype=np.int32), replies

    def _stop_of(self, written: str) -> str:
        """Return the text of the stop token that ends a written span."""
        return next(stop for stop in self.template.stop if written.endswith(stop))

    def _joined(
        self, row: Sequence[_Rendered], report: DataReport
    ) -> list[tuple[_Rendered, NDArray[np.int32], list[_ReplyTokens]]]:
        """Encode each reply after the ids of its prompt, as generation produces it, where the two texts would join.

        Empty, and a problem in ``report``, if the tokenizer cannot write the reply by itself. Raises TemplateError.
        """
        if len(row) == 1:
            row = [self._render_one(part) for part in _parts(row[0].conversation)]
            if len(row) > 1:
                report.notes[_PER_REPLY.format(_JOINS)] += 1
        parts: list[tuple[_Rendered, NDArray[np.int32], list[_ReplyTokens]]] = []
        for part in row:
            written = next(s.text for s in part.spans if s.written)
            stop = self._stop_of(written)
            # after a stop token the reply is encoded by itself, but not as the start of a text
            prompt, apart = (e.ids for e in self.tokenizer.encode_batch([part.prompts[0], stop + written]))
            ids = [*prompt, *apart[1:]]
            if self.tokenizer.text(ids) != self.tokenizer.text(prompt) + written:
                report.add(
                    part.conversation.source,
                    "the tokenizer joins the start of a reply with the prompt before it, and cannot write it by itself "
                    f"(the reply starts with {written[:12]!r})",
                    "dropped",
                    "remove the white space at the start of the reply",
                )
                return []
            parts.append((part, np.asarray(ids, dtype=np.int32), [(len(prompt), len(ids) - 1)]))
        return parts

    def _fitting(
        self, parts: Sequence[tuple[_Rendered, NDArray[np.int32], list[_ReplyTokens]]], report: DataReport
    ) -> list[Example]:
        """Return the examples of one row, cut to ``max_length``; empty, and a problem in ``report``, if none fits."""
        source = parts[0][0].conversation.source
        examples: list[Example] = []
        for _, ids, reply_tokens in parts:
            replies = [(start or 0, stop + 1) for start, stop in reply_tokens]  # each ends with its stop token
            for _, end in replies:
                if ids[end - 1] not in self.stop_ids:
                    report.drop_unrendered(
                        source,
                        f"a trained reply ends with token {ids[end - 1]}, which generation does not stop on",
                        "choose another template: --set data.template=jinja",
                    )
                    return []
            fitted = self._fit(ids, replies)
            if isinstance(fitted, _Unfit):
                if examples and fitted.outcome == "dropped" and self.too_long == "truncate":
                    cut = f"all replies after number {len(examples)} were cut: {fitted.reason}"
                    report.add(source, cut, "changed")
                    break
                report.add(source, fitted.reason, fitted.outcome, fitted.fix)
                return []
            row, trained = fitted
            if outside := outside_table(row, self.tokenizer, self.table):
                report.add(source, f"contains {outside}", "refused", OUTSIDE_FIX)
                return []
            if len(row) < replies[-1][1]:
                report.add(source, f"truncated from {replies[-1][1]} to {len(row)} tokens", "changed")
            shared = common_prefix(examples[-1].ids[:-1], row[:-1]) if examples else -1
            examples.append(Example(row, trained, source, shared))
        return examples

    def _fit(self, ids: NDArray[np.int32], replies: list[tuple[int, int]]) -> tuple[Ids, NDArray[np.bool_]] | _Unfit:
        """Return the ids of a row, cut to ``max_length``, and its loss mask."""
        length = replies[-1][1]
        stop_at = length - 1
        if length > self.max_length and self.too_long != "truncate":
            return _Unfit(
                f"is {length} tokens long, more than max_length {self.max_length}",
                "refused" if self.too_long == "error" else "dropped",
                "increase it with --set data.max_length=..., or --set data.too_long=truncate",
            )
        if length > self.max_length:
            prompt = replies[0][0]
            replies, stop_at = _cut(replies, self.max_length)
            if not replies:
                return _Unfit(
                    f"the prompt is {prompt} tokens long; max_length {self.max_length} leaves no room for a reply",
                    "dropped",
                    f"--set data.max_length={length}",
                )
        row = ids[: replies[-1][1]].astype(np.int64)
        row[-1] = ids[stop_at]
        trained = np.zeros(len(row), dtype=np.bool_)
        for start, end in replies:
            trained[start:end] = True
        return row, trained


def _parts(c: Conversation) -> list[Conversation]:
    """Return one conversation per trained reply, which ends with it; the turns before it are context."""
    parts = []
    for i, m in enumerate(c.messages):
        if m.role == "assistant" and m.trained:
            context = (replace(before, trained=before.role != "assistant") for before in c.messages[:i])
            parts.append(replace(c, messages=(*context, m)))
    return parts


def _cut(replies: list[tuple[int, int]], max_length: int) -> tuple[list[tuple[int, int]], int]:
    """Return the replies that fit into ``max_length``, and the index of the stop token for the last one.

    The last reply is truncated so that a stop token still ends it.
    """
    complete = [r for r in replies if r[1] <= max_length]
    start, end = replies[len(complete)]
    if start + 2 <= max_length:  # space for one token of the reply and its stop token
        return [*complete, (start, max_length)], end - 1
    return complete, complete[-1][1] - 1 if complete else 0
