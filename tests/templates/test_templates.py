"""A model's template is chosen, and refused if its loss mask would be a guess."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from luthier import templates
from luthier.data.loader import DataReport
from luthier.errors import TemplateError
from luthier.models.chat_format import load_chat_format
from luthier.models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luthier.templates import ChatML, Jinja
from luthier.templates.exported import OwnTemplate, chat_template
from luthier.types import Conversation, Message, RowRef, Span
from tests.conftest import TOKENIZER
from tests.helpers.rows import encode, encoder

TWO = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))


def with_template(source: str | None) -> Tokenizer:
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.hf.chat_template = source
    return tokenizer


def pick(source: str, choice: Any = "auto") -> Any:
    return templates.pick(choice, with_template(source).render, source, ("<|im_end|>",))


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_auto_uses_native_chatml_if_both_write_the_same_text() -> None:
    assert pick(LOOP + HEAD) == ChatML()


def test_auto_detects_the_default_system_prompt() -> None:
    opening = "{% if messages[0].role != 'system' %}<|im_start|>system\nHi, SmolLM.<|im_end|>\n{% endif %}"
    assert pick(opening + LOOP + HEAD) == ChatML("Hi, SmolLM.")


def test_auto_runs_a_template_that_differs_in_any_text() -> None:
    trimmed = LOOP.replace("m.content", "m.content | trim")
    template = pick(trimmed + HEAD)
    assert isinstance(template, Jinja)
    spans = template.spans((Message("user", " a "), Message("assistant", " b ")))
    assert spans == [
        Span("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        Span("b<|im_end|>", True),
        Span("\n", False),
    ]


def test_a_model_without_a_template_is_refused_with_a_template_to_choose() -> None:
    with pytest.raises(TemplateError) as e:
        templates.pick("auto", None, None, ())
    assert e.value.fix.endswith("--set data.template=chatml")
    assert templates.pick("chatml", None, None, ()) == ChatML()


def test_a_template_that_rewrites_history_is_refused_unless_only_the_last_reply_is_trained() -> None:
    """As in the templates of thinking models, only the last reply is written in full."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
    )
    template = pick(source + HEAD)
    with pytest.raises(TemplateError, match="changes the text of reply|differently from the prompt") as e:
        template.spans(TWO)
    assert e.value.fix
    last = template.spans(TWO, "last_reply")
    assert [s.text for s in last if s.written] == ["d<|im_end|>"]


THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
)


def test_a_template_that_writes_only_the_last_reply_with_a_thought_is_refused_for_earlier_replies() -> None:
    """As in Qwen3's template: in chat the model begins each reply with a thought, which is then removed."""
    template = pick(THOUGHTS + HEAD)
    with pytest.raises(TemplateError, match="writes reply 1 in another form once the conversation continues") as e:
        template.spans(TWO)
    assert "--set data.train_on=last_reply" in e.value.fix
    spans = template.spans(TWO, "last_reply")
    assert [s.text for s in spans if s.written] == ["<think>\n\n</think>\n\nd<|im_end|>"]
    assert "".join(s.text for s in spans if not s.written).endswith("<|im_start|>assistant\n\n")
    assert template.spans(TWO[:2])[1].text == "<think>\n\n</think>\n\nb<|im_end|>"


OPENED = (  # as in DeepSeek-R1's template, thoughts are left out of a conversation
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("b", "\n</think>\n\nb<|im_end|>"),
        ("<think>\nhm\n</think>\n\nb", "hm\n</think>\n\nb<|im_end|>"),
        ("<think>\n\n</think>\n\nb", "\n</think>\n\nb<|im_end|>"),  # as without a thought
        ("hm\n</think>\n\nb", "hm\n</think>\n\nb<|im_end|>"),  # as chat shows the reply of a model that thinks
    ],
)
def test_a_reply_goes_on_after_the_thought_that_the_prompt_opens(content: str, written: str) -> None:
    template = pick(OPENED)
    messages = (Message("user", "a"), Message("assistant", content))
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert template.spans(messages) == [Span(prompt, False), Span(written, True), Span("\n", False)]
    assert template.prompt(messages[:1]) == prompt
    assert template.reply_prefix == "\n</think>\n\n"  # hidden in chat
    (row,) = encode(encoder(with_template(OPENED), template=template), [Conversation(messages, RowRef("a", 1))])
    assert with_template(OPENED).hf.decode(row.ids[row.trained]) == written
    with pytest.raises(TemplateError, match="differently from the prompt") as e:  # the first reply has no thought
        template.spans((*messages, *TWO))
    assert "last_reply" in e.value.fix
    last = template.spans((*messages, Message("user", "c"), Message("assistant", "d")), "last_reply")
    assert [s.text for s in last if s.written] == ["\n</think>\n\nd<|im_end|>"]


def test_a_thought_within_a_reply_is_refused_if_the_template_removes_it() -> None:
    messages = (Message("user", "a"), Message("assistant", "Hi <think>hm</think>b"))
    with pytest.raises(TemplateError, match="changes the text of reply 1"):
        pick(OPENED).spans(messages)


@pytest.mark.parametrize("content", ["b", "<think>\nhm\n</think>\n\nb"])
def test_a_thought_that_prompt_and_conversation_open_is_part_of_the_prompt(content: str) -> None:
    """As in the template of a Qwen3 model that always thinks."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    spans = pick(source).spans((Message("user", "a"), Message("assistant", content)))
    whole = content if content.startswith("<think>") else f"<think>\n\n</think>\n\n{content}"
    assert [s.text for s in spans if s.written] == [f"{whole}<|im_end|>".removeprefix("<think>\n")]


def test_a_prompt_that_is_not_a_prefix_is_refused() -> None:
    template = pick(LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n<answer>\n{% endif %}")
    with pytest.raises(TemplateError, match="differently from the prompt") as e:
        template.spans(TWO)
    assert "they differ from character" in e.value.message
    assert "last_reply" in e.value.fix


def test_a_template_without_stop_tokens_is_refused() -> None:
    template = pick("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + "assistant:")
    with pytest.raises(TemplateError):
        template.spans(TWO)
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(TemplateError, match="would never stop"):
        pick(plain).spans(TWO)


def test_a_row_that_the_template_refuses_is_dropped(tokenizer: Tokenizer) -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LOOP + HEAD
    template = pick(source)
    rows = [
        Conversation((Message("system", "s"), Message("user", "a"), Message("assistant", "b")), RowRef("f", 1)),
        Conversation((Message("user", "a"), Message("assistant", "b")), RowRef("f", 2)),
    ]
    report = DataReport(read=2)
    examples = encode(encoder(tokenizer, template=template), rows, report)
    assert [e.source.row for e in examples] == [2]
    assert report.rows() == {"read": 2, "kept": 1, "dropped": 1, "changed": 0}
    assert "no system role" in report.problems[0].reason


def test_a_stop_token_that_is_not_one_token_is_refused(tokenizer: Tokenizer) -> None:
    class Odd(ChatML):
        def spans(self, messages: Sequence[Message], train_on: Any = "all_replies") -> list[Span]:
            raise AssertionError

    assert templates.stop_ids(ChatML(), tokenizer) == (2,)
    with pytest.raises(TemplateError, match="is not one token"):
        templates.stop_ids(Odd(stop=("<|eot_id|>",)), tokenizer)


def test_an_adapters_template_is_rebuilt_from_its_record() -> None:
    tokenizer = with_template(LOOP + HEAD)
    for template in (ChatML(), ChatML("x"), Jinja(tokenizer.render, LOOP + HEAD, ("<|im_end|>",))):
        again = templates.from_description(dict(template.describe()), tokenizer.render, LOOP + HEAD, template.stop)
        assert templates.digest(again) == templates.digest(template)
        assert again.prompt(TWO[:1]) == template.prompt(TWO[:1])


def test_an_adapters_template_that_has_changed_is_refused() -> None:
    tokenizer = with_template(LOOP + HEAD)
    described = dict(Jinja(tokenizer.render, LOOP + HEAD, ("<|im_end|>",)).describe())
    for source in (LOOP, None):
        with pytest.raises(TemplateError, match="base model's chat template|base model has none"):
            templates.from_description(described, tokenizer.render if source else None, source, ("<|im_end|>",))


def test_a_short_reply_is_not_confused_with_a_later_turn() -> None:
    """A trimmed ' ok' also occurs in the next user message; the span must not extend to it."""
    template = pick(LOOP.replace("m.content", "m.content | trim") + HEAD)
    chat = (
        Message("user", "hi"),
        Message("assistant", " ok"),
        Message("user", "is it ok"),
        Message("assistant", "yes"),
    )
    assert [s.text for s in template.spans(chat) if s.written] == ["ok<|im_end|>", "yes<|im_end|>"]


def test_text_that_a_template_puts_before_a_reply_is_trained() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    spans = pick(source + HEAD).spans((Message("user", "a"), Message("assistant", "think")))
    assert [s.text for s in spans if s.written] == ["<think>\n\n</think>\n\nthink<|im_end|>"]


def test_todays_date_never_occurs_in_a_prompt() -> None:
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}\n"
    )
    assert pick(dated + LOOP + HEAD).prompt(TWO[:1]).startswith("26 Jul 2024\n")
    with pytest.raises(TemplateError, match="today's date"):
        pick("{{ strftime_now('%d %b %Y') }}" + LOOP + HEAD)


@pytest.mark.parametrize(
    "dated",
    [
        "{% set date_string = strftime_now('%d') %}{{ date_string }}",
        "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}{{ date_string }}{% endif %}",
        "{{ strftime_now('%d') }}{# not date_string #}",
    ],
)
def test_todays_date_is_refused_however_the_template_asks_for_it(dated: str) -> None:
    with pytest.raises(TemplateError, match="today's date"):
        pick(dated + LOOP + HEAD)


@pytest.mark.parametrize("choice", ["chatml", "llama3"])
def test_another_template_can_be_chosen_if_the_model_s_own_writes_todays_date(choice: str) -> None:
    """As the message about the date proposes."""
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}" + LOOP + HEAD)
    template = templates.pick(choice, tokenizer.render, tokenizer.chat_template, ("<|im_end|>",))
    assert template.name == choice
    own = OwnTemplate(tokenizer.render, tokenizer.chat_template or "")
    assert "strftime_now" not in chat_template(template, own, None)


def test_the_default_of_several_named_templates_is_the_model_s_own(model_dir: Any, tmp_path: Path) -> None:
    """As a list in tokenizer_config.json, and as files in additional_chat_templates."""
    for form in ("list", "files"):
        path = tmp_path / form
        shutil.copytree(model_dir("llama"), path)
        if form == "list":
            (path / "chat_template.jinja").unlink(missing_ok=True)
            file = path / "tokenizer_config.json"
            named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": LOOP + HEAD}]
            file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": named}))
        else:
            (path / "chat_template.jinja").write_text(LOOP + HEAD)
            (path / "additional_chat_templates").mkdir()
            (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
        chat_format = load_chat_format(path)
        assert chat_format.template == ChatML()
        assert chat_format.prompt_text(TWO[:1]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_thoughts_are_text_and_not_control_tokens() -> None:
    """A pair of ordinary added tokens, such as <think> and </think>, is markup that a reply may contain."""
    hf = copy.deepcopy(with_template(LOOP + HEAD).hf)
    markup = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    hf.add_tokens([AddedToken(t, special=False) for t in [*markup, "<start_of_turn>", "<|eot|>"]])
    control = Tokenizer(hf).control_tokens
    assert not {*markup} & {*control} and {"<start_of_turn>", "<|eot|>", "<|im_end|>"} <= {*control}
