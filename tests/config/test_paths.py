"""Paths as users type them: ``~`` is the home directory in every setting, option and argument."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import luthier as library
from luthier import config as configs
from luthier.errors import ConfigError, UserError
from tests.conftest import Result

Run = Callable[..., Result]
ROW = '{"instruction": "a", "output": "b"}\n'
SETTINGS = ["train.max_steps=1", "train.eval_time_ratio=0", "data.max_length=64", "model.dtype=float32"]


@pytest.fixture
def home(model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a home directory with a model and rows, and work in another directory."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(model_dir("llama"), home / "model")
    (home / "rows.jsonl").write_text(ROW * 4)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return home


def test_every_path_of_a_configuration_is_expanded(home: Path) -> None:
    paths = [
        "model.path=~/model",
        "data.train=[~/a/*.jsonl, b.jsonl]",
        "data.eval=~/held-out.jsonl",
        "output_dir=~/run",
    ]
    config = configs.build({}, settings=paths)
    assert config.model.path == home / "model"
    assert config.data.train == (home / "a" / "*.jsonl", Path("b.jsonl"))
    assert config.data.eval == (home / "held-out.jsonl",)
    assert config.output_dir == home / "run"
    literal = configs.build({"model": {"path": "/a/~/m"}, "data": {"train": "a~b"}})
    assert (literal.model.path, literal.data.train) == (Path("/a/~/m"), (Path("a~b"),))
    assert library.recipe("yi-6b-chat", "~/model", "~/rows.jsonl", "~/run").output_dir == home / "run"
    with pytest.raises(ConfigError, match=r"model.path: ~nobody-here/m: the home directory is unknown"):
        configs.build({"model": {"path": "~nobody-here/m"}, "data": {"train": "a"}})


def test_commands_expand_their_paths_and_print_them_expanded(luthier: Run, home: Path) -> None:
    common = ["--model", "~/model", "--data", "~/rows.jsonl", "--output-dir", "~/run"]
    done = luthier("init", *common, "--to", "~/run.yaml")
    assert done.code == 0, done.err
    assert f"wrote {home / 'run.yaml'}; review it, then run: luthier train {home / 'run.yaml'}" in done.out
    text = (home / "run.yaml").read_text(encoding="utf-8")
    assert f'"{home / "model"}"' in text and f'"{home / "rows.jsonl"}"' in text and f'"{home / "run"}"' in text
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    done = luthier("train", "~/run.yaml", *settings)
    assert done.code == 0, done.err
    assert f"chat with it: luthier chat {home / 'run'}" in done.out
    assert luthier("train", *common, *settings).code in (0, 2)
    assert luthier("check", "--model", "~/model", "--data", "~/*.jsonl").code == 0
    short = ["--prompt", "a", "--max-new-tokens", "1"]
    assert luthier("chat", "~/run", *short).code == 0
    assert luthier("chat", "~/run", "--checkpoint", "1", *short).code == 0
    done = luthier("merge", "~/run", "--output-dir", "~/merged")
    assert done.code == 0, done.err
    assert f"luthier chat {home / 'merged'}" in done.out
    done = luthier("export", "--model", "~/model", "--adapter", "~/run/adapter", "--output-dir", "~/peft")
    assert done.out.startswith(f"{home / 'peft'}: adapter_config.json"), done.err
    (home / "held-out.csv").write_text("instruction,output\na,b\n")
    done = luthier("eval", "~/run", "--data", "~/held-out.csv", "--samples", "0", "--json")
    assert json.loads(done.out)["data"] == str(home / "run" / "eval-rows.jsonl")
    done = luthier("serve", "~/run", "--engine", "vllm", "--print")
    assert f"vllm serve {home / 'model'}" in done.out, done.err
    assert [*Path().iterdir()] == []


def test_functions_expand_their_paths(home: Path) -> None:
    chat = library.chat("~/model", sampling={"max_new_tokens": 1})
    chat.send("a")
    chat.save(Path("~/talk.jsonl"))
    assert (home / "talk.jsonl").is_file()
    assert library.load_model("~/model")[1] is not None
    with pytest.raises(UserError) as e:
        library.merge("~nobody-here/run")
    assert e.value.message == "~nobody-here/run: the home directory is unknown"
    assert e.value.fix == "write the whole path"
    assert [*Path().iterdir()] == []


def test_pull_expands_its_directory(luthier: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.hub.embedded.pull", lambda _, target, __: target)
    assert luthier("pull", "smollm2-135m", "--to", "~/pulled").out.strip() == str(home / "pulled")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize(
    "place", ["--model", "--data", "--output-dir", "a pattern", "run.yaml", "the current directory"]
)
def test_a_path_that_is_not_utf_8_is_refused_before_anything_starts(
    place: str, luthier: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / os.fsdecode(b"caf\xe9")
    paths = {"--model": home / "model", "--data": home / "rows.jsonl", "--output-dir": tmp_path / "run"}
    argv: list[object] = ["train"]
    if place in paths:
        if paths[place].exists():
            paths[place].rename(bad)
        paths[place] = bad
    elif place == "a pattern":
        (tmp_path / "rows").mkdir()
        bad = tmp_path / "rows" / os.fsdecode(b"caf\xe9.jsonl")
        paths["--data"].rename(bad)
        paths["--data"] = tmp_path / "rows" / "*"
    elif place == "run.yaml":
        bad.write_text("data: {max_length: 64}\n")
        argv = ["train", bad]
    else:
        bad.mkdir()
        monkeypatch.chdir(bad)
        bad /= "run"
        paths["--output-dir"] = Path("run")
    argv += [word for pair in paths.items() for word in pair]
    before = sorted(map(str, tmp_path.rglob("*")))
    done = luthier(*argv, "--set", "train.max_steps=1")
    assert done.code == 2, done.err
    in_an_argument = place not in ("a pattern", "the current directory")
    reason = "contains bytes that are not text" if in_an_argument else "is not valid UTF-8"
    assert f"{tmp_path}" in done.err and reason in done.err and "Traceback" not in done.err
    assert str(bad).encode("utf-8", "backslashreplace").decode() in done.err
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    if place not in ("--output-dir", "the current directory"):
        assert luthier("check", *[w for w in argv[1:] if w not in ("--output-dir", paths["--output-dir"])]).code == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf_8_can_be_shown(home: Path) -> None:
    with pytest.raises(UserError) as e:
        library.chat(os.fsdecode(b"caf\xe9"))
    assert e.value.message == r"caf\udce9: is not valid UTF-8, so it cannot be recorded in a file"
    assert e.value.fix == "rename it"
