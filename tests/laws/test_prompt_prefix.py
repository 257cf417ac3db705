"""Law "prompt prefix": the ids that chat sends are a prefix of the trained ids, and replies end in a stop id.

The law can fail: it detects a prompt with an additional space, as in three of the tutorials, and a stop id that the
generator does not know. luthier itself refuses both, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

import luthier
from luthier import personas
from luthier.config import DataConfig
from luthier.data.loader import DataReport
from luthier.encoding.encoder import Encoder
from luthier.inference.generation import Generator, Reply
from luthier.models.chat_format import ChatFormat, load_chat_format
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.serving import app
from luthier.serving.models import Served
from luthier.serving.protocol import ChatRequest
from luthier.templates import ChatML, Jinja, OwnTemplate, stop_ids
from luthier.types import Conversation, Example, Message, RowRef
from tests.helpers.families import FORMS, gguf, speaks_to_all, tiny
from tests.helpers.rows import encode, encoder, fails, load


def law(encoder: Encoder, conversation: Conversation, example: Example) -> None:
    """Check the law on ids only: those that chat and serving send, and those that are trained."""
    chat_format = ChatFormat(PretrainedConfig(), encoder.tokenizer, encoder.template, encoder.stop_ids)  # type: ignore[arg-type]
    ids = example.ids.tolist()
    assert ids[-1] in encoder.stop_ids
    assert example.trained[-1]
    at = 0
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        prompt = chat_format.prompt_ids(conversation.messages[:i])
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
    template = (
        ChatML() if native else Jinja(OwnTemplate(tokenizer.render, tokenizer.chat_template or ""), ("<|im_end|>",))
    )
    e = encoder(tokenizer, template=template, max_length=4096)
    report = DataReport()
    encoded = encode(e, [chat], report)
    if encoded:
        law(e, chat, encoded[0])
    else:  # the only exception: a reply whose first characters the tokenizer joins with the prompt; this is reported
        assert "joins the start of a reply" in report.problems[0].reason


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=chats(), limit=st.integers(8, 60))
def test_truncation_keeps_the_law_and_the_stop_token(chat: Conversation, limit: int, tokenizer: Tokenizer) -> None:
    e = encoder(tokenizer, max_length=limit)
    report = DataReport()
    for example in encode(e, [chat], report):
        assert len(example) <= limit
        assert example.ids[-1] == 2
        assert example.trained[-1]
        first = next(i for i, m in enumerate(chat.messages) if m.role == "assistant")
        prompt = ChatFormat(PretrainedConfig(), tokenizer, e.template, (2,)).prompt_ids(chat.messages[:first])
        assert example.ids[: len(prompt)].tolist() == prompt
    assert report.dropped + len(encode(e, [chat], DataReport())) == 1


def test_the_shipped_rows_keep_the_law(tokenizer: Tokenizer) -> None:
    e = encoder(tokenizer)
    for file in (personas.TRAIN, personas.HELD_OUT, personas.TEAHOUSE):
        _all(e, file)


@pytest.mark.smollm2
def test_all_of_huanhuan_keeps_the_law_with_smollm2(smollm2: Path, huanhuan: Path) -> None:
    v = load_chat_format(smollm2)
    assert _all(Encoder(v.template, v.tokenizer, v.stop_ids, 2048), huanhuan) == 3729


@settings(max_examples=40, deadline=None)
@given(chat=chats(), rstrip=st.booleans())
@pytest.mark.parametrize("name", FORMS)
def test_every_family_keeps_the_law(name: str, chat: Conversation, rstrip: bool) -> None:
    v, template = tiny(name, rstrip), speaks_to_all(name)
    e = Encoder(template, v, stop_ids(template, v), 4096)
    report = DataReport()
    encoded = encode(e, [chat], report)
    if encoded:
        law(e, chat, encoded[0])
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
    """Join three rows into one conversation of three turns with a system prompt, for every format."""
    rows = load(huanhuan).conversations[:300]
    system = Message("system", "现在你要扮演皇帝身边的女人--甄嬛")
    for name in FORMS:
        v, template = tiny(name), speaks_to_all(name)
        e = Encoder(template, v, stop_ids(template, v), 8192)
        for i in range(0, len(rows), 3):
            turns = tuple(m for row in rows[i : i + 3] for m in row.messages)
            chat = Conversation((system, *turns), rows[i].source)
            (example,) = encode(e, [chat], DataReport())
            law(e, chat, example)
            assert np.isin(example.ids[example.trained], e.stop_ids).sum() == 3


def _all(e: Encoder, file: Path) -> int:
    rows = load(file).conversations
    report = DataReport()
    encoded = encode(e, rows, report)
    assert len(encoded) == len(rows)
    assert not report.problems
    for row, example in zip(rows, encoded, strict=True):
        law(e, row, example)
    return len(encoded)


class SpacedPrompt(ChatML):
    """The bug of the tutorials: chat sends a prompt that differs from the trained one."""

    def prompt(self, messages: Sequence[Message], tools: Any = ()) -> str:
        return super().prompt(messages, tools) + " "


def test_the_law_detects_an_additional_space_in_the_prompt(tokenizer: Tokenizer) -> None:
    chat = Conversation((Message("user", "a"), Message("assistant", "b")), RowRef("x", 1))
    right = encoder(tokenizer)
    example = encode(right, [chat], DataReport())[0]
    wrong = encoder(tokenizer, template=SpacedPrompt())
    assert fails(lambda: law(wrong, chat, example))
    report = DataReport(read=1)
    assert encode(wrong, [chat], report) == []
    assert "differently from the prompt" in report.unrendered[0].reason


def test_the_law_detects_an_unknown_stop_id(tokenizer: Tokenizer) -> None:
    chat = Conversation((Message("user", "a"), Message("assistant", "b")), RowRef("x", 1))
    example = encode(encoder(tokenizer), [chat], DataReport())[0]
    wrong = encoder(tokenizer, stop_ids=(0,))
    assert fails(lambda: law(wrong, chat, example))
    report = DataReport(read=1)
    assert encode(wrong, [chat], report) == []
    assert "does not stop on" in report.unrendered[0].reason


def sent_by_chat(base: Path, turns: Sequence[Message], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the ids that ``luthier chat`` passes to the model for the next reply."""
    sent: list[list[int]] = []

    def caught(self: Generator, prompts: list[list[int]], *_: Any, **__: Any) -> list[Reply]:
        sent.extend(prompts)
        return [Reply("", True, 0, 0, 0.0)]

    monkeypatch.setattr(Generator, "_generate", caught)
    talk = luthier.chat(base, system=turns[0].content)
    talk.history = list(turns[1:-1])
    talk.send(turns[-1].content)
    return sent[0]


def sent_by_serving(base: Path, turns: Sequence[Message]) -> list[int]:
    """Return the ids that ``luthier serve`` passes to the engine for the same turns."""
    messages = [{"role": m.role, "content": m.content} for m in turns]
    asked = ChatRequest.model_validate({"model": "base", "messages": messages})
    return app._prompt(asked, Served("base", None, luthier.chat(base).generator.chat_format))


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_chat_and_serving_send_a_prefix_of_what_is_trained(
    arch: str, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_dir(arch)
    turns = [Message("system", "You keep a light."), Message("user", " Who? "), Message("assistant", "I.\n")]
    turns += [Message("user", "你好"), Message("assistant", "Aye.")]
    data = DataConfig.model_validate({"train": "unused"})
    (example,) = encode(load_chat_format(base).encoder(data), [Conversation(tuple(turns), RowRef("x", 1))])
    sent = sent_by_serving(base, turns[:-1])
    assert sent == sent_by_chat(base, turns[:-1], monkeypatch)
    assert example.ids[: len(sent)].tolist() == sent
    assert example.trained[len(sent) :].all() and not example.trained[len(sent) - 1]
