"""Rows are truncated correctly, and exactly the replies are trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PretrainedConfig

from luthier.data.loader import DataReport, refuse
from luthier.encoding.store import ExampleStore
from luthier.errors import DataError
from luthier.models.chat_format import ChatFormat
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.templates import ChatML, RefusedConversation
from luthier.types import Conversation, Example, Message, RowRef, Span
from tests.helpers.rows import conversations, encode, encoder, examples

LONG = Conversation(
    (Message("user", "Hello"), Message("assistant", "one two three four five six " * 8)), RowRef("f", 1)
)
TURNS = Conversation(
    (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "lamp " * 30)),
    RowRef("f", 2),
)


def encoded(tokenizer: Tokenizer, row: Conversation, limit: int, **kwargs: Any) -> tuple[list[Example], DataReport]:
    report = DataReport(read=1)
    return encode(encoder(tokenizer, max_length=limit, **kwargs), [row], report), report


def test_truncation_keeps_the_stop_token_and_counts_the_row_as_changed(tokenizer: Tokenizer) -> None:
    whole = encoded(tokenizer, LONG, 512)[0][0]
    (cut,), report = encoded(tokenizer, LONG, 40)
    assert len(cut) == 40
    assert cut.ids[-1] == whole.ids[-1] == 2
    assert cut.ids[:-1].tolist() == whole.ids[:39].tolist()
    assert cut.trained.tolist() == [*whole.trained[:39].tolist(), True]
    assert report.rows() == {"read": 1, "kept": 1, "dropped": 0, "changed": 1}
    assert report.problems[0].reason == f"truncated from {len(whole)} to 40 tokens"


def test_truncation_drops_whole_turns_that_do_not_fit(tokenizer: Tokenizer) -> None:
    whole = encoded(tokenizer, TURNS, 512)[0][0]
    first_end = int(whole.trained.argmax()) + 2  # "b" and its stop token
    (cut,), report = encoded(tokenizer, TURNS, first_end + 3)
    assert len(cut) == first_end
    assert cut.ids.tolist() == whole.ids[:first_end].tolist()
    assert report.changed == 1


def test_a_row_whose_prompt_fills_max_length_is_dropped(tokenizer: Tokenizer) -> None:
    rows, report = encoded(tokenizer, LONG, 8)
    assert not rows
    assert report.rows() == {"read": 1, "kept": 0, "dropped": 1, "changed": 0}
    assert "leaves no room for a reply" in report.problems[0].reason


def test_rows_that_are_too_long_can_be_dropped_or_refused(tokenizer: Tokenizer) -> None:
    rows, report = encoded(tokenizer, LONG, 40, too_long="drop")
    assert not rows
    assert report.dropped == 1
    rows, report = encoded(tokenizer, LONG, 40, too_long="error")
    with pytest.raises(DataError, match="more than max_length 40") as e:
        refuse(report, 1)
    assert "--set data.max_length=" in e.value.fix


def test_with_last_reply_only_the_last_reply_is_trained(tokenizer: Tokenizer) -> None:
    (every,), _ = encoded(tokenizer, TURNS, 512)
    (last,), _ = encoded(tokenizer, TURNS, 512, train_on="last_reply")
    assert every.ids.tolist() == last.ids.tolist()
    start = len(ChatFormat(PretrainedConfig(), tokenizer, ChatML(), (2,)).prompt_ids(TURNS.messages[:3]))
    assert not last.trained[:start].any()
    assert last.trained[start:].all()
    assert every.supervised == last.supervised + 2


def test_a_reply_that_the_tokenizer_would_join_with_the_prompt_is_dropped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_batch(["assistant\n\nx"])[0].ids
    row = Conversation((Message("user", "a"), Message("assistant", "\nx")), RowRef("f", 1))
    rows, report = encoded(tokenizer, row, 512)
    if rows:  # this vocabulary does not join newlines
        assert len(ids) > 2
    else:
        assert "joins the start of a reply" in report.problems[0].reason


def test_statistics_count_every_row_in_full(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer)
    store = ExampleStore(rows)
    stats = store.stats()
    assert stats["total"] == sum(map(len, rows))
    assert stats["supervised"] == sum(e.supervised for e in rows)
    assert stats["longest"] == max(map(len, rows))
    assert store.lengths() == list(map(len, rows))
    assert ExampleStore(rows, keep=False).stats() == stats
    assert ExampleStore().stats() == {"total": 0, "supervised": 0}
    assert len(conversations()) == len(rows)


def test_the_store_returns_the_examples_that_were_added(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer)
    store = ExampleStore(rows)
    for added, stored in zip([*rows, rows[-1]], [*store, store[-1]], strict=True):
        assert stored.ids.tolist() == added.ids.tolist()
        assert stored.trained.tolist() == added.trained.tolist()
        assert stored.source == added.source
        assert (stored.ids.dtype, stored.trained.dtype) == (added.ids.dtype, added.trained.dtype)
    assert len(store[2:4]) == 2
    with pytest.raises(IndexError):
        _ = store[len(rows)]


def joining(tokenizer: Tokenizer) -> Tokenizer:
    """In this vocabulary, the newline after ``assistant`` and two spaces form one token."""
    other = Tokenizer(copy.deepcopy(tokenizer.hf))
    other._fast.add_tokens(["\n  "])
    return other


JOINED = (Message("user", "a"), Message("assistant", "  b"), Message("user", "c"), Message("assistant", "d"))


def test_a_reply_that_would_join_its_prompt_is_encoded_after_the_prompts_ids(tokenizer: Tokenizer) -> None:
    other = joining(tokenizer)
    report = DataReport(read=1)
    e = encoder(other)
    examples = encode(e, [Conversation(JOINED, RowRef("f", 1))], report)
    assert [ex.shared >= 0 for ex in examples] == [False, True] and report.problems == []
    for example, i in zip(examples, (1, 3), strict=True):
        prompt = other.encode_batch([e.template.prompt(JOINED[:i])])[0].ids
        assert example.ids[: len(prompt)].tolist() == prompt
        assert other.text(example.ids[len(prompt) :]) == f"{JOINED[i].content}<|im_end|>"
        assert example.trained.tolist() == [False] * len(prompt) + [True] * (len(example) - len(prompt))
    assert any("the tokenizer joins" in note for note in report.notes)


def test_a_joined_row_whose_replies_cannot_be_rendered_apart_is_dropped(tokenizer: Tokenizer) -> None:
    class Whole(ChatML):
        def spans(self, messages: Sequence[Message], tools: Any = ()) -> list[Span]:
            if len(messages) < len(JOINED):
                raise RefusedConversation("only whole conversations")
            return super().spans(messages, tools)

    report = DataReport(read=1)
    assert encode(encoder(joining(tokenizer), template=Whole()), [Conversation(JOINED, RowRef("f", 1))], report) == []
    assert "only whole conversations" in report.unrendered[0].reason
