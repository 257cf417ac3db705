"""A run and everything that it becomes send the same prompt ids, for every template, system prompt and conversation."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import Replace
from transformers import AutoTokenizer

import luthier as library
from luthier.errors import ConfigError, ModelError, TemplateError
from luthier.exporting import chat_files
from luthier.exporting.gguf import llamacpp
from luthier.exporting.gguf.llamacpp import Question, ServerOptions
from luthier.models.chat_format import ChatFormat
from luthier.models.checkpoint_reader import read_json
from luthier.serving import vllm
from luthier.serving.models import resolve_models
from luthier.types import Message, SystemRole
from tests.conftest import TOKENIZER, make_model
from tests.helpers.families import FORMS, NO_SYSTEM, published, tiny
from tests.helpers.handover import SYSTEM, tuned
from tests.helpers.published import PUBLISHED

Ids = list[int] | None  # None: the conversation is refused
Reader = Callable[[Sequence[Message]], Ids]

FOREIGN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ '[assistant] ' if add_generation_prompt }}"
)
CHATML = published("yi")
DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|im_start|>system\nToday: ' + date_string + '\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- set messages = messages[1:] %}"
    "{%- endif %}"
    "{{- '<|im_end|>\n' }}"
) + CHATML
THINKING = (
    "{% for m in messages %}{% set text = m['content'].split('</think>')[-1] if m['role'] == 'assistant' else "
    "m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OMITS_SYSTEM = (
    "\n{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
COMMENT = "  {# comment #}" + CHATML
LEADING_SPACE = "  \n  {{ '<|im_start|>system\nx<|im_end|>\n' }}" + CHATML
WITH_FILE = [name for name in FORMS if name not in ("chatml", "baichuan2")]
CURRENT = [name for name in FORMS if name not in ("phi3-2024-04", "phi3-medium")]  # what data.template chooses
# the markers of the vocabulary, the base model's own template, data.template, data.system_role
Case = tuple[str, str | None, str, SystemRole]
CASES: dict[str, Case] = {
    **{f"{name} by auto": (name, published(name), "auto", "template") for name in WITH_FILE},
    **{f"{name} as jinja": (name, published(name), "jinja", "template") for name in ("deepseek", "llama3")},
    **{f"{name} instead of another": (name, FOREIGN, FORMS[name].name, "template") for name in CURRENT},
    **{f"{name} merges system": (name, published(name), "auto", "merge") for name in NO_SYSTEM},
    "deepseek instead of another merges system": ("deepseek", FOREIGN, "deepseek", "merge"),
    "chatml instead of another merges system": ("chatml", FOREIGN, "chatml", "merge"),
    "baichuan2 without a template": ("baichuan2", None, "baichuan2", "template"),
    "chatml by auto": ("chatml", CHATML, "auto", "template"),
    "chatml with a default system prompt": ("chatml", DEFAULT_SYSTEM, "auto", "template"),
    "chatml with a default system prompt merges system": ("chatml", DEFAULT_SYSTEM, "auto", "merge"),
    "a date": ("chatml", DATED, "auto", "template"),
    "a date, system merged": ("chatml", DATED, "auto", "merge"),
    "a template that removes thoughts": ("chatml", THINKING, "auto", "template"),
    "a template that omits system prompts": ("chatml", OMITS_SYSTEM, "auto", "template"),
    "a template that omits system prompts, merged": ("chatml", OMITS_SYSTEM, "auto", "merge"),
    "thoughts are removed, as jinja": ("chatml", THINKING, "jinja", "template"),
    "a template that starts with a comment": ("chatml", COMMENT, "jinja", "template"),
    "a template that starts with white space": ("chatml", LEADING_SPACE, "jinja", "template"),
}  # fmt: skip

USER, MORE = Message("user", "Who are you?\n"), Message("user", " 你是谁？ ")
TALK = (USER, Message("assistant", "<b> I am. </b>"), MORE, Message("assistant", "好的\n"), USER)
OTHER = Message("system", 'Be "kind" {{ x }}.\n请友善。')
CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "no system turn": (USER,),
    "a system turn": (OTHER, USER),
    "three turns": TALK,
    "three turns and a system turn": (OTHER, *TALK),
    "a thought in an earlier turn": (USER, Message("assistant", "<think>\nWho?\n</think>\n\nI."), MORE),
}


def base_of(case: Case, path: Path) -> Path:
    """Write a tiny model whose vocabulary has the template's markers."""
    name, template, _, _ = case
    hf = tiny(name).hf
    hf.chat_template = template
    model = make_model("llama", vocab_size=640 if name == "chatml" else 700)
    model.generation_config.eos_token_id = hf.eos_token_id
    model.save_pretrained(path)
    hf.save_pretrained(path)
    if name == "chatml":
        shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
        (path / "chat_template.jinja").write_text(template or "", encoding="utf-8")
    return path


def run_reader(chat: library.Chat) -> Reader:
    """Read as ``luthier chat`` does, which adds the run's system prompt to conversations without one."""

    def ids(messages: Sequence[Message]) -> Ids:
        opening = chat.messages() if messages[0].role != "system" else []
        try:
            return chat.generator.chat_format.prompt_ids([*opening, *messages])
        except TemplateError:
            return None

    return ids


def stock_reader(tokenizer_dir: Path, template: str | None = None) -> Reader:
    """Read as stock transformers and vLLM do."""
    hf: Any = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    if template is not None:
        hf.chat_template = template

    def ids(messages: Sequence[Message]) -> Ids:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return list(hf.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"])
        except Exception:  # the template refuses
            return None

    return ids


def old_stock_reader(path: Path) -> Reader:
    """Read as tools do that know only the template in tokenizer_config.json."""
    return stock_reader(path, read_json(path / "tokenizer_config.json").get("chat_template"))  # type: ignore[arg-type]


def in_llama_cpp(gguf: Path, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Read as llama.cpp does, with the template in the file."""
    plain = [[{"role": m.role, "content": m.content} for m in messages] for messages in conversations]
    return llamacpp.ask(Question(ServerOptions(str(gguf), context=64), plain, texts=[], stops=[], tokens=1)).prompt_ids


def _other_tokenizer(folder: Path, base: Path, chat_format: ChatFormat) -> None:
    """Write a tokenizer that reads another letter."""
    hf: Any = copy.deepcopy(chat_format.tokenizer.hf)
    hf.backend_tokenizer.normalizer = Replace("W", "V")
    hf.save_pretrained(folder)


def assert_equal_ids(base: Path, run: Path, out: Path, ways: dict[str, Reader]) -> int:
    """Compare every way's prompt ids of every conversation; return the number of conversations that are accepted."""
    ways = {**readers(base, run, out), **ways}
    accepted = {}
    for conversation, messages in CONVERSATIONS.items():
        ids = {way: read(messages) for way, read in ways.items()}
        assert all(i == ids["run"] for i in ids.values()), (conversation, run, ids)
        if ids["run"] is not None:
            accepted[conversation] = ids["run"]
    library.export(run, "gguf", out / "gguf")
    theirs = in_llama_cpp(next((out / "gguf").glob("*.gguf")), [CONVERSATIONS[c] for c in accepted])
    assert dict(zip(accepted, theirs, strict=True)) == accepted
    return len(accepted)


def readers(base: Path, run: Path, out: Path) -> dict[str, Reader]:
    """Hand the run over in every way, and return how each result reads conversations."""
    merged, peft = library.merge(run, out / "merged").path, out / "peft"
    library.export(run, "peft", peft)
    library.export(run, "gguf-lora", out / "lora")
    options = vllm.chat_options(resolve_models([run]))
    served = [Path(options[options.index(f"--{name}") + 1]) for name in ("tokenizer", "chat-template")]
    ways = {
        "run": run_reader(library.chat(run)),
        "merged, in luthier": run_reader(library.chat(merged)),
        "merged, in stock transformers": stock_reader(merged),
        "peft, in stock transformers": stock_reader(peft),
        "peft, in luthier": run_reader(library.chat(model=base, adapter=peft)),
        "vllm": stock_reader(served[0], served[1].read_text(encoding="utf-8")),
        "gguf-lora": stock_reader(peft, (out / "lora" / "chat_template.jinja").read_text(encoding="utf-8")),
    }
    if "chat_template" in read_json(merged / "tokenizer_config.json"):
        ways["merged, in an old reader"] = old_stock_reader(merged)
    return ways


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_ids_of_a_run_and_of_all_that_it_becomes_are_equal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    case = CASES[name]
    base = base_of(case, tmp_path / "base")
    accepted = 0
    for system in (None, SYSTEM):
        run = tuned(base, tmp_path / f"run-{system is None}", system, template=case[2], system_role=case[3])
        try:
            library.chat(run)
        except TemplateError:
            continue  # no run can have this system prompt
        accepted += assert_equal_ids(base, run, tmp_path / f"out-{system is None}", {})
    assert accepted >= 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_prompt_ids_of_the_published_layouts_are_equal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real files of the five families; also under their own tensor names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = PUBLISHED[name](tmp_path / "base")
    run = tuned(base, tmp_path / "run", None if name == "deepseek" else SYSTEM)
    ways = {}
    if name in ("baichuan2", "glm4"):
        original = library.merge(run, tmp_path / "original", layout="original").path
        ways["merged under the published names"] = run_reader(library.chat(original))
    assert assert_equal_ids(base, run, tmp_path / "out", ways) >= 2


# --- an export that would send other prompts is refused ---------------------------------------------------------------

FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "the base model's own template": ("template_text", lambda chat_format, _: chat_format.tokenizer.chat_template),
    "a template without the system prompt": (
        "template_text",
        lambda chat_format, _, original=chat_files.template_text: original(chat_format, None),
    ),
    "a tokenizer that splits differently": ("write_tokenizer", _other_tokenizer),
}


WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "merge": library.merge,
    "peft": lambda run, out: library.export(run, "peft", out),
    "vllm": lambda run, _: vllm.chat_options(resolve_models([run])),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_an_export_that_would_send_other_prompts_is_refused_and_deleted(
    way: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = base_of(CASES["chatml instead of another"], tmp_path / "base")
    run = tuned(base, tmp_path / "run", template="chatml")
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(chat_files, name, wrong)
    monkeypatch.setattr(vllm, "template_text", chat_files.template_text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match="would send another prompt than the training for a conversation of"):
        WAYS[way](run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "cache").rglob("*.jinja"))
    assert [p for p in sorted(tmp_path.rglob("*")) if "cache" not in p.parts] == before


def test_vllm_is_refused_for_runs_with_different_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one template for all models; with different system prompts the clients have to send them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = base_of(CASES["chatml instead of another"], tmp_path / "base")
    one, other = tuned(base, tmp_path / "one", template="chatml"), tuned(base, tmp_path / "other", template="jinja")
    with pytest.raises(ConfigError, match="one and other were trained with different chat templates"):
        vllm.chat_options(resolve_models([one, other]))
    another = resolve_models([one, tuned(base, tmp_path / "another", "Be brief.", template="chatml")])
    template = vllm.chat_options(another)[3]
    assert SYSTEM not in Path(template).read_text(encoding="utf-8")
    assert [n for n in vllm.notes(another) if "must begin with 'Be brief.'" in n]
