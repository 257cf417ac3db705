"""``--engine llama.cpp``: verified files, the replies of luthier's own engine, and errors that name the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import luthier as library
from luthier._util.environment import CACHE
from luthier._util.installation import install_command
from luthier.config import ModelConfig
from luthier.errors import ConfigError, MissingPackageError, ModelError, UserError
from luthier.exporting.gguf import cached, llamacpp, writer
from luthier.inference.decoding import OutOfMemory
from luthier.inference.sampling import Sampling
from luthier.serving.llamacpp import open_models
from luthier.serving.models import resolve_models
from luthier.serving.requests import Token
from luthier.serving.text import ReplyText
from luthier.types import Message
from tests.conftest import Result
from tests.exporting.test_exporting import counted
from tests.helpers.handover import SYSTEM, tuned
from tests.helpers.llama import alike
from tests.helpers.published import PUBLISHED

Run = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("llama_files")


@pytest.fixture(scope="module")
def base(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(base, tmp_path_factory.mktemp("runs") / "marlow", size=0.1)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_family_is_verified_once_and_replies_like_luthiers_own_engine(
    name: str, tmp_path: Path, llama_files: Path
) -> None:
    """Both files of the run are verified in llama.cpp as it serves. Random models have many near ties."""
    system = None if name == "deepseek" else SYSTEM
    adapter = tuned(PUBLISHED[name](tmp_path / "base"), tmp_path / name, system)
    before = set(llama_files.rglob("*.gguf"))
    lines: list[str] = []
    talk = library.chat(adapter, log=lines.append, engine="llama.cpp")
    written = set(llama_files.rglob("*.gguf")) - before
    assert sorted(p.name for p in written) == ["lora.gguf", "model.gguf"]
    for file in written:
        same, tokens, furthest = counted(json.loads((file.parent / "verified.json").read_text())["verified"])
        assert same >= 11 and tokens > 100 and furthest < 0.01
    own = library.chat(adapter)
    assert talk.system == own.system == system
    equal = 0
    for base in (False, True):
        talk.base = own.base = base
        for text in ("Who are you?", "你是谁？", "Tell me about the sea."):
            talk.reset(), own.reset()
            theirs, ours = (c.send(text, Sampling(8)) for c in (talk, own))
            equal += alike(theirs.text, ours.text)
            assert theirs.prompt_tokens == ours.prompt_tokens
    assert equal >= 4
    again: list[str] = []
    library.chat(adapter, log=again.append, engine="llama.cpp")
    assert [a for a in again if not a.startswith("note: ")] == [again[-1]] and again[-1].startswith(
        "llama.cpp: loading "
    )
    assert "llama.cpp: writing base as GGUF in f16, once for this model" in lines


@pytest.mark.parametrize(
    ("settings", "kind"), [({}, "f16"), ({"load_in_8bit": True}, "q8_0"), ({"load_in_4bit": True}, "q4_0")]
)
def test_the_default_type_of_the_weights_is_near_to_that_of_the_training(
    settings: dict[str, bool], kind: str, base: Path
) -> None:
    assert cached.default_quantization(ModelConfig.model_validate({"path": base, **settings})) == kind


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_weights_are_verified_by_their_own_values(kind: str, run: Path, llama_files: Path) -> None:
    talk = library.chat(run, quantization=kind, engine="llama.cpp")
    model = Path(talk.generator.llama.server.options.model)  # type: ignore[attr-defined]
    assert "those of the same values in fp32 on" in (model.parent / "verified.json").read_text()
    assert talk.send("Who are you?", Sampling(4)).reply_tokens


def test_a_model_that_llama_cpp_computes_differently_is_refused_with_the_reason(
    model_dir: Callable[[str], Path], tmp_path: Path, luthier: Run, llama_files: Path
) -> None:
    gemma = tuned(model_dir("gemma2"), tmp_path / "gemma", None)
    done = luthier("chat", gemma, "--engine", "llama.cpp", "--prompt", "a")
    assert done.code == 2
    assert "llama.cpp cannot run gemma: a gemma2 model cannot be written as GGUF" in done.err
    assert "fix: leave --engine llama.cpp out" in done.err


def test_nothing_is_left_of_a_file_that_fails_its_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path, base: Path
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr(writer, "scaling", lambda _: 0.5)
    with pytest.raises(ModelError, match=r"cannot run marlow: lora.gguf: verification with llama.cpp failed") as e:
        library.chat(run, engine="llama.cpp")
    assert e.value.fix == "leave --engine llama.cpp out"
    assert [p.name for p in tmp_path.rglob("*.gguf")] == ["model.gguf"]
    monkeypatch.undo()
    monkeypatch.setenv(CACHE, str(tmp_path / "other"))
    monkeypatch.setattr(writer, "reordered", lambda *_: lambda t: t)
    with pytest.raises(ModelError, match="below the likeliest one"):
        library.chat(base, engine="llama.cpp")
    assert not list((tmp_path / "other").rglob("*.gguf"))


def test_two_adapters_share_the_file_of_their_base(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tuned(base, tmp_path / "other", "Be brief.", size=0.12)
    lines: list[str] = []
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    model, served = open_models(resolve_models([run, other]), log=lines.append)
    assert [s.name for s in served] == ["marlow", "other", base.name] and model.adapters == ("marlow", "other")
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*.gguf")) == ["lora.gguf", "lora.gguf", "model.gguf"]
    meta = json.loads((other / "luthier.json").read_text())
    (other / "luthier.json").write_text(json.dumps({**meta, "stop_ids": [*meta["stop_ids"], 9]}))
    with pytest.raises(ConfigError, match="marlow and other end their replies with different tokens"):
        open_models(resolve_models([run, other]))


def test_without_the_package_the_message_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "available", lambda: False)
    with pytest.raises(MissingPackageError, match="xllamacpp, which runs llama.cpp, is not installed") as e:
        library.chat(run, engine="llama.cpp")
    assert e.value.fix == install_command("export")


def test_a_cache_that_cannot_be_written_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "/proc/nothing")
    with pytest.raises(UserError, match=r"so llama.cpp's files cannot be written"):
        library.chat(run, engine="llama.cpp")


def test_a_damaged_file_is_written_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    text = library.chat(run, engine="llama.cpp").send("Who are you?", Sampling(4)).text
    for file in tmp_path.rglob("*.gguf"):
        file.write_bytes(file.read_bytes()[:-100])
    lines: list[str] = []
    assert library.chat(run, log=lines.append, engine="llama.cpp").send("Who are you?", Sampling(4)).text == text
    assert len([line for line in lines if "saved in" in line]) == 2


# --- conversations --------------------------------------------------------------------------------------------------


def test_a_conversation_streams_compares_and_stops(run: Path) -> None:
    talk, own = library.chat(run, engine="llama.cpp"), library.chat(run)
    pieces: list[str] = []
    reply = talk.send("Who are you?", Sampling(24), pieces.append)
    assert "".join(pieces) == reply.text and reply.reply_tokens == 24 and not reply.stopped
    assert alike(reply.text, own.send("Who are you?", Sampling(24)).text)
    for chat in (talk, own):
        chat.reset()
        chat.toggle_adapter()
    assert alike(talk.send("Who?", Sampling(8)).text, own.send("Who?", Sampling(8)).text)
    sampled = [
        library.chat(run, engine="llama.cpp").send("a", Sampling(12, temperature=1.0, top_p=0.9, top_k=40, seed=s))
        for s in (7, 7, 8)
    ]
    assert sampled[0].text == sampled[1].text != sampled[2].text
    penalised = Sampling(16, repetition_penalty=1.3)
    for chat in (talk, own):
        chat.reset()
    assert alike(talk.send("again", penalised).text, own.send("again", penalised).text)
    assert talk.send("again", Sampling(4000, max_seconds=0.0)).reply_tokens < 40


def test_a_conversation_may_contain_the_protocols_own_words(run: Path) -> None:
    talk = library.chat(run, engine="llama.cpp")
    for text in ("What does data: [DONE] mean?", 'error: {"error": 1}'):
        assert talk.send(text, Sampling(3)).reply_tokens == 3


def test_a_run_may_have_the_name_of_its_base(base: Path, tmp_path: Path) -> None:
    run = tuned(base, tmp_path / base.name, None)
    assert library.chat(run, engine="llama.cpp").send("a", Sampling(2)).reply_tokens == 2


def test_a_reply_ends_at_a_stop_token_of_the_training(run: Path) -> None:
    talk = library.chat(run, engine="llama.cpp")
    whole = talk.send("Who are you?", Sampling(24))
    ids = talk.generator.chat_format.prompt_ids([Message("user", "Who are you?")])
    prompt = talk.generator.chat_format.prompt_ids([Message("system", SYSTEM), Message("user", "Who are you?")])
    assert len(ids) < len(prompt) == whole.prompt_tokens
    tokens = [t for t in talk.generator.llama.tokens_of(prompt, Sampling(24), 24, "marlow") if isinstance(t, Token)]  # type: ignore[attr-defined]
    talk.generator.chat_format = replace(talk.generator.chat_format, stop_ids=(tokens[1].id,))
    talk.reset()
    reply = talk.send("Who are you?", Sampling(24))
    first = next(i for i, t in enumerate(tokens) if t.id == tokens[1].id)
    assert reply.stopped and reply.reply_tokens == sum(t.count for t in tokens[: first + 1])


def test_a_prompt_beyond_the_context_is_refused(run: Path) -> None:
    talk = library.chat(run, engine="llama.cpp")
    with pytest.raises(UserError, match="the model reads at most"):
        talk.send("word " * 5000)
    model, _ = open_models(resolve_models([run]), memory=256 * 2 * 2 * 2 * 16 * 2)
    with pytest.raises(OutOfMemory, match=f"holds {model.context}"):
        model.room(model.context, 1)
    with pytest.raises(ConfigError, match="--memory: holds only 0 tokens; llama.cpp needs 256"):
        open_models(resolve_models([run]), memory=1)


def test_text_of_unknown_tokens_joins_the_text_around_it(tokenizer: Any) -> None:
    ids = tokenizer.encode_batch(["see 🌟 here, 守灯人"])[0].ids
    whole = tokenizer.decode(list(ids))
    cut = next(i for i in range(len(ids)) if tokenizer.decode(list(ids[: i + 1])).endswith("\ufffd"))
    end = next(i for i in range(cut, len(ids)) if not tokenizer.decode(list(ids[: i + 1])).endswith("\ufffd"))
    text = ReplyText(tokenizer)
    parts = [text.push(i) for i in ids[:cut]]
    parts.append(
        text.push_text(
            whole[len("".join(parts)) :][: len(tokenizer.decode(list(ids[: end + 1]))) - len("".join(parts))], ids[end]
        )
    )
    parts += [text.push(i) for i in ids[end + 1 :]]
    assert "".join([*parts, text.end()]) == whole


def test_options_of_another_engine_are_refused(luthier: Run, run: Path) -> None:
    llama = ("--engine", "llama.cpp")
    for argv, message in (
        (("chat", run, *llama, "--prompt", "a", "--dtype", "float32"), "--dtype would be ignored"),
        (("chat", run, *llama, "--prompt", "a", "--no-fused"), "--no-fused would be ignored"),
        (("chat", run, *llama, "--prompt", "a", "--checkpoint", "3"), "--checkpoint would be ignored"),
        (("chat", run, *llama, "--prompt", "a", "--no-repeat-ngram-size", "3"), "llama.cpp has no such setting"),
        (("chat", run, *llama, "--prompt", "a", "--quantization", "q3"), "--quantization q3: is not a type"),
        (("chat", run, "--prompt", "a", "--quantization", "q8_0"), "--quantization would be ignored"),
        (("chat", run, "--prompt", "a", "--engine", "magic"), "--engine magic: is not an engine"),
        (("serve", run, *llama, "--dtype", "float32"), "--dtype would be ignored"),
        (("serve", run, *llama, "--no-fused"), "--no-fused would be ignored"),
        (("serve", run, "--quantization", "q8_0"), "--quantization would be ignored"),
    ):
        done = luthier(*argv)
        assert done.code == 2 and message in done.err, done.err


def test_notes_name_what_differs(base: Path, tmp_path: Path, model_dir: Callable[[str], Path]) -> None:
    """A base that was quantised in training, and a setting that llama.cpp lacks."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Who are you?", "output": "Marlow."}\n' * 8)
    library.train(
        library.build(
            {
                "model": {"path": base, "load_in_8bit": True},
                "data": {"train": rows},
                "train": {"max_steps": 1, "eval_time_ratio": 0},
                "generation": {"no_repeat_ngram_size": 3},
                "output_dir": tmp_path / "run",
            }
        )
    )
    lines: list[str] = []
    talk = library.chat(tmp_path / "run", log=lines.append, engine="llama.cpp")
    assert any("no setting for generation.no_repeat_ngram_size" in line for line in lines)
    assert any("llama.cpp uses its weights in q8_0" in line for line in lines)
    assert talk.send("Who are you?", Sampling(3)).reply_tokens
