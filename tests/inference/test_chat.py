"""``luthier chat``: what is typed in a conversation, base and tuned side by side, refusals before the model is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier as library
from luthier import config as configs
from luthier import templates
from luthier.cli.conversation import HELP, ask_both
from luthier.errors import ConfigError, DataError, TemplateError, UserError
from luthier.inference.generation import Sampling
from luthier.types import Message
from tests.conftest import Result

Run = Callable[..., Result]
ROW = '{"instruction": "Who are you?", "output": "Marlow."}\n'
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows one exchange by heart."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "rows.jsonl").write_text(ROW * 8)
    library.train(
        configs.build(
            {
                "model": {"path": model, "dtype": "float32"},
                "data": {"train": folder / "rows.jsonl"},
                "train": {"max_steps": 60, "learning_rate": 1e-2, "eval_time_ratio": 0},
                "output_dir": folder / "run",
            }
        )
    )
    return folder / "run"


@pytest.fixture
def typed(luthier: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``typed(["hello", "/quit"], "chat", RUN)``; the signs before each line are in ``.signs``."""

    def go(lines: list[str], *argv: object) -> Result:
        rest = iter(lines)
        signs: list[str] = []

        def line(sign: str) -> str:
            signs.append(sign)
            try:
                return next(rest)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", line)
        done = luthier(*argv)
        done.signs = signs  # type: ignore[attr-defined]
        return done

    return go


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are read fail the test."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr("luthier.verbs.chat.load_weights", fail)
    monkeypatch.setattr("luthier.verbs.chat.open_base", fail)


def test_base_switches_the_adapter_off_and_on(run: Path, model: Path, typed: Run) -> None:
    ask = "Who are you?"
    done = typed([ask, "/reset", "/base", ask, "/reset", "/base", ask], "chat", run, "--max-new-tokens", 6)
    base = library.chat(model).send(ask, Sampling(6)).text
    assert done.out == f"Marlow.\n{base}\nMarlow.\n\n"
    assert base != "Marlow."
    assert "(the base model answers)" in done.err
    assert "(the tuned model answers)" in done.err
    assert done.signs == ["> "] * 3 + ["base> "] * 3 + ["> "] * 2  # type: ignore[attr-defined]
    refused = typed(["/base"], "chat", model)
    assert refused.code == 0
    assert "error: this is a base model: there is no adapter to switch off" in refused.err


def test_the_conversation_goes_on_when_the_model_is_switched(run: Path) -> None:
    talk = library.chat(run)
    talk.send("Who are you?")
    talk.toggle()
    assert all(layer.enabled for layer in talk.layers.values())
    before = talk.send("a", Sampling(4))
    assert [m.role for m in talk.history] == ["user", "assistant"] * 2
    assert before.prompt_tokens > talk.beside().send("a", Sampling(4)).prompt_tokens
    assert all(layer.enabled for layer in talk.layers.values())


def test_system_shows_and_sets_and_starts_anew(run: Path, typed: Run, tmp_path: Path) -> None:
    lines = ["/system", "hello", "/system Be brief.", f"/save {tmp_path}/a.jsonl", "/system", "hi"]
    lines += [f"/save {tmp_path}/b.jsonl", '/system ""', "hi", f"/save {tmp_path}/c.jsonl"]
    done = typed(lines, "chat", run, "--max-new-tokens", 4)
    assert "(no system prompt but the template's own" in done.err
    assert "(a new conversation, system prompt: Be brief.)" in done.err
    assert "\n(system prompt: Be brief.)" in done.err
    assert "(a new conversation, no system prompt" in done.err
    assert "this would be no row to train on: has no reply by the assistant" in done.err
    assert not (tmp_path / "a.jsonl").exists()
    roles = {name: [m["role"] for m in row(tmp_path / f"{name}.jsonl")["messages"]] for name in "bc"}
    assert roles == {"b": ["system", "user", "assistant"], "c": ["user", "assistant"]}


def row(path: Path) -> dict[str, Any]:
    (line,) = path.read_text(encoding="utf-8").splitlines()
    return dict(json.loads(line))


def test_save_writes_a_row_that_training_reads(
    run: Path, model: Path, typed: Run, luthier: Run, tmp_path: Path
) -> None:
    file = tmp_path / "my talk.jsonl"
    done = typed(["Who are you?", "你好", f"/save {file}"], "chat", run, "--system", "守灯", "--max-new-tokens", 30)
    assert f"(saved: {file})" in done.err
    saved = row(file)["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert saved[0]["content"] == "守灯"
    assert saved[3]["content"] == "你好"
    assert "".join(f"{m['content']}\n" for m in saved if m["role"] == "assistant") + "\n" == done.out
    found = json.loads(luthier("check", "--model", model, "--data", file, "--json").out)
    assert found["rows"] == {"read": 1, "kept": 1, "dropped": 0, "changed": 0}
    assert found["problems"] == []


def test_save_overwrites_only_its_own_and_says_so(run: Path, typed: Run, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    other.write_text("kept")
    lines = ["Who are you?", f"/save {other}", f"/save {mine}", "again", f"/save {mine}", "/reset", "hi"]
    lines += [f"/save {mine}", "/save", f"/save {tmp_path / 'a.csv'}"]
    done = typed(lines, "chat", run, "--max-new-tokens", 4)
    assert other.read_text() == "kept"
    assert f"error: {other}: is there already, so nothing was saved" in done.err
    assert f"(saved again, over what this conversation saved there: {mine})" in done.err
    assert f"error: {mine}: is there already" in done.err  # another conversation's by now
    assert len(row(mine)["messages"]) == 4
    assert "/save needs the name of a file" in done.err
    assert "would be read as a table, but holds JSONL" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "other.jsonl"]


def test_a_refusal_to_save_leaves_no_file(run: Path, tmp_path: Path) -> None:
    talk = library.chat(run)
    talk.history += [Message("user", "a"), Message("assistant", " ")]
    with pytest.raises(DataError, match="this would be no row to train on: a reply is empty"):
        talk.save(tmp_path / "a.jsonl")
    talk.history[1] = Message("assistant", "b")
    talk.save(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="is there already"):
        talk.save(tmp_path / "a.jsonl")
    talk.save(tmp_path / "a.jsonl", over=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rest", "/rest is not a command; did you mean /reset?"),
        ("/sytem be brief", "/sytem is not a command; did you mean /system?"),
        ("/QUTI", "/quti is not a command; did you mean /quit?"),
        ("/x", "/x is not a command\n"),
        ("/", "/ is not a command"),
        ("/reset now", "/reset takes nothing after it, got 'now'"),
        ("/quit now", "/quit takes nothing after it, got 'now'"),
    ],
)
def test_a_mistyped_command_is_no_message(line: str, said: str, model: Path, typed: Run) -> None:
    done = typed([line], "chat", model)
    assert said in done.err
    assert "\n  fix: " in done.err
    assert done.out == "\n"  # nothing was asked


def test_help_lists_every_command(model: Path, typed: Run) -> None:
    done = typed(["/help", "/exit"], "chat", model)
    for name in ("/system", "/base", "/save", "/reset", "/help", "/quit"):
        assert f"\n  {name} " in done.err
        assert name in HELP


def test_a_message_may_begin_with_a_slash(model: Path, typed: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ["/etc/hosts holds what?", "//reset does what?", "a\n/b", f"/save {file}"]
    typed(lines, "chat", model, "--max-new-tokens", 8)
    asked = [m["content"] for m in row(file)["messages"] if m["role"] == "user"]
    assert asked == ["/etc/hosts holds what?", "/reset does what?", "a\n/b"]


def test_an_error_or_ctrl_c_does_not_end_the_conversation(
    model: Path, typed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = typed(["<|im_start|>", "word " * 2000, "hello"], "chat", model, "--max-new-tokens", 4)
    assert "a control token of this model" in done.err
    assert "tokens long; the model reads at most" in done.err
    assert "cut at 4 tokens" in done.err

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier.inference.generation.Generator.reply", interrupted)
    assert "  /reset   starts anew" in typed(["hello", "/help"], "chat", model).err


# ---- base and tuned


def test_compare_shows_both(run: Path, model: Path, luthier: Run) -> None:
    ask = ("--prompt", "Who are you?", "--max-new-tokens", 6)
    base = json.loads(luthier("chat", model, *ask, "--json").out)
    tuned = json.loads(luthier("chat", run, *ask, "--json").out)
    found = json.loads(luthier("chat", run, *ask, "--json", "--compare").out)
    for side, alone in (("base", base), ("tuned", tuned)):
        assert {**found[side], "seconds": 0} == {**alone, "seconds": 0}
    assert found.keys() == {"base", "tuned"}
    piped = luthier("chat", run, *ask, "--compare")
    assert piped.out == f"base:\n{base['reply']}\n\ntuned:\nMarlow.\n"
    assert ("(base: cut at 6 tokens" in piped.err) is not base["stopped"]
    assert "(tuned: cut" not in piped.err


def test_compare_in_columns_on_a_terminal(run: Path, luthier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    out = luthier("chat", run, "--prompt", "Who are you?", "--max-new-tokens", 6, "--compare").out
    lines = out.splitlines()
    head = next(line for line in lines if "base" in line and "tuned" in line)
    body = next(line for line in lines if "Marlow." in line)
    assert head.index("tuned") > 40  # beside it, in the other half
    assert body.index("Marlow.") > 40
    assert "base:" not in out


def test_compare_holds_two_conversations(run: Path, typed: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ["Who are you?", "hello", "/base", f"/save {file}", "/system Be brief.", "hello", "/reset", "hello"]
    done = typed(lines, "chat", run, "--compare", "--max-new-tokens", 6)
    assert done.out.count("base:\n") == done.out.count("tuned:\n") == 4
    assert "both models answer here, so there is nothing to switch" in done.err
    assert f"(saved, the tuned model's side: {file})" in done.err
    assert row(file)["messages"][1]["content"] == "Marlow."
    last = done.out.split("base:\n")[-2:]
    assert last[0].strip() == last[1].strip()  # under the same system prompt, both anew


def test_a_broken_off_pair_leaves_neither_ahead(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = library.chat(run)
    beside = talk.beside()
    ask_both(talk, beside, "Who are you?")
    assert beside.history[1] != talk.history[1]
    reply, calls = talk.generator.reply, []

    def second_fails(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return reply(*given)

    monkeypatch.setattr(talk.generator, "reply", second_fails)
    with pytest.raises(KeyboardInterrupt):
        ask_both(talk, beside, "hello")
    assert len(talk.history) == len(beside.history) == 2


# ---- what is refused before the model is read


@pytest.mark.usefixtures("unread")
def test_compare_needs_an_adapter(model: Path, luthier: Run) -> None:
    done = luthier("chat", model, "--compare", "--prompt", "a")
    assert done.code == 2
    assert "there is no adapter to compare with its base" in done.err


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("where", ["model", "run", "checkpoint"])
def test_settings_that_would_be_ignored_are_said_before_the_model_is_read(
    where: str, model: Path, run: Path, luthier: Run
) -> None:
    place = {"model": [model], "run": [run], "checkpoint": [run, "--checkpoint", 60]}[where]
    done = luthier("chat", *place, "--top-p", 0.5)
    assert done.code == 2
    assert "top_p would be ignored" in done.err
    done = luthier("chat", *place, "--system", "<|im_end|>")
    assert done.code == 2
    assert "the system prompt holds <|im_end|>" in done.err


@pytest.fixture
def silent(model: Path, tmp_path: Path) -> Path:
    """The same model with a template that refuses a system message."""
    path = tmp_path / "silent"
    shutil.copytree(model, path)
    for file in path.glob("chat_template*"):
        file.unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = NO_SYSTEM
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.mark.usefixtures("unread")
def test_a_refused_system_prompt_is_said_when_the_chat_opens(silent: Path, luthier: Run) -> None:
    done = luthier("chat", silent, "--system", "Be brief.")
    assert done.code == 2
    assert "template refuses this conversation: no system here" in done.err
    assert "leave the system prompt out" in done.err


def test_a_refused_system_prompt_is_said_when_it_is_typed(silent: Path, typed: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ["hello", "/system Be brief.", "again", f"/save {file}", "/system"]
    done = typed(lines, "chat", silent, "--max-new-tokens", 8)
    assert done.err.count("template refuses this conversation: no system here") == 1
    assert "new conversation" not in done.err
    assert [m["role"] for m in row(file)["messages"]] == ["user", "assistant"] * 2  # it went on
    assert "(no system prompt but" in done.err
    talk = library.chat(silent)
    for text, kind in (("a", TemplateError), ("<|im_end|>", DataError), ("\udcff", DataError)):
        with pytest.raises(kind):
            talk.instruct(text)
    assert talk.system is None


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", sorted(n for n, forms in templates.NATIVE.items() if forms[0].system is None))
def test_a_native_template_without_a_system_role_says_so(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from luthier.models.chat_format import load_chat_format

    found = replace(load_chat_format(model), template=templates.NATIVE[name][0])
    monkeypatch.setattr("luthier.verbs.chat.load_chat_format", lambda _: found)
    with pytest.raises(UserError, match=f"the {name} template has no system role"):
        library.chat(model, system="Be brief.")
