"""A new user reads the second line of an error, types it, and it works."""

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

# name: (rows, the command that fails, a word of its message, what takes the place of a placeholder in the fix)
TALK = ["chat", "--prompt", "a"]
EXPORT = ["export", "{run}", "--output-dir", "{new}"]
PLAIN = ["check", "--model", "{plain}", "--data", "{rows}"]
CASES: dict[str, tuple[str, list[str], str, dict[str, str]]] = {
    "a misspelt key in the rows": ('[{"instrution": "a", "output": "b"}]', CHECK, "'instrution' is unknown", {}),
    "a control token in the text": (ROWS.replace('"c"', '"<|im_end|>"'), CHECK, "a control token of this model", {}),
    "rows longer than the model reads": (ROWS, [*CHECK, "--set", "data.max_length=9999"], "is more than the", {}),
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
    "a choice that is none": (ROWS, [*CHECK, "--set", "data.format=alpca"], "got 'alpca'", {}),
    "a number out of range": (ROWS, [*CHECK, "--set", "lora.r=0"], "greater than or equal to 1", {}),
    "chat without a place": (ROWS, TALK, "no directory was given", {"BASE": "{model}", "DIR": "{adapter}"}),
    "chat with an empty prompt": (ROWS, ["chat", "{model}", "--prompt", " "], "the prompt is empty", {"TEXT": "hello"}),
    "chat --json without a prompt": (ROWS, ["chat", "{model}", "--json"], "so it needs a prompt", {"TEXT": "hello"}),
    "eval of a run that held nothing out": (ROWS, ["eval", "{run}"], "no held-out rows", {"FILE": "{rows}"}),
    "a format that is not there": (ROWS, [*EXPORT, "--to", "ggml"], "--to ggml: is not a format", {}),
    "a type that is not written": (
        ROWS,
        [*EXPORT, "--to", "gguf", "--quantization", "q4_K"],
        "is not a type that can be written",
        {},
    ),
    "a base that moved": (ROWS, ["chat", "{moved}", "--prompt", "a"], "is not there", {"BASE": "{model}"}),
    "a stock adapter": (ROWS, ["chat", "{stock}", "--prompt", "a"], "does not say which base", {"BASE": "{model}"}),
    "an unknown model": (ROWS, ["pull", "smolm2-135m"], "model 'smolm2-135m' is unknown; known", {}),
    "a base model without a template": (ROWS, PLAIN, "no chat template", {}),
    "attention that is not to be had here": (
        ROWS,
        [*TRAIN, "--output-dir", "{new}", "--set", "model.attn_implementation=varlen"],
        "a GPU of compute capability 8.0 or newer, a 16-bit model.dtype and the package flash-attn",
        {},
    ),
    "memory that does not do": (ROWS, [*TRAIN, "--output-dir", "{new}"], "there is not enough memory", {}),
}  # fmt: skip


@pytest.fixture
def places(luthier: Run, model_dir: Callable[[str], Path], tmp_path: Path) -> dict[str, str]:
    """A model, rows, a finished run, a run whose base moved, a stock PEFT directory, a model without a template."""
    at = {name: tmp_path / name for name in ("model", "gone", "plain", "run", "moved", "stock", "new")}
    for name in ("model", "gone", "plain"):
        shutil.copytree(model_dir("llama"), at[name])
    (at["plain"] / "chat_template.jinja").unlink()
    rows = tmp_path / "rows.json"
    rows.write_text(ROWS)
    for base, run in (("model", "run"), ("gone", "moved")):
        done = luthier(
            "train", "--model", at[base], "--data", rows, "--output-dir", at[run], "--set", "train.max_steps=1"
        )
        assert done.code == 0, done.err
    shutil.rmtree(at["gone"])
    shutil.copytree(at["run"] / "adapter", at["stock"])
    (at["stock"] / adapters.META).unlink()
    return {**{k: str(v) for k, v in at.items()}, "rows": str(rows), "adapter": str(at["run"] / "adapter")}


def typed(argv: list[str], fix: str) -> list[str]:
    """The command as a user would type it after reading the fix: a whole command, or options added or put right."""
    if whole := re.search(r"luthier (.+)$", fix):
        return shlex.split(whole.group(1))
    choices = [re.findall(r"(--[a-z][a-z-]*) ([^\s,;)]+)", choice) for choice in fix.split(", or ")]
    options = next(found for found in choices if found)
    kept, names = list(argv), {name for name, _ in options}
    for name in names - {"--set"}:
        while name in kept:
            del kept[(i := kept.index(name)) : i + 2]
    if "--model" in names and "--adapter" in names:
        kept = [w for i, w in enumerate(kept) if i == 0 or w.startswith("-") or kept[i - 1].startswith("-")]
    for name, value in options:
        kept += [name, value]
    bare = [i for i, w in enumerate(kept) if w == "--set" and "=" not in kept[i + 1]]
    for i in reversed(bare):
        del kept[i : i + 2]
    return kept


@pytest.mark.parametrize("name", CASES)
def test_typing_the_fix_works(
    name: str, luthier: Run, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text, command, words, placeholders = CASES[name]
    if command[0] == "pull":
        request.getfixturevalue("smollm2")  # it is pulled already, so that nothing is fetched
    Path(places["rows"]).write_text(text)
    argv = [w.format(**places) for w in command]
    with monkeypatch.context() as broken:
        if words == "there is not enough memory":
            broken.setattr("luthier.verbs.train.train", no_memory)
        done = luthier(*argv)
    assert done.code == 2
    assert words in done.err
    fix = done.err.strip().splitlines()[-1].removeprefix("  fix: ")
    for placeholder, value in placeholders.items():
        fix = fix.replace(placeholder, value.format(**places))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))  # a conversation that ends at once
    again = luthier(*typed(argv, fix))
    assert again.code == 0, (fix, typed(argv, fix), again.err)


def no_memory(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
