"""The templates that trl ships are ready: every reply is trained as chat prompts it and as the template writes it.

For the ones with ``{% generation %}``, what is trained is compared with the mask that transformers computes from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from luthier.data.loader import DataReport
from luthier.encoding.encoder import Encoder
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.templates import SystemAsUser, stop_ids
from luthier.types import Conversation, Example, Message, RowRef, Template, as_dict
from tests.helpers.trl_templates import NAMES, template_of, tokenizer_of

USER, REPLY, SYSTEM = (
    Message(role, text) for role, text in (("user", "Hi there"), ("assistant", "Hello."), ("system", "Be brief."))
)  # type: ignore[arg-type]
MORE = (
    Message("user", "Next?"),
    Message("assistant", "Two."),
    Message("user", "More?"),
    Message("assistant", "Three."),
)
CONVERSATIONS = {"one turn": (USER, REPLY), "system": (SYSTEM, USER, REPLY), "three turns": (USER, REPLY, *MORE)}
NO_SYSTEM = ("gemma", "gemma_training")  # these refuse a system message with an error of their own
# templates that write earlier turns in another form than the reply that the model writes
PER_REPLY = ("deepseek", "gptoss", "nemotron", "qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6")
SINGLE = ("qwen3_instruct_2507", "qwen3_vl", "qwen3_8")


def encoded(name: str, tokenizer: Tokenizer, template: Template, messages: tuple[Message, ...]) -> list[Example]:
    report = DataReport()
    encoder = Encoder(template, tokenizer, stop_ids(template, tokenizer), 4096)
    rows = list(encoder.stream([Conversation(messages, RowRef(name, 1))], report))
    assert rows, [p.reason for p in report.problems]
    return rows[0][1]


def test_the_templates_of_trl_are_installed() -> None:
    assert len(NAMES) >= 70


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_ready(name: str, kind: str) -> None:
    tokenizer = tokenizer_of(name)
    template, messages = template_of(name, tokenizer), CONVERSATIONS[kind]
    if name in NO_SYSTEM and kind == "system":
        report = DataReport(read=1)
        encoder = Encoder(template, tokenizer, stop_ids(template, tokenizer), 4096)
        assert list(encoder.stream([Conversation(messages, RowRef(name, 1))], report)) == []
        assert "System role not supported (--set data.system_role=merge" in report.problems[0].reason
        template = SystemAsUser(template)
    examples = encoded(name, tokenizer, template, messages)
    replies = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if len(examples) == 1:
        whole = np.split(
            np.flatnonzero(examples[0].trained), np.flatnonzero(np.diff(np.flatnonzero(examples[0].trained)) > 1) + 1
        )
        parts = [(examples[0], int(run[0]), int(run[-1]) + 1) for run in whole]
    else:
        parts = [(e, int(np.flatnonzero(e.trained)[0]), len(e)) for e in examples]
    assert len(parts) == len(replies)
    for (example, start, end), i in zip(parts, replies, strict=True):
        prompt = tokenizer.encode_batch([template.prompt(messages[:i])])[0].ids
        assert example.ids[:start].tolist() == prompt
        written = tokenizer.text(example.ids[start:end])
        assert messages[i].content in written
        assert example.ids[end - 1] in stop_ids(template, tokenizer)
        assert written.endswith(template.stop) and sum(written.count(s) for s in template.stop) == 1


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("_training")])
def test_replies_get_examples_of_their_own_only_where_the_template_rewrites_earlier_turns(name: str) -> None:
    tokenizer = tokenizer_of(name)
    examples = encoded(name, tokenizer, template_of(name, tokenizer), CONVERSATIONS["three turns"])
    rewrites = name.startswith(PER_REPLY) and name not in SINGLE
    assert len(examples) == (3 if rewrites else 1)
    assert [e.shared >= 0 for e in examples] == [False, True, True][: len(examples)]


# what trl trains besides: ends of turns that nobody waits for, and starts that the prompt of chat already contains
BESIDES = (
    "\n", "<|im_end|>", "\n<|im_end|>", "\n<|endoftext|>", "<think>\n", "<think>\n\n</think>\n\n",
    "<|start|>assistant",
)  # fmt: skip
# trl's versions of these templates leave out the thought that the published prompt opens, or read parts only
OTHERS = ("deepseek", "nemotron", "idefics3", "llava", "smolvlm")


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_training") and not n.startswith(OTHERS)])
def test_the_loss_mask_is_that_of_the_generation_blocks(name: str) -> None:
    tokenizer = tokenizer_of(name)
    template = template_of(name, tokenizer)
    for kind, messages in CONVERSATIONS.items():
        if name in NO_SYSTEM and kind == "system":
            continue
        example, *others = encoded(name, tokenizer, template, messages)
        if others:  # one example per reply has no counterpart there
            continue
        options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
        stock = tokenizer.hf.apply_chat_template(
            list(map(as_dict, messages)), chat_template=tokenizer.source(with_tools=False), **options
        )
        assert isinstance(stock, dict) or hasattr(stock, "keys")
        ids, mask = np.asarray(stock["input_ids"]), np.asarray(stock["assistant_masks"], bool)
        size = len(example)
        assert ids[:size].tolist() == example.ids.tolist()
        reply = int(np.flatnonzero(example.trained)[-1])
        assert mask[:size][example.trained].all()
        last = np.flatnonzero(~example.trained[:reply])[-1] + 1  # the start of the last reply
        extra = [*(i for i in range(last) if not example.trained[i]), *range(size, len(ids))]
        for text in _runs(tokenizer, ids, [i for i in extra if mask[i]]):
            assert text in BESIDES, text


def _runs(tokenizer: Tokenizer, ids: Any, positions: list[int]) -> list[str]:
    """Return the texts of runs of consecutive positions."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1) if positions else []
    return [tokenizer.text(ids[run]) for run in runs]
