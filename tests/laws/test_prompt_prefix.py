"""Law "prompt prefix": the ids of what chat sends are a prefix of the ids that are trained; replies end in a stop id.

Shown able to fail: a prompt with one space more, as three of the tutorials have it, is refused; a stop id that the
generator does not know is refused; and without luthier's own proof the plain law is red for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import data, personas
from luthier.data.report import DataReport
from luthier.encode import Encoder
from luthier.errors import TemplateError
from luthier.models.tokenizer import Tokenizer
from luthier.preflight import voice
from luthier.templates import ChatML, Jinja, stop_ids
from luthier.types import Conversation, Example, Message, RowRef

from ..families import FORMS, gguf, speaks_to_all, tiny
from .helpers import encoder, fails


def law(encoder: Encoder, conversation: Conversation, example: Example) -> None:
    """The definition, in terms of ids alone."""
    ids = example.ids.tolist()
    assert ids[-1] in encoder.stop_ids
    assert example.trained[-1]
    at = 0
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        prompt = encoder.prompt_ids(conversation.messages[:i])
        assert ids[: len(prompt)] == prompt
        assert not example.trained[at : len(prompt)].any()
        at = len(prompt)
        while at < len(ids) and example.trained[at]:
            at += 1
        assert ids[at - 1] in encoder.stop_ids


text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
    lambda t: bool(t.strip()) and "<|" not in t
)


@st.composite
def chats(draw: st.DrawFn) -> Conversation:
    messages = [Message("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(text)), Message("assistant", draw(text))]
    return Conversation(tuple(messages), RowRef("drawn", 1))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=chats(), native=st.booleans())
def test_every_prompt_is_a_prefix_and_every_reply_ends_in_a_stop_id(
    chat: Conversation, native: bool, tokenizer: Tokenizer
) -> None:
    template = ChatML() if native else Jinja(tokenizer.render, tokenizer.chat_template or "", ("<|im_end|>",))
    e = encoder(tokenizer, template=template, max_length=4096)
    report = DataReport()
    found = e.encode([chat], report)
    if found:
        law(e, chat, found[0])
    else:  # the one way out: a reply whose first characters the tokenizer would join with the prompt, and it is said
        assert "joins the start of a reply" in report.problems[0].reason


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=chats(), limit=st.integers(8, 60))
def test_truncation_keeps_the_law_and_the_stop_token(chat: Conversation, limit: int, tokenizer: Tokenizer) -> None:
    e = encoder(tokenizer, max_length=limit)
    report = DataReport()
    for example in e.encode([chat], report):
        assert len(example) <= limit
        assert example.ids[-1] == 2
        assert example.trained[-1]
        first = next(i for i, m in enumerate(chat.messages) if m.role == "assistant")
        prompt = e.prompt_ids(chat.messages[:first])
        assert example.ids[: len(prompt)].tolist() == prompt
    assert report.dropped + len(e.encode([chat], DataReport())) == 1


def test_the_shipped_rows_keep_the_law(tokenizer: Tokenizer) -> None:
    e = encoder(tokenizer)
    for file in (personas.TRAIN, personas.HELD_OUT, personas.TEAHOUSE):
        _all(e, file)


@pytest.mark.smollm2
def test_all_of_huanhuan_keeps_the_law_with_smollm2(smollm2: Path, huanhuan: Path) -> None:
    v = voice(smollm2)
    assert _all(Encoder(v.template, v.tokenizer, v.stop_ids, 2048), huanhuan) == 3729


@settings(max_examples=40, deadline=None)
@given(chat=chats(), rstrip=st.booleans())
@pytest.mark.parametrize("name", FORMS)
def test_every_family_keeps_the_law(name: str, chat: Conversation, rstrip: bool) -> None:
    v, template = tiny(name, rstrip), speaks_to_all(name)
    e = Encoder(template, v, stop_ids(template, v), 4096)
    report = DataReport()
    found = e.encode([chat], report)
    if found:
        law(e, chat, found[0])
        for span, m in zip(
            (s for s in template.spans(chat.messages) if s.written),
            (m for m in chat.messages if m.role == "assistant"),
            strict=True,
        ):
            content = m.content.strip() if name == "llama3" else m.content
            assert span.text == template.reply_prefix + content + template.stop[0]
    else:
        assert "joins the start of a reply" in report.problems[0].reason
        assert template.reply_prefix == ""


@pytest.mark.parametrize("name", FORMS)
def test_all_of_huanhuan_keeps_the_law_in_every_format(name: str, huanhuan: Path) -> None:
    v, template = tiny(name), FORMS[name]
    assert _all(Encoder(template, v, stop_ids(template, v), 4096), huanhuan) == 3729


REAL = {"phi-3": "phi3", "deepseek-llm": "deepseek", "baichuan": "baichuan2", "qwen2": "chatml"}


@pytest.mark.parametrize("vocab", REAL)
def test_all_of_huanhuan_keeps_the_law_with_real_vocabularies(vocab: str, huanhuan: Path, vocabs: Path) -> None:
    names = [n for n, t in FORMS.items() if t.name == REAL[vocab]]
    v = gguf(vocabs, vocab)
    for name in names:
        e = Encoder(FORMS[name], v, stop_ids(FORMS[name], v), 2048)
        assert _all(e, huanhuan) == 3729


def test_multi_turn_text_of_real_rows_keeps_the_law(huanhuan: Path) -> None:
    """Three rows joined into one conversation of three turns, for every format, system prompt and all."""
    rows = data.load([huanhuan]).conversations[:300]
    system = Message("system", "现在你要扮演皇帝身边的女人--甄嬛")
    for name in FORMS:
        v, template = tiny(name), speaks_to_all(name)
        e = Encoder(template, v, stop_ids(template, v), 8192)
        for i in range(0, len(rows), 3):
            turns = tuple(m for row in rows[i : i + 3] for m in row.messages)
            chat = Conversation((system, *turns), rows[i].source)
            (example,) = e.encode([chat], DataReport())
            law(e, chat, example)
            assert np.isin(example.ids[example.trained], e.stop_ids).sum() == 3


def _all(e: Encoder, file: Path) -> int:
    rows = data.load([file]).conversations
    report = DataReport()
    found = e.encode(rows, report)
    assert len(found) == len(rows)
    assert not report.problems
    for row, example in zip(rows, found, strict=True):
        law(e, row, example)
    return len(found)


class SpacedPrompt(ChatML):
    """The tutorials' fault: chat sends another prompt than training saw."""

    def prompt(self, messages: Sequence[Message]) -> str:
        return super().prompt(messages) + " "


def test_the_law_sees_a_prompt_with_a_space_more(tokenizer: Tokenizer) -> None:
    chat = Conversation((Message("user", "a"), Message("assistant", "b")), RowRef("x", 1))
    right = encoder(tokenizer)
    example = right.encode([chat], DataReport())[0]
    wrong = encoder(tokenizer, template=SpacedPrompt())
    assert fails(lambda: law(wrong, chat, example))
    with pytest.raises(TemplateError, match="differently from the prompt"):
        wrong.encode([chat], DataReport())


def test_the_law_sees_an_unknown_stop_id(tokenizer: Tokenizer) -> None:
    chat = Conversation((Message("user", "a"), Message("assistant", "b")), RowRef("x", 1))
    example = encoder(tokenizer).encode([chat], DataReport())[0]
    wrong = encoder(tokenizer, stop_ids=(0,))
    assert fails(lambda: law(wrong, chat, example))
    with pytest.raises(TemplateError, match="does not stop on"):
        wrong.encode([chat], DataReport())
