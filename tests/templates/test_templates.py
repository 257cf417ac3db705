"""A model's template is chosen, and refused if its loss mask would be a guess."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from luthier import templates
from luthier.data.loader import DataReport
from luthier.errors import ModelError, TemplateError
from luthier.models.chat_format import load_chat_format
from luthier.models.tokenizer.chat_template import read_templates
from luthier.models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luthier.templates import ChatML, Jinja, OwnForTools, OwnTemplate, SystemAsUser
from luthier.templates.exported import chat_template
from luthier.types import Conversation, Message, RowRef, Span, ToolCall
from tests.conftest import TOKENIZER
from tests.helpers.rows import encode, encoder, last_only

TWO = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))


def with_template(source: str | None) -> Tokenizer:
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.hf.chat_template = source
    return tokenizer


def pick(source: str, choice: Any = "auto") -> Any:
    return templates.pick(choice, with_template(source).own_template, ("<|im_end|>",))


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
        templates.pick("auto", None, ())
    assert e.value.fix.endswith("--set data.template=chatml")
    assert templates.pick("chatml", None, ()) == ChatML()


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
    last = template.spans(last_only(TWO))
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
    assert "--set data.train_on=each_reply" in e.value.fix
    spans = template.spans(last_only(TWO))
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
    assert "each_reply" in e.value.fix
    last = template.spans(last_only((*messages, Message("user", "c"), Message("assistant", "d"))))
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
    assert "each_reply" in e.value.fix


def test_a_template_without_stop_tokens_is_refused() -> None:
    template = pick("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + "assistant:")
    with pytest.raises(TemplateError):
        template.spans(TWO)
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(TemplateError, match="would never stop"):
        Jinja(OwnTemplate(with_template(plain).render, plain), ()).spans(TWO[:2])


def test_a_reply_ends_with_a_known_stop_token_if_the_template_writes_none() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = pick(plain + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert template.spans(TWO[:2])[1:] == [Span(" b<|im_end|>", True), Span("", False)]
    assert template.added_stop == "<|im_end|>"
    assert pick(LOOP.replace("m.content", "m.content | trim") + HEAD).added_stop is None


def test_a_reply_ends_with_the_token_that_ends_one_in_the_middle_of_a_conversation() -> None:
    """As in GLM-4.5's template, where the marker of the next turn ends a reply."""
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    tokenizer = with_template(source)
    template = Jinja(OwnTemplate(tokenizer.render, source), ("<|endoftext|>", "<|user|>", "<|tool|>"))
    assert template.added_stop == "<|user|>"
    assert [s.text for s in template.spans(TWO) if s.written] == ["b<|user|>", "d<|user|>"]
    assert "".join(s.text for s in template.spans(TWO)[:2]) == "<|user|>\na<|assistant|>\nb<|user|>"
    call = Message("assistant", "", tool_calls=(ToolCall("lamp", {}),))
    with pytest.raises(TemplateError, match="leaves out a tool call"):
        template.spans((TWO[0], call))


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
        def spans(self, messages: Sequence[Message], tools: Any = ()) -> list[Span]:
            raise AssertionError

    assert templates.stop_ids(ChatML(), tokenizer) == (2,)
    with pytest.raises(TemplateError, match="is not one token"):
        templates.stop_ids(Odd(stop=("<|eot_id|>",)), tokenizer)


def test_an_adapters_template_is_rebuilt_from_its_record() -> None:
    tokenizer = with_template(LOOP + HEAD)
    own = tokenizer.own_template
    assert own
    jinja = Jinja(own, ("<|im_end|>",))
    for template in (ChatML(), ChatML("x"), jinja, OwnForTools(ChatML(), jinja), SystemAsUser(jinja)):
        again = templates.from_description(dict(template.describe()), own, template.stop)
        assert again == template
        assert templates.digest(again) == templates.digest(template)
        assert again.prompt(TWO[:1]) == template.prompt(TWO[:1])


def test_an_adapters_template_that_has_changed_is_refused() -> None:
    plain = with_template(LOOP + HEAD).own_template
    assert plain
    own = replace(plain, for_tools=HEAD)
    described = dict(Jinja(own, ("<|im_end|>",)).describe())
    for other in (replace(own, source=LOOP), replace(own, for_tools=LOOP), None):
        with pytest.raises(TemplateError, match="base model's chat template|base model has none"):
            templates.from_description(described, other, ("<|im_end|>",))


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


@pytest.mark.parametrize(
    ("dated", "day"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ('{{ strftime_now( "%Y-%m-%d" ) }}', "2024-07-26"),
        ("{% set date_string = strftime_now('%d') %}{{ date_string }}", "26"),
        ("{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}{{ date_string }}{% endif %}", "26"),
        ("{{ strftime_now('%d') }}{# not date_string #}", "26"),
    ],
)
def test_todays_date_is_fixed_however_the_template_asks_for_it(dated: str, day: str) -> None:
    """In training, chat and export; it is recorded with the adapter."""
    tokenizer = with_template(dated + "\n" + LOOP + HEAD)
    template = templates.pick("auto", tokenizer.own_template, ("<|im_end|>",))
    assert template.prompt(TWO[:1]).startswith(day)
    assert template.describe()["date"] == "2024-07-26"
    exported = with_template(chat_template(template, tokenizer.own_template, None))
    plain = [{"role": "user", "content": "a"}]
    assert exported.hf.apply_chat_template(plain, tokenize=False, add_generation_prompt=True) == template.prompt(
        TWO[:1]
    )


def test_a_date_in_an_unknown_form_is_refused() -> None:
    with pytest.raises(TemplateError, match="today's date in a form that cannot be fixed"):
        pick("{% set form = '%d' %}{{ strftime_now(form) }}" + LOOP + HEAD)


@pytest.mark.parametrize("choice", ["chatml", "llama3"])
def test_another_template_can_be_chosen_if_the_model_s_own_writes_todays_date(choice: str) -> None:
    """As the message about the date proposes."""
    tokenizer = with_template("{% set form = '%d' %}{{ strftime_now(form) }}" + LOOP + HEAD)
    template = templates.pick(choice, tokenizer.own_template, ("<|im_end|>",))
    assert template.name == choice
    assert "strftime_now" not in chat_template(template, tokenizer.own_template, None)


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


def model_with(path: Path, source: Path, **files: str) -> Path:
    """Copy a model directory, without its chat template, and write files into it. It stops at <|endoftext|> only."""
    shutil.copytree(source, path)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    for name, key in (("config.json", "eos_token_id"), ("generation_config.json", "eos_token_id")):
        file = path / name
        if file.is_file():
            file.write_text(json.dumps({**json.loads(file.read_text()), key: 0}))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def test_a_stop_token_that_the_configuration_lacks_is_added_and_reported(model_dir: Any, tmp_path: Path) -> None:
    trimmed = LOOP.replace("m.content", "m.content | trim") + HEAD
    chat_format = load_chat_format(model_with(tmp_path / "a", model_dir("llama"), chat_template__jinja=trimmed))
    assert chat_format.stop_ids == (2, 0)
    assert any("<|im_end|> ends a reply in the chat template, but" in note for note in chat_format.notes())
    listed = load_chat_format(model_dir("llama"))
    assert not any("ends a reply" in note for note in listed.notes())


def test_a_stop_token_that_the_template_does_not_write_is_reported(model_dir: Any, tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant:{% endif %}"
    chat_format = load_chat_format(model_with(tmp_path / "a", model_dir("llama"), chat_template__jinja=plain))
    assert "the chat template writes nothing after the last reply; a trained reply ends with <|endoftext|>" in (
        chat_format.notes()
    )


def test_the_files_of_templates_have_transformers_order_of_precedence(model_dir: Any, tmp_path: Path) -> None:
    """chat_template.jinja, then tokenizer_config.json, then chat_template.json; a difference is reported."""
    first, third = LOOP + HEAD, ("X" + LOOP + HEAD)
    processor = json.dumps({"chat_template": third})
    only = model_with(tmp_path / "only", model_dir("llama"), chat_template__json=processor)
    assert load_chat_format(only).prompt_text(TWO[:1]).startswith("X<|im_start|>")
    both = model_with(tmp_path / "both", model_dir("llama"), chat_template__json=processor, chat_template__jinja=first)
    chat_format = load_chat_format(both)
    assert chat_format.prompt_text(TWO[:1]).startswith("<|im_start|>")
    assert any("contain different chat templates; chat_template.jinja is used" in note for note in chat_format.notes())
    (both / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="a chat template cannot be read"):
        read_templates(both)


def test_a_native_template_has_no_form_for_tools() -> None:
    tool = {"type": "function", "function": {"name": "lamp"}}
    for call in (ChatML().spans, ChatML().prompt, templates.NATIVE["llama3"][0].prompt):
        with pytest.raises(TemplateError, match="has no form for tools"):
            call(TWO[:2], (tool,))
