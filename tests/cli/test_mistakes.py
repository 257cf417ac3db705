"""Ordinary mistakes: exit code 2, no traceback, and typing what the message says makes the command work.

Each case: the command, a part of its message, and values for the placeholders in the fix.
"""

from __future__ import annotations

import errno
import gzip
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.cli.main import _explained
from tests.conftest import Result
from tests.helpers.handover import tuned
from tests.project.test_fixes import typed

Run = Callable[..., Result]
ROWS = '[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]'
LINES = '{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n'
CHECK = "check --model {model} --data rows.json"
TRAIN = "train --model {model} --data rows.json --set train.max_steps=1 --set train.eval_time_ratio=0"

Case = tuple[str, str, dict[str, str]]
FIXED: dict[str, Case] = {  # the fix is a command, a path, an option or a value
    "a typo in the path of the data": ("check --model {model} --data rows.jsn", "rows.jsn: does not exist", {}),
    "a typo in the stem of the data": ("check --model {model} --data rosw.json", "rosw.json: does not exist", {}),
    "a typo in the path of the model": ("check --model modle --data rows.json", "modle: does not exist", {}),
    "a typo in the path of the run": ("chat rum --prompt a --max-new-tokens 1", "rum: does not exist", {}),
    "a typo in the path of a run.yaml": ("check runn.yaml", "runn.yaml: cannot be read (No such file", {}),
    "a directory with a run.yaml": ("check settings", "settings: cannot be read (Is a directory)", {}),
    "a typo in a key": (f"{CHECK} --set train.learning_rat=1e-3", "train.learning_rat: unknown key", {}),
    "another tool's key": (f"{CHECK} --set train.lr=1e-3", "train.lr: unknown key", {}),
    "a typo in an option": (f"{CHECK} --shw 1", "No such option: --shw", {}),
    "a typo in a module": (f"{CHECK} --set lora.target_modules=q_poj", "'q_poj' is not a module", {}),
    "a typo in a model's name": ("pull smolm2-135m", "model 'smolm2-135m' is unknown", {}),
    "a typo in a choice": (f"{CHECK} --set data.format=alpca", "got 'alpca'", {}),
    "a typo in a recipe": ("check --recipe yi-6b --model {model} --data rows.json", "recipe 'yi-6b' is unknown", {}),
    "a typo in an export format": ("export run --to pefd --output-dir new", "--to pefd: is not a format", {}),
    "a typo in a key of the rows": ("check --model {model} --data key.json", "key 'instrution' is unknown", {}),
    "an unknown verb": ("chekc --model {model} --data rows.json", "No such command 'chekc'", {}),
    "text for a number": (f"{CHECK} --set lora.r=eight", "lora.r: input should be a valid integer", {}),
    "text for an option's number": (f"{CHECK} --show two", "Invalid value for '--show'", {}),
    "a setting without a value": (f"{CHECK} --set lora.r", "--set lora.r: has no '='", {"VALUE": "4"}),
    "a required option left out": ("merge run", "Missing option '--output-dir'", {}),
    "no output directory": (TRAIN, "output_dir: is missing", {"RUN": "new"}),
    "no data": ("check --model {model}", "data: is missing", {"FILE": "rows.json"}),
    "a model for the data": (
        "check --model {model} --data {model}",
        "is a model directory, not a data file",
        {"+": "--data rows.json"},
    ),
    "data for the model": (
        "check --model rows.json --data rows.json",
        "is a data file, not a model",
        {"+": "--model {model}"},
    ),
    "model and data exchanged": ("check --model rows.json --data {model}", "is a data file, not a model directory", {}),
    "data for a run.yaml": ("check rows.json", "is a data file, not a run.yaml", {"+": "--model {model}"}),
    "lines of data for a run.yaml": ("check rows.jsonl", "is a data file, not a run.yaml", {"+": "--model {model}"}),
    "a directory for the data": ("check --model {model} --data folder", "folder: is a directory", {}),
    "a base model to merge": ("merge {model} --output-dir new", "holds no adapter", {"BASE": "{model}", "DIR": "run"}),
    "an unknown checkpoint": (
        "chat {run} --checkpoint 7 --prompt a",
        "has no checkpoint 7",
        {"its checkpoints are:": "--checkpoint"},
    ),
}
TOLD: dict[str, tuple[str, str, str]] = {  # the fix is advice: the command, its message, and the advice
    "an unknown role": ("check --model {model} --data role.jsonl", "did you mean user?", "correct the rows"),
    "an empty file": ("check --model {model} --data empty.json", "empty.json: is empty", "choose a file with"),
    "a huge line": (
        "check --model {model} --data huge.json",
        "is neither JSON, JSONL, CSV, TSV nor Parquet",
        "write rows",
    ),
    "a binary file": ("check --model {model} --data binary.jsonl", "nor Parquet (it starts with", "write rows"),
    "a compressed file": ("check --model {model} --data rows.jsonl.gz", "is compressed (gzip)", "decompress it"),
    "compressed under another name": ("check --model {model} --data gz.jsonl", "is compressed (gzip)", "decompress it"),
    "the weights for the data": (
        "check --model {model} --data {model}/model.safetensors",
        "is neither JSON",
        "write rows",
    ),
    "a path below a file": ("check --model {model} --data rows.json/a", "rows.json/a: does not exist", "choose a JSON"),
    "a model below a file": ("check --model rows.json/a --data rows.json", "does not exist", "luthier pull"),
    "a file as the output directory": (f"{TRAIN} --output-dir rows.json", "cannot be used as a directory", "choose"),
    "an output directory below a file": (f"{TRAIN} --output-dir rows.json/new", "cannot be used as a dir", "choose"),
    "the model as the output directory": (f"{TRAIN} --output-dir {{model}}", "is a model directory", "choose another"),
    "a merge into a file": ("merge run --output-dir rows.json", "already exists", "choose another --output-dir"),
    "a merge below a file": ("merge run --output-dir rows.json/new", "cannot be used as a directory", "choose"),
    "a run.yaml over a directory": ("init --to folder", "folder: already exists", "choose another name with --to"),
    "a run.yaml below a file": (
        "init --to rows.json/run.yaml --output-dir runs/new",
        "cannot be used as a directory",
        "choose a directory",
    ),
    "YAML with a mistake": ("check broken.yaml", "broken.yaml: is not YAML", "correct the text"),
    "an empty output directory": (f"{TRAIN} --output-dir ''", "--output-dir: is empty", "write a value"),
    "an empty model": ("check --model= --data rows.json", "--model: is empty", "write a value"),
    "an empty argument": ("chat '' --prompt a", "an argument: is empty", "write a value"),
    "an option without its argument": (f"{CHECK} --show", "Error: Option '--show'", "requires an argument"),
    "text for a temperature": (
        "chat run --temperature hot",
        "Invalid value for '--temperature'",
        "luthier chat --help",
    ),
}


@pytest.fixture(scope="module")
def folder(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with a model, an adapter as ``run``, and files with mistakes."""
    path = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(model_dir("llama"), path / "model")
    tuned(path / "model", path / "run")
    (path / "rows.json").write_text(ROWS)
    (path / "rows.jsonl").write_text(LINES)
    (path / "key.json").write_text(ROWS.replace("instruction", "instrution"))
    (path / "role.jsonl").write_text(
        '{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (path / "empty.json").write_text("")
    (path / "huge.json").write_text("x" * 10_000_000)
    (path / "binary.jsonl").write_bytes(bytes(range(256)) * 100)
    for name in ("rows.jsonl.gz", "gz.jsonl"):
        (path / name).write_bytes(gzip.compress(LINES.encode()))
    (path / "folder").mkdir()
    shutil.copy(path / "rows.jsonl", path / "folder")
    (path / "run.yaml").write_text(f"model: {{path: {path / 'model'}}}\ndata: {{train: {path / 'rows.json'}}}\n")
    (path / "settings").mkdir()
    shutil.copy(path / "run.yaml", path / "settings")
    (path / "broken.yaml").write_text("model: {path: a\ndata: b\n")
    return path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    for name in ("new", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder


HINTS = (  # in a message: (pattern of what it says, which words to replace, by what)
    (r"No such option: (\S+) \(Possible options: .*?(--\w+)\)", 1, 2),
    (r"No such command '(\w+)'. Did you mean '(\w+)'", 1, 2),
    (r"error: (.+?): .*did you mean (\S+)\?$", 1, 2),
    (r"error: (.+?): .*\n  fix: name its files, e.g. (\S+)", 1, 2),
    (r"fix: write (\w+) for (\w+)", 2, 1),
    (r"error: (\S+): .*\n  fix: write ([a-z_.]+)$", 1, 2),
)


def retyped(argv: list[str], error: str) -> list[str]:
    """Apply the fix of an error, or the hint of a message about the command line, to the command."""
    for pattern, old, new in HINTS:
        if hint := re.search(pattern, error.strip(), re.DOTALL):
            return [re.sub(rf"(?<![\w/-]){re.escape(hint[old])}(?![\w.])", hint[new], word) for word in argv]
    if hint := re.search(r"Try '.*?luthier (.+)' for help", error):
        return shlex.split(hint[1])
    if moved := dict(re.findall(r"give it with (--\w+) ([^\s;]+)", error)):
        others = [word for word in argv if word not in (*moved, *moved.values(), "--model", "--data")]
        return [*others, *(word for pair in moved.items() for word in pair)]
    return typed(argv, error.rpartition("fix: ")[2].strip())


def words(command: str, folder: Path, run: Path) -> list[str]:
    return shlex.split(command.format(model=folder / "model", run=run))


@pytest.mark.parametrize("name", FIXED)
def test_a_mistake_is_corrected_by_typing_what_the_message_says(
    name: str, luthier: Run, here: Path, teahouse_run: Path, request: pytest.FixtureRequest
) -> None:
    command, message, values = FIXED[name]
    if command.startswith("pull"):
        request.getfixturevalue("smollm2")  # so that the model exists and nothing is downloaded
    argv = words(command, here, teahouse_run)
    done = luthier(*argv)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err, done.err
    error = done.err
    for placeholder, value in values.items():
        error = error.replace(placeholder, value.format(model=here / "model", run=teahouse_run))
    again = luthier(*retyped(argv, error), *(words(values["+"], here, teahouse_run) if "+" in values else ()))
    assert again.code == 0, (error, retyped(argv, error), again.err)


@pytest.mark.parametrize("name", TOLD)
def test_a_mistake_is_explained_with_advice(name: str, luthier: Run, here: Path, teahouse_run: Path) -> None:
    command, message, advice = TOLD[name]
    before = sorted(here.rglob("*"))
    done = luthier(*words(command, here, teahouse_run))
    assert done.code == 2 and message in done.err and "Traceback" not in done.err, done.err
    assert advice in done.err and len(done.err) < 2000
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("b.csv", "|"), ("c.csv", "\t"), ("d.tsv", ",")])
def test_a_table_with_another_delimiter_than_its_name_says_is_read(
    name: str, delimiter: str, luthier: Run, here: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("instruction,output\na,b\nc,d\n".replace(",", delimiter))
    done = luthier("check", "--model", here / "model", "--data", tmp_path / name)
    assert done.code == 0 and "2 read, 2 kept" in done.out


def test_an_adapter_may_be_named_by_its_run(luthier: Run, here: Path, teahouse_run: Path) -> None:
    for adapter in (teahouse_run, teahouse_run / "adapter"):
        done = luthier("chat", "--model", "model", "--adapter", adapter, "--prompt", "a", "--max-new-tokens", 1)
        assert done.code == 0, done.err


def test_an_output_that_cannot_be_written_is_explained() -> None:
    explained = _explained(OSError(errno.ENOSPC, "No space left on device"))
    assert explained and explained.message.startswith("the output cannot be written: there is not enough disk space")
    assert (
        explained.fix.startswith("free some disk space")
        and _explained(OSError(errno.EIO, "Input/output error")) is None
    )
