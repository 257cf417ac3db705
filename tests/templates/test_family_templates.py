"""Native templates write the same text as the published ones; a reply's prefix is hidden, but occurs in the history."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import luthier as library
from luthier import templates
from luthier.errors import TemplateError
from luthier.inference.chat import Chat
from luthier.inference.generation import Generator
from luthier.models.chat_format import ChatFormat
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.templates import NATIVE, ChatML, Jinja, OwnTemplate, SystemAsUser, Turns
from luthier.types import Conversation, Message, Template
from tests.conftest import Result
from tests.helpers.families import FORMS, NO_SYSTEM, published, speaks_to_all, tiny
from tests.helpers.rows import last_only
from tests.laws.test_prompt_prefix import chats

TURNS = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d e"))
SYSTEM = (Message("system", "s"), *TURNS)


def pick(name: str, source: str | None, choice: str = "auto", **kwargs: Any) -> Template:
    tokenizer = tiny(name)
    tokenizer.hf.chat_template = source
    try:
        template = templates.pick(choice, Tokenizer(tokenizer.hf).own_template, ("<|endoftext|>",), **kwargs)
        if isinstance(template, Jinja):
            template.prompt(TURNS[:1])
    finally:
        tokenizer.hf.chat_template = None
    return template


def rendered(template: Template, messages: Sequence[Message]) -> str:
    return "".join(s.text for s in template.spans(messages))


EXPECTED = {
    "phi3": "<|system|>\ns<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n[b<|end|>]\n<|user|>\nc<|end|>\n<|assistant|>\n"
    "[d e<|end|>]\n",
    "phi3-2024-04": "<s><|user|>\na<|end|>\n<|assistant|>\n[b<|end|>]\n<|user|>\nc<|end|>\n<|assistant|>\n"
    "[d e<|end|>]\n",
    "baichuan2": "s<reserved_106>a<reserved_107>[b</s>]<reserved_106>c<reserved_107>[d e</s>]",
    "glm4": "[gMASK]<sop><|system|>\ns<|user|>\na<|assistant|>[\nb<|user|>]\nc<|assistant|>[\nd e<|user|>]",
    "deepseek": "<｜begin▁of▁sentence｜>User: a\n\nAssistant:[ b<｜end▁of▁sentence｜>]User: c\n\nAssistant:"
    "[ d e<｜end▁of▁sentence｜>]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "[b<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[d e<|eot_id|>]",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_conversation_is_rendered_in_the_format_that_the_model_was_trained_with(name: str) -> None:
    """The text in [] is trained."""
    spans = FORMS[name].spans(TURNS if name in NO_SYSTEM else SYSTEM)
    assert "".join(f"[{s.text}]" if s.written else s.text for s in spans) == EXPECTED[name]
    last = FORMS[name].spans(last_only(TURNS))
    assert "".join(s.text for s in last) == rendered(FORMS[name], TURNS)
    assert [s.text for s in last if s.written] == [s.text for s in spans if s.written][-1:]


@pytest.mark.parametrize("name", ["phi3", "phi3-2024-04", "phi3-medium", "glm4", "deepseek", "llama3"])
def test_auto_recognises_every_published_template(name: str) -> None:
    assert pick(name, published(name)) == FORMS[name]
    assert pick(name, published(name), FORMS[name].name) == FORMS[name]


def test_auto_recognises_yis_template() -> None:
    assert pick("chatml", published("yi")) == ChatML()


@pytest.mark.parametrize("name", ["phi3", "phi3-2024-04", "glm4", "deepseek", "llama3"])
@settings(max_examples=60, deadline=None)
@given(chat=chats())
def test_native_and_published_templates_agree_on_random_conversations(name: str, chat: Conversation) -> None:
    native, tokenizer = FORMS[name], tiny(name)
    tokenizer.hf.chat_template = published(name)
    messages = [m for m in chat.messages if m.role != "system" or name not in NO_SYSTEM]
    for i, m in enumerate(messages):
        if m.role == "assistant":
            assert native.prompt(messages[:i]) == tokenizer.render(messages[:i], True)
    ending = {"phi3": "<|endoftext|>"}.get(name, "")
    published_text = tokenizer.render(messages, False) + ("<|user|>" if name == "glm4" else "")
    assert rendered(native, messages) + ending == published_text


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("phi3-2024-04", "{{ bos_token }}", "{{ eos_token }}"),  # another BOS
        ("phi3", "'<|assistant|>\\n' }}", "'<|assistant|>' }}"),  # no newline in the prompt
        ("phi3", "{{ eos_token }}", "{{ eos_token }}\n\n"),
        ("glm4", "<|assistant|>{%", "<|assistant|>\n\n{%"),  # the prompt contains the reply's prefix
        ("glm4", "[gMASK]<sop>", "[gMASK]"),
        ("deepseek", "{{ bos_token }}", ""),
        ("deepseek", "'Assistant:' }}", "'Assistant: ' }}"),  # xtuner's space
        ("deepseek", "'Assistant: ' + message", "'Assistant:' + message"),  # ms-swift's missing space
        ("llama3", " | trim", ""),
        ("llama3", "bos_token + content", "content"),
        ("llama3", "{% set loop_messages", "{{ 'Be nice.' }}{% set loop_messages"),  # a default system prompt
    ],
)
def test_a_template_that_differs_in_any_text_is_not_replaced_by_a_native_one(name: str, old: str, new: str) -> None:
    source = published(name)
    assert old in source
    assert isinstance(pick(name, source.replace(old, new)), Jinja)


def test_a_model_without_a_template_uses_that_of_its_family() -> None:
    assert pick("baichuan2", None, family="baichuan2") == NATIVE["baichuan2"][0]
    assert pick("glm4", None, family="glm4") == NATIVE["glm4"][0]
    assert pick("chatml", None, family="chatml") == ChatML()
    assert isinstance(
        pick("glm4", published("glm4").replace("[gMASK]", ""), family="glm4"), Jinja
    )  # its own template has precedence
    with pytest.raises(TemplateError, match="the model has no chat template"):
        pick("glm4", None)


@pytest.mark.parametrize("name", FORMS)
def test_a_template_is_rebuilt_from_its_record(name: str) -> None:
    for template in (FORMS[name], SystemAsUser(FORMS[name])):
        described = json.loads(json.dumps(template.describe()))
        again = templates.from_description(described, None, ())
        assert again == template
        assert templates.digest(again) == templates.digest(template)
    assert templates.digest(FORMS[name]) != templates.digest(SystemAsUser(FORMS[name]))


def test_a_record_from_another_version_is_refused() -> None:
    with pytest.raises(TemplateError, match="which this version does not know"):
        templates.from_description({"name": "glm9"}, None, ())
    with pytest.raises(TemplateError, match="record of its glm4 template cannot be read"):
        templates.from_description({**NATIVE["glm4"][0].describe(), "colour": 1}, None, ())


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_a_system_prompt_without_a_system_role_is_refused_or_merged(name: str) -> None:
    for call in (FORMS[name].spans, FORMS[name].prompt):
        with pytest.raises(TemplateError, match="has no system role, so the model") as e:
            call(SYSTEM[:4])
        assert "data.system_role=merge" in e.value.fix
    merged = (Message("user", "s\n\na"), *TURNS[1:])
    template = pick(name, published(name), system_role="merge")
    assert template.spans(SYSTEM) == FORMS[name].spans(merged)
    assert template.prompt(SYSTEM[:4]) == FORMS[name].prompt(merged[:3])
    assert template.spans(TURNS) == FORMS[name].spans(TURNS)


def test_a_jinja_template_that_omits_the_system_prompt_is_refused() -> None:
    asked = (Message("system", "Be brief."), Message("user", "a"))
    omits = published("phi3-medium").replace("'<|end|>' + '\\n'}}{% endif", "'<|end|>' + '\\n\\n'}}{% endif")
    template = pick("phi3-medium", omits)
    assert isinstance(template, Jinja)
    tiny("phi3-medium").hf.chat_template = omits
    with pytest.raises(TemplateError, match="omits the system prompt"):
        template.prompt(asked)
    assert SystemAsUser(template).prompt(asked) == "<|user|>\nBe brief.\n\na<|end|>\n<|assistant|>\n"


class Scripted:
    """A model that generates prepared replies; ``prompts`` are the ids that it was called with."""

    device = torch.device("cpu")

    def __init__(self, replies: list[list[int]]) -> None:
        self.replies, self.prompts = replies, list[list[int]]()
        self.config: Any = self
        self.generation_config: Any = None

    def get_text_config(self) -> Any:
        return object()

    def eval(self) -> None:
        pass

    def generate(self, ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
        self.prompts.append(ids[0].tolist())
        reply = self.replies.pop(0)
        if streamer:
            streamer.put(ids)
            for token in reply:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([ids, torch.tensor([reply])], dim=1)


def talk(template: Template, tokenizer: Tokenizer, replies: list[list[int]]) -> tuple[Chat, Scripted]:
    model = Scripted(replies)
    stops = templates.stop_ids(template, tokenizer)
    return Chat(Generator(model, ChatFormat(model.config, tokenizer, template, stops), compiled=False)), model


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rstrip", [False, True])
def test_the_history_contains_exactly_what_the_model_wrote(name: str, rstrip: bool) -> None:
    """Compared as ids: every prompt starts with the prompt before it and the reply to that."""
    template, tokenizer = FORMS[name], tiny(name, rstrip)
    answers = ("Aye, 茶还热着。", "Two\n lines ")
    if name == "llama3":
        answers = (answers[0], answers[1].strip())
    messages: list[Message] = []
    script = []
    for i, answer in enumerate(answers):
        messages.append(Message("user", f"q{i}"))
        spans = template.spans([*messages, Message("assistant", answer)])
        prompt = template.prompt(messages)
        ids = tokenizer.encode_batch([prompt + spans[-2].text])[0].ids
        script.append(ids[len(tokenizer.encode_batch([prompt])[0].ids) :])
        messages.append(Message("assistant", answer))
    chat, model = talk(template, tokenizer, [*script, script[0]])
    for i, answer in enumerate(answers):
        streamed: list[str] = []
        reply = chat.send(f"q{i}", on_text=streamed.append)
        assert reply.text == "".join(streamed) == answer
        assert reply.stopped
    chat.send("end")
    for i in (0, 1):
        before = model.prompts[i] + script[i]
        assert model.prompts[i + 1][: len(before)] == before


def test_a_reply_without_the_prefix_is_returned_unchanged() -> None:
    """A model may omit the newline; no part of the answer is lost, streamed or not."""
    tokenizer = tiny("glm4")
    ids = [*tokenizer.encode_batch(["No\n."])[0].ids, tokenizer.token_id("<|user|>") or 0]
    newline = tokenizer.encode_batch(["\n"])[0].ids
    for written, answer in ((ids, "No\n."), (newline + ids, "No\n."), (newline, ""), ([*newline * 2, *ids], "\nNo\n.")):
        chat, _ = talk(FORMS["glm4"], tokenizer, [written, written])
        streamed: list[str] = []
        assert chat.send("q", on_text=streamed.append).text == answer == "".join(streamed)


def test_the_reply_prefix_of_a_jinja_template_is_detected() -> None:
    tokenizer = tiny("deepseek")
    tokenizer.hf.chat_template = published("deepseek")
    jinja = Jinja(OwnTemplate(tokenizer.render, published("deepseek")), FORMS["deepseek"].stop)
    assert jinja.reply_prefix == " "
    assert [s for s in jinja.spans(TURNS) if s.text] == [s for s in FORMS["deepseek"].spans(TURNS) if s.text]
    refusing = "{{ raise_exception('no') }}"
    tokenizer.hf.chat_template = refusing
    assert Jinja(OwnTemplate(tokenizer.render, refusing), ()).reply_prefix == ""


def test_a_conversation_refused_in_chat_is_a_user_error() -> None:
    tokenizer = tiny("deepseek")
    source = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}" + published("deepseek")
    tokenizer.hf.chat_template = source
    chat, _ = talk(Jinja(OwnTemplate(tokenizer.render, source), FORMS["deepseek"].stop), tokenizer, [])
    chat.system = "Be brief."
    with pytest.raises(TemplateError, match="chat template refuses this conversation: no system role"):
        chat.send("a")
    assert chat.history == []


def test_every_marker_must_be_one_token() -> None:
    vocabulary = tiny("baichuan2")
    assert templates.stop_ids(NATIVE["baichuan2"][0], vocabulary) == (
        vocabulary.token_id("</s>"),
        vocabulary.token_id("<reserved_106>"),
    )
    wrong = replace(NATIVE["baichuan2"][0], markers=("<reserved_106>", "<reserved_9999>"))
    with pytest.raises(TemplateError, match="the model would read its markers as ordinary text"):
        templates.stop_ids(wrong, vocabulary)
    assert isinstance(wrong, Turns)


@pytest.fixture
def baichuan(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model whose vocabulary has Baichuan2's markers in place of ChatML's, and no chat template."""
    path = tmp_path / "model"
    shutil.copytree(model_dir("llama"), path)
    (path / "chat_template.jinja").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / file).read_text(encoding="utf-8")
        for old, new in (
            ("<|im_start|>", "<reserved_106>"), ("<|im_end|>", "</s>"), ("<|endoftext|>", "<reserved_107>"),
        ):  # fmt: skip
            text = text.replace(old, new)
        (path / file).write_text(text, encoding="utf-8")
    return path


def test_chatml_on_another_vocabulary_is_refused_and_the_fix_works(
    luthier: Callable[..., Result], baichuan: Path, tmp_path: Path
) -> None:
    """The mistake of the Baichuan2 tutorial: its ChatML markers were seven ordinary tokens each."""
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}]')
    base = ("check", "--model", baichuan, "--data", rows)
    refused = luthier(*base, "--set", "data.template=chatml")
    assert refused.code == 2
    assert "<|im_end|> is not one token of this model's tokenizer" in refused.err
    assert "--set data.template=baichuan2" in refused.err
    assert luthier(*base, "--set", "data.template=baichuan2").code == 0
    rows.write_text('[{"instruction": "say <reserved_107>", "output": "b"}]')  # a marker that is not a stop token
    refused = luthier(*base, "--set", "data.template=baichuan2")
    assert refused.code == 2
    assert "a control token of this model" in refused.err


def test_merging_the_system_prompt_is_recorded_in_training_and_repeated_in_chat(
    luthier: Callable[..., Result], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "deepseek"
    shutil.copytree(model_dir("llama"), path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / file).read_text(encoding="utf-8")
        for old, new in zip(("<|im_start|>", "<|im_end|>"), FORMS["deepseek"].markers, strict=True):
            text = text.replace(old, new)
        (path / file).write_text(text, encoding="utf-8")
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["bos_token"] = FORMS["deepseek"].markers[0]
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "chat_template.jinja").write_text(published("deepseek"), encoding="utf-8")
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}]')
    system = ("--set", "data.system=Be brief.")
    refused = luthier("check", "--model", path, "--data", rows, *system)
    assert refused.code == 2
    assert "the deepseek template has no system role" in refused.err
    run = tmp_path / "run"
    done = luthier(
        "train", "--model", path, "--data", rows, "--output-dir", run, *system,
        "--set", "data.system_role=merge", "--set", "train.max_steps=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    recorded = json.loads((run / "adapter" / "luthier.json").read_text(encoding="utf-8"))["template"]
    assert (recorded["name"], recorded["system_role"]) == ("deepseek", "merge")
    chat = library.chat(run)
    assert chat.generator.chat_format.template == SystemAsUser(FORMS["deepseek"])
    prompt = chat.generator.chat_format.template.prompt([*chat.messages(), Message("user", "hello")])
    assert prompt == FORMS["deepseek"].prompt([Message("user", "Be brief.\n\nhello")])
    assert library.chat(run, checkpoint=1).generator.chat_format.template == chat.generator.chat_format.template
    assert speaks_to_all("deepseek") == chat.generator.chat_format.template


def test_every_native_template_can_be_chosen() -> None:
    with pytest.raises(TemplateError, match="'deepsek' is not a template; choose one of auto, jinja, chatml") as e:
        pick("deepseek", None, "deepsek")
    assert all(f", {name}" in e.value.message for name in NATIVE)
    assert e.value.fix == "--set data.template=deepseek"
    assert all(form.name == name and form.stop[0] in form.markers for name, forms in NATIVE.items() for form in forms)
