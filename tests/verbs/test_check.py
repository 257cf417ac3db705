"""``check`` refuses what ``train`` would refuse, and shows which tokens are trained."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from luthier import personas
from luthier.models import quantization
from luthier.training import resources
from tests.conftest import Result

Run = Callable[..., Result]
Arrange = Callable[[Path, pytest.MonkeyPatch], list[str]]


FITS_NOT = "this run does not fit, so luthier train refuses it without --force"
REFUSED = "luthier train refuses this run: "


def no_memory(_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(resources, "available_memory", lambda: 1e6)
    return []


def no_kernel(_model: Path, _monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["model.attn_implementation=varlen"]


def no_bitsandbytes(_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    return ["model.load_in_4bit=true"]


def no_memory_and_no_bitsandbytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    no_bitsandbytes(model, monkeypatch)
    return no_memory(model, monkeypatch)


def no_8bit_optimizer(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    no_bitsandbytes(model, monkeypatch)
    return ["train.optim=adamw_8bit"]


def no_tensor(model: Path, _monkeypatch: pytest.MonkeyPatch) -> list[str]:
    file = model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return ["model.load_in_4bit=true"]


def no_weights(model: Path, _monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (model / "model.safetensors").unlink()
    return []


@pytest.mark.parametrize(
    ("arrange", "words", "noted"),
    [
        (no_memory, "the run needs about", FITS_NOT),
        (no_memory_and_no_bitsandbytes, "the run needs about", FITS_NOT),
        (no_kernel, "varlen needs a GPU", REFUSED),
        (no_bitsandbytes, "requires the package bitsandbytes", REFUSED),
        (no_8bit_optimizer, "requires the package bitsandbytes", REFUSED),
        (no_tensor, "the weights do not fit the model", REFUSED),
        (no_weights, "contains no weights", REFUSED),
    ],
)
def test_what_train_refuses_is_not_ready(
    arrange: Arrange,
    words: str,
    noted: str,
    model_dir: Callable[[str], Path],
    luthier: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """check ends with the error of train, which has written nothing."""
    model = tmp_path / "model"
    shutil.copytree(model_dir("llama"), model)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))  # where no rate of this machine is stored
    quantization.bitsandbytes_functions.cache_clear()
    settings = [word for value in arrange(model, monkeypatch) for word in ("--set", value)]
    argv = ["--model", model, "--data", personas.TEAHOUSE, "--set", "data.cache=false", *settings]
    try:
        trained = luthier("train", *argv, "--output-dir", tmp_path / "run")
        checked, report = luthier("check", *argv), luthier("check", *argv, "--json")
        estimated = luthier("estimate", *argv)
    finally:
        quantization.bitsandbytes_functions.cache_clear()
    assert (trained.code, checked.code, report.code) == (2, 2, 2)
    assert words in checked.err
    assert _without_figures(checked.err) == _without_figures(trained.err[trained.err.index("error: ") :])
    assert "ready" not in checked.out
    assert estimated.code == 0
    assert noted in estimated.out
    assert noted is FITS_NOT or words in estimated.out
    assert "74 read, 74 kept" in checked.out
    assert json.loads(report.out)["ok"] is False
    assert not (tmp_path / "run").exists()


def _without_figures(text: str) -> str:
    return re.sub(r"\d+\.\d", "N", text)


def test_an_output_directory_that_train_refuses_is_not_ready(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    argv = ["--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--output-dir", tmp_path / "mine"]
    assert luthier("init", *argv, "--to", file).code == 0
    ready = luthier("check", file)
    assert ready.code == 0
    assert re.search(r"^memory +\d+\.\d\d GB peak, \d+\.\d GB available$", ready.out, re.MULTILINE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("all of it")
    done = luthier("check", file)
    assert done.code == 2
    assert "holds files that luthier did not write for a run: thesis.doc" in done.err


def test_a_finished_run_is_ready_until_its_rows_change(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train reports a finished run as finished, whatever memory there is now."""
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    shutil.copy(personas.TEAHOUSE, rows)
    argv = ["--model", model_dir("llama"), "--data", rows, "--output-dir", run, "--set", "train.max_steps=1"]
    assert luthier("train", *argv).code == 0
    monkeypatch.setattr(resources, "available_memory", lambda: 1e6)
    assert luthier("check", run / "run.yaml").code == luthier("train", run / "run.yaml").code == 0
    rows.write_text("\n".join(rows.read_text(encoding="utf-8").splitlines()[:20]), encoding="utf-8")
    for verb in ("check", "train"):
        done = luthier(verb, run / "run.yaml")
        assert done.code == 2
        assert "data: the content has changed" in done.err


def test_check_leaves_a_training_that_writes_a_checkpoint_alone(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    """train, which holds the run's lock, deletes what an earlier training left half-written."""
    run = tmp_path / "run"
    argv = ["--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--output-dir", run]
    argv += ["--set", "train.max_steps=2", "--set", "train.save_steps=1"]
    assert luthier("train", *argv).code == 0
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    half = run / "checkpoints" / ".step-00000002.new"
    half.mkdir()
    assert luthier("check", run / "run.yaml").code == 0
    assert half.is_dir()
    assert luthier("train", run / "run.yaml").code == 0
    assert not half.exists()


def test_an_8_bit_base_needs_no_bitsandbytes(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    quantization.bitsandbytes_functions.cache_clear()
    no_bitsandbytes(tmp_path, monkeypatch)
    argv = ["--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--set", "model.load_in_8bit=true"]
    try:
        assert luthier("check", *argv).code == 0
        assert luthier("train", *argv, "--set", "train.max_steps=1", "--output-dir", tmp_path / "run").code == 0
    finally:
        quantization.bitsandbytes_functions.cache_clear()


def test_trained_tokens_are_enclosed_in_marks_without_colours(model_dir: Callable[[str], Path], luthier: Run) -> None:
    done = luthier("check", "--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--show", 1)
    assert "trained tokens are enclosed in {+ and +}" in done.out
    line = next(line for line in done.out.splitlines() if line.startswith("<|im_start|>"))
    marked = re.findall(r"\{\+(.*?)\+\}", line)
    tokens = re.search(r"\((\d+) tokens, (\d+) trained\)", done.out)
    assert tokens
    assert len(marked) == 1
    assert marked[0].endswith("<|im_end|>|")
    assert marked[0].count("|") - 2 * marked[0].count("<|") == int(tokens[2])  # each token is followed by a |


def test_trained_tokens_are_coloured_in_a_terminal(
    model_dir: Callable[[str], Path], luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    done = luthier("check", "--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--show", 1)
    assert "trained tokens are green" in done.out
    assert "\033[1;32m" in done.out
    assert "{+" not in done.out


def test_a_template_that_refuses_system_messages_points_to_the_setting(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir("llama"), model)
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (model / "chat_template.jinja").unlink(missing_ok=True)
    published = config.get("chat_template") or (model_dir("llama") / "chat_template.jinja").read_text()
    file.write_text(json.dumps({**config, "chat_template": refusal + published}))
    contents = {"system": "s", "user": "a", "assistant": "b"}
    turns = [{"role": role, "content": content} for role, content in contents.items()]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"messages": messages}) for messages in (turns, turns[1:])))
    argv = ["check", "--model", model, "--data", rows]
    done = luthier(*argv)
    assert "1 dropped" in done.out
    assert "System role not supported (--set data.system_role=merge puts the system message into" in done.out
    assert "2 kept, 0 dropped" in luthier(*argv, "--set", "data.system_role=merge").out
    strict = "{% if 'odd' in messages[-1].content %}{{ raise_exception('odd') }}{% endif %}"
    file.write_text(json.dumps({**config, "chat_template": refusal + strict + published}))
    turns[-1]["content"] = "odd"  # refused for another reason too, so the setting would not help
    rows.write_text(
        "\n".join(json.dumps({"messages": m}) for m in (turns, [*turns[1:-1], {**turns[-1], "content": "b"}]))
    )
    for settings in ([], ["--set", "data.system_role=merge"]):
        done = luthier(*argv, *settings)
        assert "1 dropped" in done.out
        assert "data.system_role=merge" not in done.out


@pytest.mark.parametrize("rows", [True, False])
def test_init_writes_the_estimate_as_a_comment(
    rows: bool, model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    file, data = tmp_path / "run.yaml", tmp_path / "rows.jsonl"
    data.write_text(personas.TEAHOUSE.read_text(encoding="utf-8") if rows else "{}", encoding="utf-8")
    assert luthier("init", "--model", model_dir("llama"), "--data", data, "--to", file).code == 0
    comment = file.read_text(encoding="utf-8").splitlines()[1]
    if rows:
        assert re.match(
            r"# Estimate for this machine and these settings: \d+\.\d\d GB peak, \d+\.\d GB available \(base ", comment
        )
    else:
        assert comment.startswith("# luthier estimate FILE predicts memory and time; not possible yet: ")
    luthier("init", "--to", tmp_path / "bare.yaml")
    second = (tmp_path / "bare.yaml").read_text(encoding="utf-8").splitlines()[1]
    assert second == "# luthier estimate FILE predicts memory and time"
