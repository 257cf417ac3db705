"""A row of which a template leaves out a part is not trained; thoughts in texts and in fields are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.data.loader import DataReport
from luthier.encoding.encoder import Encoder
from luthier.errors import TemplateError
from luthier.templates import Jinja, SystemAsUser, from_description, pick, stop_ids
from luthier.templates.exported import chat_template
from luthier.types import Conversation, Message, RowRef, Template, ToolCall, Tools
from tests.helpers.trl_templates import template_of, tokenizer_of, with_markers

USER, REPLY = Message("user", "Please search cats."), Message("assistant", "Here they are.")
TOOL = {"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}
SILENT = ("cohere", "deepseek_r1_distill", "gemma", "gemma3", "llama3", "phi3", "phi3_5", "smolvlm")
ABLE = ("qwen2_5", "qwen3", "glm4moe", "gptoss", "llama3_1", "gemma4", "nemotron_3_nano", "lfm2_2_5")


def outcome(name: str, messages: tuple[Message, ...], tools: Tools = ()) -> tuple[list[str], str]:
    """Return the trained texts of a row, and the reason if it is dropped."""
    tokenizer = tokenizer_of(name)
    template = template_of(name, tokenizer)
    report = DataReport(read=1)
    encoder = Encoder(template, tokenizer, stop_ids(template, tokenizer), 4096)
    rows = list(encoder.stream([Conversation(messages, RowRef(name, 1), tools)], report))
    texts = [tokenizer.text(e.ids[e.trained]) for _, examples in rows for e in examples]
    return texts, report.problems[0].reason if report.problems else ""


@pytest.mark.parametrize("name", SILENT)
def test_tools_that_a_template_has_no_place_for_drop_the_row(name: str) -> None:
    """Although the tool's name occurs in the user's text."""
    assert "leaves tools out" in outcome(name, (USER, REPLY), (TOOL,))[1]


@pytest.mark.parametrize("name", SILENT)
def test_calls_that_a_template_has_no_place_for_drop_the_row(name: str) -> None:
    """Although the tool's name and its argument occur in the reply's text."""
    call = Message("assistant", "I will search with limit 5.", tool_calls=(ToolCall("search", {"limit": 5}),))
    texts, reason = outcome(name, (USER, call))
    assert not texts and ("leaves out a tool call" in reason or "changes the text" in reason)


@pytest.mark.parametrize("name", ABLE)
def test_tools_calls_and_results_are_written(name: str) -> None:
    call = ToolCall("search", {"what": "cats", "limit": 5}, "call12345")
    messages = (
        USER,
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "two cats", name="search", call_id="call12345"),
        REPLY,
    )
    texts, reason = outcome(name, messages, (TOOL,))
    assert reason == ""
    called, answered = (texts[0], texts[-1]) if len(texts) > 1 else (texts[0], texts[0])
    assert all(part in called for part in ("search", "cats", "5")) and "two cats" not in "".join(texts)
    assert "Here they are." in answered


THOUGHT = "<think>\nhm\n</think>\n\nb"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_8", "qwen3_5_think", "glm4moe", "nemotron_3_nano"])
def test_a_thought_in_the_text_is_the_same_as_one_in_a_field(name: str) -> None:
    user = Message("user", "a")
    in_text, _ = outcome(name, (user, Message("assistant", THOUGHT)))
    in_field, _ = outcome(name, (user, Message("assistant", "b", thought="hm")))
    assert in_text == in_field and in_text[0].count("</think>") == 1 and in_text[0].count("<think>") <= 1


def test_a_text_after_the_mark_of_a_thought_is_not_lost() -> None:
    """R1's template keeps what follows the last mark; a field beside such a text would lose its start."""
    odd = Message("assistant", "Use </think> here.", thought="hm")
    assert "changes the text" in outcome("deepseek_r1_distill", (Message("user", "a"), odd))[1]


def test_a_date_that_is_not_a_literal_is_refused() -> None:
    for dated in ("{% set now = strftime_now %}{{ now('%d') }}", "{{ strftime_now(form) }}"):
        tokenizer = with_markers(dated + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
        with pytest.raises(TemplateError, match="today's date in a form that cannot be fixed"):
            pick("auto", tokenizer.own_template, ("<|im_end|>",))
    spaced = with_markers("{{ strftime_now ('%d') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    assert spaced.render((Message("user", "a"),), True) == "26a<|im_end|>"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_for_tools_that_cannot_be_used_does_not_prevent_plain_rows() -> None:
    tokenizer = with_markers(CHATML)
    tokenizer.hf.chat_template = {"default": CHATML, "tool_use": "{{ strftime_now(form) }}" + CHATML}
    template: Template = pick("auto", tokenizer.own_template, ("<|im_end|>",))
    assert template.prompt((Message("user", "a"),)).startswith("<|im_start|>user")


def test_the_template_for_tools_writes_rows_with_tools_and_is_exported() -> None:
    tokenizer = with_markers(CHATML)
    with_tools = "{{ tools | tojson }}\n" + CHATML
    tokenizer.hf.chat_template = {"default": CHATML, "tool_use": with_tools}
    template = pick("auto", tokenizer.own_template, ("<|im_end|>",))
    plain, tooled = template.prompt((USER,)), template.prompt((USER,), (TOOL,))
    assert '"search"' in tooled and tooled.endswith(plain) and '"search"' not in plain
    exported = with_markers(chat_template(template, tokenizer.own_template, None))
    assert exported.render((USER,), True) == plain
    assert exported.render((USER,), True, (TOOL,)) == tooled


def test_an_adapter_of_an_earlier_version_loads_with_templates_for_tools() -> None:
    own = tokenizer_of("qwen2_5").own_template
    assert own
    several = replace(own, for_tools="tools")
    again = from_description({"name": "jinja", "source": own.source}, several, ("<|im_end|>",))
    assert isinstance(again, Jinja) and again.own == several


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "deepseek_r1_distill"])
def test_a_merged_system_prompt_is_exported_as_it_was_trained(name: str) -> None:
    """Before the first question, also if a greeting or a call comes before or after it."""
    tokenizer = tokenizer_of(name)
    template = SystemAsUser(template_of(name, tokenizer))
    exported = with_markers(chat_template(template, tokenizer.own_template, None))
    system, greeting = Message("system", "S"), Message("assistant", "Hello, traveller.")
    for messages in ((system, USER), (system, greeting, USER), (system, USER, REPLY, USER)):
        assert exported.render(messages, True) == template.prompt(messages)
    assert "S\n\nPlease search cats." in template.prompt((system, greeting, USER))


@pytest.mark.parametrize(("role", "what"), [("user", "a user message"), ("tool", "the result of a tool")])
def test_a_text_that_a_template_changes_or_leaves_out_drops_the_row(role: str, what: str) -> None:
    for changed in ("m.content | upper", "''"):
        body = f"{{{{ {changed} if m.role == '{role}' else m.content }}}}"
        tokenizer = with_markers(CHATML.replace("{{ m.content }}", body))
        own = tokenizer.own_template
        assert own
        messages = (USER, REPLY) if role == "user" else (USER, REPLY, Message("tool", "two cats"), REPLY)
        with pytest.raises(TemplateError, match=f"leaves {what} out, or changes it"):
            Jinja(own, ("<|im_end|>",)).spans(messages)
