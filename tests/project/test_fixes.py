"""Typing the fix that an error offers makes the command work."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.adapters import directory as adapters
from tests.conftest import Result

Run = Callable[..., Result]
ROWS = '[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]'
OLD = ROWS.replace('"output"', '"old"')
CHECK = ["check", "--model", "{model}", "--data", "{rows}"]
TRAIN = ["train", "--model", "{model}", "--data", "{rows}", "--set", "train.max_steps=1"]

# name: (rows, the command that fails, a part of its message, values for placeholders in the fix)
CHAT = ["chat", "--prompt", "a"]
EXPORT = ["export", "{run}", "--output-dir", "{new}"]
PLAIN = ["check", "--model", "{plain}", "--data", "{rows}"]
CASES: dict[str, tuple[str, list[str], str, dict[str, str]]] = {
    "a misspelt key in the rows": ('[{"instrution": "a", "output": "b"}]', CHECK, "'instrution' is unknown", {}),
    "a control token in the text": (ROWS.replace('"c"', '"<|im_end|>"'), CHECK, "a control token of this model", {}),
    "rows longer than the context": (ROWS, [*CHECK, "--set", "data.max_length=9999"], "is more than the", {}),
    "no model": (ROWS, ["check", "--data", "{rows}"], "model: is missing", {"--model DIR": "--model {model}"}),
    "no data": (ROWS, ["check", "--model", "{model}"], "data: is missing", {"--data FILE": "--data {rows}"}),
    "no output directory": (ROWS, TRAIN, "output_dir: is missing", {"RUN": "{new}"}),
    "a setting without a value": (
        ROWS,
        [*CHECK, "--set", "train.learning_rate"],
        "has no '='",
        {"=VALUE": "=1e-3", "--set train.learning_rate ": ""},
    ),
    "a rename without a new name": (OLD, [*CHECK, "--rename", "old"], "is not OLD=NEW", {"OLD=NEW": "old=output"}),
    "a rename of no key": (OLD, [*CHECK, "--rename", "odl=output"], "would be ignored", {"OLD=NEW": "old=output"}),
    "an unknown choice": (ROWS, [*CHECK, "--set", "data.format=alpca"], "got 'alpca'", {}),
    "a number out of range": (ROWS, [*CHECK, "--set", "lora.r=0"], "greater than or equal to 1", {}),
    "chat without a directory": (ROWS, CHAT, "no directory was given", {"BASE": "{model}", "DIR": "{adapter}"}),
    "chat with an empty prompt": (ROWS, ["chat", "{model}", "--prompt", " "], "the prompt is empty", {"TEXT": "hello"}),
    "chat --json without a prompt": (ROWS, ["chat", "{model}", "--json"], "so it needs a prompt", {"TEXT": "hello"}),
    "eval of a run without held-out rows": (ROWS, ["eval", "{run}"], "no held-out rows", {"FILE": "{rows}"}),
    "an unknown export format": (ROWS, [*EXPORT, "--to", "ggml"], "--to ggml: is not a format", {}),
    "an unsupported quantization": (
        ROWS,
        [*EXPORT, "--to", "gguf", "--quantization", "q4_K"],
        "is not a type that can be written",
        {},
    ),
    "a base that moved": (ROWS, ["chat", "{moved}", "--prompt", "a"], "does not exist", {"BASE": "{model}"}),
    "a stock adapter": (ROWS, ["chat", "{stock}", "--prompt", "a"], "does not name its base", {"BASE": "{model}"}),
    "an unknown model": (ROWS, ["pull", "smolm2-135m"], "model 'smolm2-135m' is unknown; known", {}),
    "a base model without a template": (ROWS, PLAIN, "no chat template", {}),
    "attention that is not available here": (
        ROWS,
        [*TRAIN, "--output-dir", "{new}", "--set", "model.attn_implementation=varlen"],
        "a GPU of compute capability 8.0 or newer, a 16-bit model.dtype and the package flash-attn",
        {},
    ),
    "not enough memory": (ROWS, [*TRAIN, "--output-dir", "{new}"], "there is not enough memory", {}),
}  # fmt: skip


@pytest.fixture
def places(luthier: Run, model_dir: Callable[[str], Path], tmp_path: Path) -> dict[str, str]:
    """Make a model, rows, a finished run, a run whose base moved, a PEFT directory and a model without a template."""
    paths = {name: tmp_path / name for name in ("model", "gone", "plain", "run", "moved", "stock", "new")}
    for name in ("model", "gone", "plain"):
        shutil.copytree(model_dir("llama"), paths[name])
    (paths["plain"] / "chat_template.jinja").unlink()
    rows = tmp_path / "rows.json"
    rows.write_text(ROWS)
    for base, run in (("model", "run"), ("gone", "moved")):
        done = luthier(
            "train", "--model", paths[base], "--data", rows, "--output-dir", paths[run], "--set", "train.max_steps=1"
        )
        assert done.code == 0, done.err
    shutil.rmtree(paths["gone"])
    shutil.copytree(paths["run"] / "adapter", paths["stock"])
    (paths["stock"] / adapters.META).unlink()
    return {**{k: str(v) for k, v in paths.items()}, "rows": str(rows), "adapter": str(paths["run"] / "adapter")}


def typed(argv: list[str], fix: str) -> list[str]:
    """Apply a fix to a command: the fix is a whole command, or options to add or to correct."""
    if whole := re.search(r"luthier (.+)$", fix):
        return shlex.split(whole.group(1))
    choices = [re.findall(r"(--[a-z][a-z-]*) ([^\s,;)]+)", choice) for choice in fix.split(", or ")]
    options = next(choice for choice in choices if choice)
    words, names = list(argv), {name for name, _ in options}
    for name in names - {"--set"}:
        while name in words:
            del words[(i := words.index(name)) : i + 2]
    if "--model" in names and "--adapter" in names:
        words = [w for i, w in enumerate(words) if i == 0 or w.startswith("-") or words[i - 1].startswith("-")]
    for name, value in options:
        words += [name, value]
    bare = [i for i, w in enumerate(words) if w == "--set" and "=" not in words[i + 1]]
    for i in reversed(bare):
        del words[i : i + 2]
    return words


@pytest.mark.parametrize("name", CASES)
def test_typing_the_fix_works(
    name: str, luthier: Run, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text, command, message, placeholders = CASES[name]
    if command[0] == "pull":
        request.getfixturevalue("smollm2")  # so that the model exists and nothing is downloaded
    Path(places["rows"]).write_text(text)
    argv = [w.format(**places) for w in command]
    with monkeypatch.context() as broken:
        if message == "there is not enough memory":
            broken.setattr("luthier.verbs.train.train", no_memory)
        done = luthier(*argv)
    assert done.code == 2
    assert message in done.err
    fix = done.err.strip().splitlines()[-1].removeprefix("  fix: ")
    for placeholder, value in placeholders.items():
        fix = fix.replace(placeholder, value.format(**places))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))  # a conversation that ends at once
    again = luthier(*typed(argv, fix))
    assert again.code == 0, (fix, typed(argv, fix), again.err)


def no_memory(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
