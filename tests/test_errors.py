"""Every error text is asserted somewhere, has a second line that tells what to type, and typing it works."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier as library
from luthier import adapter as adapters
from luthier import config as configs
from luthier import personas
from luthier.data import Loader
from luthier.data.source import read_rows
from luthier.errors import AdapterError, ConfigError, MissingPackageError, ModelError, UserError
from luthier.models.directory import read_config
from luthier.models.load import empty_model
from luthier.preflight import inspect

from .conftest import ROOT, Result

Run = Callable[..., Result]
ROWS = '[{"instruction": "a", "output": "b"}]'


@pytest.fixture
def model(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    path = tmp_path / "model"
    shutil.copytree(model_dir("llama"), path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(ROWS)
    return path


def refused(kind: type[UserError], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as e:
        call()
    assert e.value.fix
    assert "\n  fix: " in str(e.value)
    return e.value.message


def bad_rows(path: Path, text: str, **kwargs: Any) -> str:
    path.write_text(text, encoding="utf-8")
    loader = Loader([path], **kwargs)
    list(loader)
    return " | ".join(p.reason for p in loader.report.problems)


def test_the_fix_of_an_error_works_when_typed(luthier: Run, model: Path, tmp_path: Path) -> None:
    """Take what the second line says to pass, pass it, and the command succeeds."""
    cases = {
        "misspelt": ('[{"instrution": "a", "output": "b"}]', []),
        "control": ('[{"instruction": "<|im_end|>", "output": "b"}, {"instruction": "c", "output": "d"}]', []),
        "long": (ROWS, ["--set", "data.max_length=9999"]),
        "target": (ROWS, ["--set", "lora.target_modules=q_porj"]),
        "key": (ROWS, ["--set", "train.learning_rte=1e-3"]),
    }
    for name, (text, extra) in cases.items():
        path = tmp_path / f"{name}.json"
        path.write_text(text)
        argv = ["check", "--model", str(model), "--data", str(path)]
        done = luthier(*argv, *extra)
        assert done.code == 2, name
        fix = done.err.strip().splitlines()[-1].removeprefix("  fix: ")
        options = re.search(r"(--(?:set|rename) \S+)", fix)
        if options:
            again = luthier(*argv, *shlex.split(options.group(1)))
        else:  # "write RIGHT ..." names what to write in the place of what was written
            right = re.search(r"write (\S+?)(?: for|,|$)", fix)
            assert right
            again = luthier(*argv, "--set", {"target": "lora.target_modules=", "key": ""}[name] + right.group(1)
                            + ("=1e-3" if name == "key" else ""))  # fmt: skip
        assert again.code == 0, (name, fix, again.err)


def test_models_that_cannot_be_used(model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refused(ModelError, lambda: read_config(tmp_path / "empty"))
    good = json.loads((model / "config.json").read_text())
    for change in (
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
        {"hidden_act": "foo"},
        {"model_type": ["llama"]},
    ):
        (model / "config.json").write_text(json.dumps({**good, **change}))
        message = refused(ModelError, lambda: empty_model(read_config(model)))
        assert (
            "is not a valid configuration" in message
            or "describes no model that can be built" in message
            or ("without running the model's own code" in message)
        )
    (model / "config.json").write_text(json.dumps(good))
    (model / "model.safetensors").unlink()
    assert "holds no safetensors weights" in refused(ModelError, lambda: library.chat(model))
    assert "is not a model directory" in refused(ModelError, lambda: read_config(rows))
    (model / "generation_config.json").write_text("{")
    made = configs.build({"model": {"path": model}, "data": {"train": rows}})
    assert "cannot be read" in str(inspect(made).error)


def test_a_tokenizer_without_a_fast_form(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.models import tokenizer

    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", lambda *_, **__: object())
    assert "has no fast form" in refused(ModelError, lambda: tokenizer.load_tokenizer(model))


def test_a_model_without_linear_layers(tmp_path: Path) -> None:
    from luthier.lora import resolve

    assert "have no linear layer" in refused(ConfigError, lambda: resolve(torch.nn.Embedding(2, 2), None))


def test_adapters_that_cannot_be_used(model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = configs.build(
        {"model": {"path": model}, "data": {"train": rows}, "train": {"max_steps": 1}, "output_dir": run}
    )
    library.train(made)
    meta, config = run / "adapter" / adapters.META, run / "adapter" / adapters.CONFIG
    good, peft = json.loads(meta.read_text()), json.loads(config.read_text())
    for change, words in (
        ({"format": 99}, "this version reads 1"),
        ({"template": {"sha256": ""}}, "is incomplete or damaged"),
    ):
        meta.write_text(json.dumps({**good, **change}))
        assert words in refused(AdapterError, lambda: library.chat(run))
    meta.write_text(json.dumps(good))
    for change, words in (
        ({"peft_type": "IA3"}, "is not a plain LoRA adapter: peft_type 'IA3'"),
        ({"r": None}, "is incomplete or damaged"),
    ):
        config.write_text(json.dumps({**peft, **change}))
        assert words in refused(AdapterError, lambda: library.chat(run))
    config.write_text("[]")
    assert "is not a JSON object" in refused(AdapterError, lambda: library.chat(run))
    config.write_text(json.dumps(peft))
    assert "has no checkpoint 9" in refused(ConfigError, lambda: library.chat(run, checkpoint=9))
    state = run / "checkpoints" / "step-00000001" / "state.json"
    state.write_text("{}")
    assert "is damaged" in refused(AdapterError, lambda: library.chat(run, checkpoint=1))
    (run / "adapter" / adapters.WEIGHTS).unlink()
    assert "holds no adapter_model.safetensors" in refused(AdapterError, lambda: library.chat(run))
    assert "holds no adapter_config.json" in refused(AdapterError, lambda: adapters.load(tmp_path))
    assert "go together, without another directory" in refused(ConfigError, lambda: library.chat(run, model=model))
    assert "nothing to talk to" in refused(ConfigError, library.chat)


def test_run_directories_of_other_people(model: Path, rows: Path, tmp_path: Path) -> None:
    made = configs.build({"model": {"path": model}, "data": {"train": rows}, "output_dir": tmp_path / "theirs"})
    (tmp_path / "theirs" / "adapter").mkdir(parents=True)
    assert "was not written by luthier" in refused(ConfigError, lambda: library.train(made))
    (tmp_path / "theirs" / "adapter").rmdir()
    (tmp_path / "theirs" / "run.yaml").write_text("steps: 3")
    assert "not a run of luthier's" in refused(ConfigError, lambda: library.train(made))
    assert (tmp_path / "theirs" / "run.yaml").read_text() == "steps: 3"


def test_everything_held_out(model: Path, rows: Path) -> None:
    data = {"train": rows, "eval_fraction": 0.999999}
    found = inspect(configs.build({"model": {"path": model}, "data": data}))
    assert "holds out every row" in str(found.error)


def test_rows_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert "prompt is empty" in bad_rows(path, '{"prompt": "", "completion": "b"}')
    assert "completion is empty" in bad_rows(path, '{"prompt": "a", "completion": " "}')
    assert "conversations must be a list" in bad_rows(path, '{"conversations": {}}')
    assert "is not system, user or assistant" in bad_rows(path, '{"conversations": [{"from": "bot", "value": "a"}]}')
    assert "has none of the keys instruction, output" in bad_rows(path, '{"foo": 1}')
    assert "has a key 'output' already, so no other can be renamed" in bad_rows(
        path, '{"instruction": "a", "output": "b", "answer": "c"}', rename={"answer": "output"}
    )
    assert "is the same as" in bad_rows(path, (ROWS[1:-1] + "\n") * 2, dedupe=True)
    assert "that are not text" in bad_rows(path, '{"instruction": "a", "output": "\\ud800"}')
    assert "key 'output' is there twice" in bad_rows(path, '{"instruction": "a", "output": "b", "output": "c"}')
    assert "has 3 cells, the header has 2" in bad_rows(tmp_path / "a.csv", "instruction,output\na,b,c\n")
    assert "cut off: the file ends before the array does" in bad_rows(tmp_path / "a.json", ROWS[:-1] + ",")
    assert "cut off: the file ends in the middle of it" in bad_rows(tmp_path / "a.json", ROWS[:-4])


def test_a_cell_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.source._CELL", 10)
    assert "not CSV (field larger than" in bad_rows(tmp_path / "a.csv", "a,b\n" + "x" * 50 + ",y\n")


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    message = refused(MissingPackageError, lambda: list(read_rows(tmp_path / "a.parquet")))
    assert "reading Parquet needs the package pyarrow" in message


def test_no_memory_is_no_traceback(luthier: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 GB")

    monkeypatch.setattr("luthier.api.chat", full)
    done = luthier("chat", model, "--prompt", "a")
    assert done.code == 2
    assert "there is not enough memory" in done.err
    assert "gradient_checkpointing=true" in done.err


def test_names_that_no_system_takes(luthier: Run, model: Path) -> None:
    for argv in (["--model", model, "--data", "x" * 300], ["--model", "y" * 300, "--data", personas.TEAHOUSE]):
        done = luthier("check", *argv)
        assert done.code == 2
        assert "Traceback" not in done.err


def messages() -> Iterator[tuple[str, list[str]]]:
    """(where, constant parts) of every text that a user may be shown as an error or a row's problem."""
    for path in sorted((ROOT / "src" / "luthier").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            ours = name.endswith("Error") and name not in ("ValueError", "TypeError", "AttributeError", "ImportError")
            at = {"_cannot": 1, "add": 1}.get(name, 0)
            if not (ours or name in ("RowProblem", "BadRow", "_cannot", "add")) or len(node.args) <= at:
                continue
            texts = [
                c.value for c in ast.walk(node.args[at]) if isinstance(c, ast.Constant) and isinstance(c.value, str)
            ]
            parts = [t.strip(" :;,.()'\"") for t in texts if len(t.strip(" :;,.()'\"")) >= 6]
            if parts:
                yield f"{path.name}:{node.lineno}", parts


def test_every_error_text_is_asserted_in_a_test() -> None:
    tests = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")).replace("\\", "")

    def asserted(part: str) -> bool:
        words = part.split()
        size = min(2, len(words))
        return any(" ".join(words[i : i + size]) in tests for i in range(len(words) - size + 1))

    found = list(messages())
    assert len(found) > 100
    assert [where for where, parts in found if not any(map(asserted, parts))] == []
