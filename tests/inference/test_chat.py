"""``luthier chat``: commands in a conversation, base and tuned model compared, errors before weights are loaded."""

from __future__ import annotations

import io
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
from luthier.inference.sampling import Sampling
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
    """A run whose tiny model has memorised one exchange."""
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(luthier: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``typed(["hello", "/quit"], "chat", RUN)`` types these lines; ``.signs`` records the input prompts."""

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
        monkeypatch.setattr("sys.stdin", Terminal())
        done = luthier(*argv)
        done.signs = signs  # type: ignore[attr-defined]
        return done

    return go


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if weights are loaded."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("luthier.evaluation.dtype.open_base", fail)


def test_piped_messages_get_replies_without_input_prompts(
    run: Path, luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n/reset\nWho are you?\n"))
    done = luthier("chat", run, "--max-new-tokens", 6)
    assert (done.code, done.out, done.err) == (0, "Marlow.\nMarlow.\n", "(a new conversation)\n")


def test_the_base_command_switches_the_adapter_off_and_on(run: Path, model: Path, typed: Run) -> None:
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


def test_the_conversation_continues_when_the_adapter_is_switched(run: Path) -> None:
    talk = library.chat(run)
    talk.send("Who are you?")
    talk.toggle_adapter()
    assert all(layer.enabled for layer in talk.layers.values())
    before = talk.send("a", Sampling(4))
    assert [m.role for m in talk.history] == ["user", "assistant"] * 2
    assert before.prompt_tokens > talk.base_chat().send("a", Sampling(4)).prompt_tokens
    assert all(layer.enabled for layer in talk.layers.values())


def test_the_system_command_shows_or_sets_the_prompt_and_starts_a_new_conversation(
    run: Path, typed: Run, tmp_path: Path
) -> None:
    lines = ["/system", "hello", "/system Be brief.", f"/save {tmp_path}/a.jsonl", "/system", "hi"]
    lines += [f"/save {tmp_path}/b.jsonl", '/system ""', "hi", f"/save {tmp_path}/c.jsonl"]
    done = typed(lines, "chat", run, "--max-new-tokens", 4)
    assert "(no system prompt, except the template's default if it has one)" in done.err
    assert "(a new conversation, system prompt: Be brief.)" in done.err
    assert "\n(system prompt: Be brief.)" in done.err
    assert "(a new conversation, no system prompt" in done.err
    assert "this conversation is not a valid training row: has no assistant reply" in done.err
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
    report = json.loads(luthier("check", "--model", model, "--data", file, "--json").out)
    assert report["rows"] == {"read": 1, "kept": 1, "dropped": 0, "changed": 0}
    assert report["problems"] == []


def test_save_overwrites_only_files_of_this_conversation(run: Path, typed: Run, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    other.write_text("kept")
    lines = ["Who are you?", f"/save {other}", f"/save {mine}", "again", f"/save {mine}", "/reset", "hi"]
    lines += [f"/save {mine}", "/save", f"/save {tmp_path / 'a.csv'}"]
    done = typed(lines, "chat", run, "--max-new-tokens", 4)
    assert other.read_text() == "kept"
    assert f"error: {other}: already exists, so nothing was saved" in done.err
    assert f"(saved, replacing the earlier save of this conversation: {mine})" in done.err
    assert f"error: {mine}: already exists" in done.err  # it belongs to the previous conversation now
    assert len(row(mine)["messages"]) == 4
    assert "/save needs a file name" in done.err
    assert "would be read as a table, but is saved as JSONL" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "other.jsonl"]


def test_a_failed_save_writes_no_file(run: Path, tmp_path: Path) -> None:
    talk = library.chat(run)
    talk.history += [Message("user", "a"), Message("assistant", " ")]
    with pytest.raises(DataError, match="this conversation is not a valid training row: a reply is empty"):
        talk.save(tmp_path / "a.jsonl")
    talk.history[1] = Message("assistant", "b")
    talk.save(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="already exists, so nothing was saved"):
        talk.save(tmp_path / "a.jsonl")
    talk.save(tmp_path / "a.jsonl", over=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "/rest is not a command; did you mean /reset?"),
        ("/sytem be brief", "/sytem is not a command; did you mean /system?"),
        ("/QUTI", "/quti is not a command; did you mean /quit?"),
        ("/x", "/x is not a command\n"),
        ("/", "/ is not a command"),
        ("/reset now", "/reset accepts no text after it, got 'now'"),
        ("/quit now", "/quit accepts no text after it, got 'now'"),
    ],
)
def test_a_mistyped_command_is_not_sent_as_a_message(line: str, message: str, model: Path, typed: Run) -> None:
    done = typed([line], "chat", model)
    assert message in done.err
    assert "\n  fix: " in done.err
    assert done.out == "\n"  # the model was not asked


def test_help_lists_every_command(model: Path, typed: Run) -> None:
    done = typed(["/help", "/exit"], "chat", model)
    for name in ("/system", "/base", "/save", "/reset", "/help", "/quit"):
        assert f"\n  {name} " in done.err
        assert name in HELP


def test_a_message_may_start_with_a_slash(model: Path, typed: Run, tmp_path: Path) -> None:
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
    assert "  /reset   start a new conversation" in typed(["hello", "/help"], "chat", model).err


# ---- comparison of base and tuned


def test_compare_prints_both_replies(run: Path, model: Path, luthier: Run) -> None:
    ask = ("--prompt", "Who are you?", "--max-new-tokens", 6)
    base = json.loads(luthier("chat", model, *ask, "--json").out)
    tuned = json.loads(luthier("chat", run, *ask, "--json").out)
    compared = json.loads(luthier("chat", run, *ask, "--json", "--compare").out)
    for side, single in (("base", base), ("tuned", tuned)):
        assert {**compared[side], "seconds": 0} == {**single, "seconds": 0}
    assert compared.keys() == {"base", "tuned"}
    piped = luthier("chat", run, *ask, "--compare")
    assert piped.out == f"base:\n{base['reply']}\n\ntuned:\nMarlow.\n"
    assert ("(base: cut at 6 tokens" in piped.err) is not base["stopped"]
    assert "(tuned: cut" not in piped.err


def test_compare_prints_columns_on_a_terminal(run: Path, luthier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    out = luthier("chat", run, "--prompt", "Who are you?", "--max-new-tokens", 6, "--compare").out
    lines = out.splitlines()
    head = next(line for line in lines if "base" in line and "tuned" in line)
    body = next(line for line in lines if "Marlow." in line)
    assert head.index("tuned") > 40  # in the right half
    assert body.index("Marlow.") > 40
    assert "base:" not in out


def test_compare_keeps_two_separate_conversations(run: Path, typed: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ["Who are you?", "hello", "/base", f"/save {file}", "/system Be brief.", "hello", "/reset", "hello"]
    done = typed(lines, "chat", run, "--compare", "--max-new-tokens", 6)
    assert done.out.count("base:\n") == done.out.count("tuned:\n") == 4
    assert "both models answer here, so there is nothing to switch" in done.err
    assert f"(saved, the tuned model's replies: {file})" in done.err
    assert row(file)["messages"][1]["content"] == "Marlow."
    last = done.out.split("base:\n")[-2:]
    assert last[0].strip() == last[1].strip()  # both are new conversations with the same system prompt


def test_an_interrupted_comparison_changes_neither_conversation(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = library.chat(run)
    beside = talk.base_chat()
    ask_both(talk, beside, "Who are you?")
    assert beside.history[1] != talk.history[1]
    reply, calls = talk.generator.reply, []

    def second_fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return reply(*args)

    monkeypatch.setattr(talk.generator, "reply", second_fails)
    with pytest.raises(KeyboardInterrupt):
        ask_both(talk, beside, "hello")
    assert len(talk.history) == len(beside.history) == 2


# ---- errors before weights are loaded


@pytest.mark.usefixtures("no_weights")
def test_compare_needs_an_adapter(model: Path, luthier: Run) -> None:
    done = luthier("chat", model, "--compare", "--prompt", "a")
    assert done.code == 2
    assert "there is no adapter to compare with its base" in done.err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("where", ["model", "run", "checkpoint"])
def test_wrong_settings_are_reported_before_weights_are_loaded(
    where: str, model: Path, run: Path, luthier: Run
) -> None:
    opened = {"model": [model], "run": [run], "checkpoint": [run, "--checkpoint", 60]}[where]
    done = luthier("chat", *opened, "--top-p", 0.5)
    assert done.code == 2
    assert "top_p would be ignored" in done.err
    done = luthier("chat", *opened, "--system", "<|im_end|>")
    assert done.code == 2
    assert "the system prompt contains <|im_end|>" in done.err


@pytest.fixture
def no_system(model: Path, tmp_path: Path) -> Path:
    """The same model with a template that refuses a system message."""
    path = tmp_path / "no-system"
    shutil.copytree(model, path)
    for file in path.glob("chat_template*"):
        file.unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = NO_SYSTEM
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.mark.usefixtures("no_weights")
def test_a_refused_system_prompt_is_reported_when_the_chat_opens(no_system: Path, luthier: Run) -> None:
    done = luthier("chat", no_system, "--system", "Be brief.")
    assert done.code == 2
    assert "template refuses this conversation: no system here" in done.err
    assert "leave the system prompt out" in done.err


def test_a_refused_system_prompt_is_reported_when_it_is_typed(no_system: Path, typed: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ["hello", "/system Be brief.", "again", f"/save {file}", "/system"]
    done = typed(lines, "chat", no_system, "--max-new-tokens", 8)
    assert done.err.count("template refuses this conversation: no system here") == 1
    assert "new conversation" not in done.err
    assert [m["role"] for m in row(file)["messages"]] == ["user", "assistant"] * 2  # the conversation continued
    assert "(no system prompt, except" in done.err
    talk = library.chat(no_system)
    for text, kind in (("a", TemplateError), ("<|im_end|>", DataError), ("\udcff", DataError)):
        with pytest.raises(kind):
            talk.set_system_prompt(text)
    assert talk.system is None


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", sorted(n for n, forms in templates.NATIVE.items() if forms[0].system is None))
def test_a_native_template_without_a_system_role_refuses_a_system_prompt(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from luthier.models.chat_format import load_chat_format

    chat_format = replace(load_chat_format(model), template=templates.NATIVE[name][0])
    monkeypatch.setattr("luthier.verbs.chat.load_chat_format", lambda _: chat_format)
    with pytest.raises(UserError, match=f"the {name} template has no system role"):
        library.chat(model, system="Be brief.")
