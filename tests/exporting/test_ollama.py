"""The template in Ollama's Modelfile, in Go's template language, writes luthier's prompts.

The interpreter below supports what the templates use of that language: range, if, else if, variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from luthier.adapters.locate import locate_tuned
from luthier.config import GenerationSettings
from luthier.errors import TemplateError
from luthier.exporting import ollama
from luthier.templates import ChatML, Jinja, OwnTemplate, SystemAsUser
from luthier.types import Message, Template
from tests.conftest import Result
from tests.helpers import published
from tests.helpers.families import FORMS, NO_SYSTEM
from tests.helpers.handover import SYSTEM, tuned

Run = Callable[..., Result]
TALKS = [
    [Message("user", "Who are you?")],
    [Message("user", "a\nb"), Message("assistant", "c"), Message("user", "d"), Message("assistant", "e"),
     Message("user", "f")],
]  # fmt: skip


class Go:
    """An interpreter of a template, with ``.Messages`` and ``.System`` as Ollama provides them."""

    def __init__(self, text: str) -> None:
        self.parts = [p for p in re.split(r"(\{\{.*?\}\})", text, flags=re.DOTALL) if p]

    def render(self, messages: Sequence[Message]) -> str:
        self.messages, self.variables, self.out = messages, dict[str, object](), ""
        self._run(0, len(self.parts), None)
        return self.out

    def _run(self, at: int, end: int, item: Message | None) -> None:
        while at < end:
            part = self.parts[at]
            if not part.startswith("{{"):
                self.out += part
                at += 1
                continue
            action = part[2:-2].strip()
            if action.startswith(("range", "if")):
                branches, after = self._block(at)
                if action == "range .Messages":
                    for message in self.messages:
                        self._run(at + 1, after - 1, message)
                else:
                    for start, stop, condition in branches:
                        if condition is None or self._true(condition, item):
                            self._run(start, stop, item)
                            break
                at = after
                continue
            if match := re.fullmatch(r"(\$\w+) :?= (.+)", action):
                self.variables[match.group(1)] = self._value(match.group(2), item)
            else:
                self.out += str(self._value(action, item))
            at += 1

    def _block(self, at: int) -> tuple[list[tuple[int, int, str | None]], int]:
        """Return (first part, end, condition) of each branch, and the index after ``end``."""
        condition: str | None = self.parts[at][2:-2].strip().removeprefix("if ")
        branches, depth, start, i = list[tuple[int, int, str | None]](), 0, at + 1, at
        while True:
            action = self.parts[i][2:-2].strip() if self.parts[i].startswith("{{") else ""
            depth += action.startswith(("range", "if"))
            depth -= action == "end"
            if depth == 0 or (depth == 1 and action.startswith("else")):
                branches.append((start, i, condition))
                condition, start = action.removeprefix("else if ") if "if " in action else None, i + 1
                if depth == 0:
                    return branches, i + 1
            i += 1

    def _true(self, condition: str, item: Message | None) -> bool:
        if match := re.fullmatch(r'eq (\S+) "(.*)"', condition):
            return self._value(match.group(1), item) == match.group(2)
        if condition.startswith("not "):
            return not self._value(condition.removeprefix("not "), item)
        return bool(self._value(condition, item))

    def _value(self, name: str, item: Message | None) -> object:
        if name == ".System":
            return next((m.content for m in self.messages if m.role == "system"), "")
        if item and name in (".Role", ".Content"):
            return item.role if name == ".Role" else item.content
        constants = {"true": True, "false": False, '""': ""}
        return constants[name] if name in constants else self.variables[name]


@pytest.mark.parametrize("name", [*FORMS, "chatml-default"])
def test_the_template_writes_luthier_s_prompts(name: str) -> None:
    template: Template = ChatML("You help.") if name == "chatml-default" else FORMS[name]
    merged = name in NO_SYSTEM
    for one in [template, SystemAsUser(template)] if merged else [template]:
        go = Go(ollama.go_template(one))
        for talk in TALKS:
            assert go.render(talk) == one.prompt(talk)
            if not merged or one is not template:
                asked = [Message("system", SYSTEM), *talk]
                assert go.render(asked) == one.prompt(asked)


def test_the_interpreter_detects_a_wrong_template() -> None:
    wrong = ollama.go_template(FORMS["glm4"]).replace("$replied = true", "$replied = false")
    assert Go(wrong).render(TALKS[1]) != FORMS["glm4"].prompt(TALKS[1])


def test_the_modelfile_has_model_template_stop_tokens_and_system_prompt(luthier: Run, tmp_path: Path) -> None:
    adapter = tuned(published.phi3(tmp_path / "base"), tmp_path / "marlow")
    done = luthier("export", adapter, "--to", "ollama", "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert (
        "verified: llama.cpp's greedy replies equal those of base+adapter in fp32" in done.out
        and "run it: ollama create marlow -f" in done.out
    )
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./marlow-f16.gguf\n") and (tmp_path / "out" / "marlow-f16.gguf").is_file()
    assert f'SYSTEM """{SYSTEM}"""\n' in text and 'PARAMETER stop "<|end|>"\n' in text
    match = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    template = locate_tuned(adapter).chat_format().template
    assert match and Go(match.group(1)).render(TALKS[1]) == template.prompt(TALKS[1])


def test_the_modelfile_has_the_run_s_sampling_settings() -> None:
    drawn = GenerationSettings.model_validate({"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 5})
    text = ollama.modelfile("a.gguf", ChatML(), None, drawn)
    lines = ["temperature 0.6", "top_p 0.8", "top_k 5", "repeat_penalty 1.0", "num_predict 512"]
    assert [f"PARAMETER {line}" in text for line in lines] == [True] * 5 and "SYSTEM" not in text
    greedy = ollama.modelfile("a.gguf", ChatML(), None, GenerationSettings.model_validate({}))
    assert "PARAMETER temperature 0\n" in greedy and "top_p" not in greedy
    none, some = (GenerationSettings.model_validate({"no_repeat_ngram_size": n}) for n in (0, 3))
    assert ollama.notes(none) == [] and "no_repeat_ngram_size" in ollama.notes(some)[0]


def test_what_ollama_s_language_cannot_express_is_refused() -> None:
    with pytest.raises(TemplateError, match="which ends it in a Modelfile"):
        ollama.modelfile("a.gguf", ChatML(), 'write """', None)
    own = Jinja(OwnTemplate(lambda *_: "", "{{ messages }}"), ("</s>",))
    with pytest.raises(TemplateError, match="own chat template cannot be translated to Ollama's language") as e:
        ollama.modelfile("a.gguf", own, None, None)
    assert e.value.fix == "use --to gguf, whose template llama.cpp runs"
