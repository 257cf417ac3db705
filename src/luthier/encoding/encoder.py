"""Encode rendered conversations as token ids and a loss mask. No other module decides what is trained.

A row is tokenised once, as one text. Every reply of every row is then checked: the prompt that chat would send must be
a prefix of the row's ids, and the reply must end with a token that generation stops on. Tokens after the last
supervised one cannot change the loss and are left out.

Control tokens of the model are kept out of the texts: a row or chat message that contains ``<|im_end|>`` as text would
end its turn early, or start a turn under another role.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from luthier.data.loader import DataReport
from luthier.errors import DataError, TemplateError
from luthier.templates import RefusedConversation, SystemAsUser
from luthier.types import ChatTokenizer, Conversation, Example, Ids, Message, Span, Template, TooLong, TrainOn

Choice = Literal["refuse", "drop", "escape"]
_CHUNK = 512  # rows that are tokenised together
_ReplyTokens = tuple[int | None, int]  # a reply's first token (None if its prompt is not a prefix), and its stop token
_Encoded = tuple[NDArray[np.int32], list[_ReplyTokens]]
_MERGE = " (--set data.system_role=merge puts the system message into the first user message)"


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The control tokens of a model, and what to do with a row that contains one.

    choice: refuse the run, drop the row, or escape the token (a space after its first character makes it plain text).
    """

    pattern: re.Pattern[str]
    choice: Choice

    @classmethod
    def of(cls, tokens: Iterable[str], choice: Choice) -> ControlTokens | None:
        """Collect a tokenizer's control tokens, or return None if it has none."""
        texts = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
        return cls(re.compile("|".join(map(re.escape, texts))), choice) if texts else None

    def apply(self, conversation: Conversation, report: DataReport) -> Conversation | None:
        """Return the conversation, escaped if necessary, or None and a problem in ``report``."""
        matches = (self.pattern.search(m.content) for m in conversation.messages)
        match = next((m for m in matches if m), None)
        if match is None:
            return conversation
        token = match.group()
        if self.choice == "escape":
            report.add(conversation.source, f"control tokens such as {token} were escaped", "changed")
            return replace(conversation, messages=tuple(self._escaped(m) for m in conversation.messages))
        report.add(
            conversation.source,
            f"contains {token}, a control token of this model",
            "refused" if self.choice == "refuse" else "dropped",
            "--set data.control_tokens=drop skips such rows, =escape turns the token into plain text",
        )
        return None

    def check(self, text: str, what: str) -> None:
        """Raise DataError if a text that is sent to the model contains a control token."""
        match = self.pattern.search(text)
        if match:
            raise DataError(
                f"{what} contains {match.group()}, a control token of this model", "write it without the token"
            )

    def _escaped(self, message: Message) -> Message:
        text = message.content
        while self.pattern.search(text):  # escaping one token may reveal another
            text = self.pattern.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)
        return replace(message, content=text)


def check_text(text: str, what: str, tokenizer: ChatTokenizer, template: Template) -> None:
    """Raise DataError if a text is not valid Unicode, or contains one of the model's control tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{what} contains bytes that are not text", "type it in UTF-8") from None
    control = ControlTokens.of([*tokenizer.control_tokens, *template.markers], "refuse")
    if control:
        control.check(text, what)


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
    control: ControlTokens | None = None
    table: int | None = None

    def stream(
        self, conversations: Iterable[Conversation], report: DataReport
    ) -> Iterator[tuple[Conversation, Example]]:
        """Encode rows in constant memory; yield every conversation with its example.

        Rows that cannot be encoded are recorded in ``report`` with the reason. Raises TemplateError.
        """
        source = iter(conversations)
        while chunk := list(itertools.islice(source, _CHUNK)):
            yield from self._chunk(chunk, report)

    def _chunk(
        self, conversations: Sequence[Conversation], report: DataReport
    ) -> Iterator[tuple[Conversation, Example]]:
        rendered: list[tuple[Conversation, list[Span]]] = []
        for conversation in conversations:
            c = self.control.apply(conversation, report) if self.control else conversation
            if c is None:
                continue
            try:
                rendered.append((c, self.template.spans(c.messages, self.train_on)))
            except RefusedConversation as e:
                report.add(
                    c.source, f"the model's chat template refuses this conversation: {e}{self._hint(c)}", "dropped"
                )
            except TemplateError as e:
                raise TemplateError(f"{c.source}: {e.message}", e.fix) from None
        stops = self.template.stop
        splits_at_stops = all(map(self.tokenizer.splits_text_at, stops)) and all(
            span.text.endswith(stops) for _, spans in rendered for span in spans if span.written
        )
        encoded = self._by_prefixes(rendered) if splits_at_stops else self._by_offsets(rendered)
        for (c, spans), (ids, replies) in zip(rendered, encoded, strict=True):
            example = self._example(c, spans, ids, replies, report)
            if example is not None:
                yield c, example

    def _hint(self, conversation: Conversation) -> str:
        """Name the setting with which the template accepts a conversation that it refuses, if there is one."""
        merged = SystemAsUser(self.template)
        if conversation.messages[0].role != "system" or isinstance(self.template, SystemAsUser):
            return ""
        try:
            merged.spans(conversation.messages, self.train_on)
        except (RefusedConversation, TemplateError):
            return ""
        return _MERGE

    def _by_offsets(self, rendered: Sequence[tuple[Conversation, list[Span]]]) -> Iterator[_Encoded]:
        """Find the stop tokens by character offsets: the first token that reaches the end of the reply's span.

        This is the definition; ``_by_prefixes`` is faster and gives the same result.
        """
        texts: list[str] = []
        for c, spans in rendered:
            texts.append("".join([s.text for s in spans]))
            texts += self._prompts(c, spans)
        encodings = iter(self.tokenizer.encode_batch(texts))
        for _, spans in rendered:
            row = next(encodings)
            ends = [end for _, end in row.offsets]
            replies: list[_ReplyTokens] = []
            end = 0
            for span in spans:
                end += len(span.text)
                if span.written:
                    prompt = next(encodings).ids
                    start = len(prompt)
                    stop = next(j for j in range(start, len(ends)) if ends[j] >= end)
                    replies.append((start if row.ids[:start] == prompt else None, stop))
            yield np.asarray(row.ids, dtype=np.int32), replies

    def _by_prefixes(self, rendered: Sequence[tuple[Conversation, list[Span]]]) -> Iterator[_Encoded]:
        """Find the stop tokens without offsets: the text before one is encoded by itself, and its length is counted.

        The tokenizer must split texts at stop tokens (``ChatTokenizer.splits_text_at``).
        """
        texts: list[str] = []
        for c, spans in rendered:
            text = "".join([s.text for s in spans])
            texts.append(text)
            prompts = iter(self._prompts(c, spans))
            end = 0
            for span in spans:
                end += len(span.text)
                if span.written:
                    texts += (next(prompts), text[: end - len(self._stop_of(span.text))])
        encoded = iter(self.tokenizer.encode_ids(texts))
        for _, spans in rendered:
            row = next(encoded)
            replies: list[_ReplyTokens] = []
            for span in spans:
                if span.written:
                    prompt, before_stop = next(encoded), next(encoded)
                    replies.append((len(prompt) // 4 if row.startswith(prompt) else None, len(before_stop) // 4))
            yield np.frombuffer(row, dtype=np.int32), replies

    def _stop_of(self, written: str) -> str:
        """Return the text of the stop token that ends a written span."""
        return next(stop for stop in self.template.stop if written.endswith(stop))

    def _prompts(self, conversation: Conversation, spans: Sequence[Span]) -> list[str]:
        """Return the text before each written span. Raises TemplateError if chat would send another prompt there."""
        prompts: list[str] = []
        replies = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        turns = iter(replies[-sum(s.written for s in spans) :])
        before = ""
        for span in spans:
            if span.written:
                prompt = self.template.prompt(conversation.messages[: next(turns)])
                if prompt != before:
                    raise TemplateError(
                        f"{conversation.source}: template {self.template.name} writes the training text differently "
                        "from the prompt",
                        "choose another template: --set data.template=jinja",
                    )
                prompts.append(prompt)
            before += span.text
        return prompts

    def _example(
        self,
        conversation: Conversation,
        spans: Sequence[Span],
        ids: NDArray[np.int32],
        reply_tokens: Sequence[_ReplyTokens],
        report: DataReport,
    ) -> Example | None:
        source = conversation.source
        replies: list[tuple[int, int]] = []  # token ranges, each ending with its stop token
        for span, (start, stop) in zip((s for s in spans if s.written), reply_tokens, strict=True):
            if start is None:
                report.add(
                    source,
                    "the tokenizer joins the start of a reply with the prompt before it "
                    f"(the reply starts with {span.text[:12]!r}), so the prompt would not be a prefix of the row",
                    "dropped",
                    "remove the white space at the start of the reply",
                )
                return None
            if ids[stop] not in self.stop_ids:
                raise TemplateError(
                    f"{source}: a trained reply ends with token {ids[stop]}, which generation does not stop on",
                    "choose another template: --set data.template=jinja",
                )
            replies.append((start, stop + 1))
        example = self._fit(ids, replies, conversation, report)
        outside = outside_table(example.ids, self.tokenizer, self.table) if example else None
        if outside:
            report.add(source, f"contains {outside}", "refused", OUTSIDE_FIX)
            return None
        return example

    def _fit(
        self, ids: NDArray[np.int32], replies: list[tuple[int, int]], conversation: Conversation, report: DataReport
    ) -> Example | None:
        source = conversation.source
        length = replies[-1][1]
        stop_at = length - 1
        if length > self.max_length and self.too_long != "truncate":
            report.add(
                source,
                f"is {length} tokens long, more than max_length {self.max_length}",
                "refused" if self.too_long == "error" else "dropped",
                "increase it with --set data.max_length=..., or --set data.too_long=truncate",
            )
            return None
        if length > self.max_length:
            prompt = replies[0][0]
            replies, stop_at = _cut(replies, self.max_length)
            if not replies:
                report.add(
                    source,
                    f"the prompt is {prompt} tokens long; max_length {self.max_length} leaves no room for a reply",
                    "dropped",
                    f"--set data.max_length={length}",
                )
                return None
            report.add(source, f"truncated from {length} to {replies[-1][1]} tokens", "changed")
        row = ids[: replies[-1][1]].astype(np.int64)
        row[-1] = ids[stop_at]
        trained = np.zeros(len(row), dtype=np.bool_)
        for start, end in replies:
            trained[start:end] = True
        return Example(row, trained, source)


def _cut(replies: list[tuple[int, int]], max_length: int) -> tuple[list[tuple[int, int]], int]:
    """Return the replies that fit into ``max_length``, and the index of the stop token for the last one.

    The last reply is truncated so that a stop token still ends it.
    """
    complete = [r for r in replies if r[1] <= max_length]
    start, end = replies[len(complete)]
    if start + 2 <= max_length:  # space for one token of the reply and its stop token
        return [*complete, (start, max_length)], end - 1
    return complete, complete[-1][1] - 1 if complete else 0
