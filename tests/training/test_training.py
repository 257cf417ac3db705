"""The training loop: checks of the first step, dropout, half precision, schedules, and the files of a run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier import config as configs
from luthier import personas
from luthier.config import LoraConfig, RunConfig, TrainConfig
from luthier.errors import ConfigError, DataError, TrainError
from luthier.kernels import native
from luthier.lora.layers import attach, resolve
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training import loop
from luthier.training.optimizer import learning_rate
from tests.conftest import Result, make_model
from tests.helpers.rows import examples

FAST = TrainConfig(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2)


def run(tokenizer: Tokenizer, model: Any = None, config: TrainConfig = FAST, **lora: Any) -> list[float]:
    model = model or make_model("llama")
    layers = attach(model, LoraConfig(**lora), resolve(model, None), seed=config.seed)
    return loop.train(model, layers, examples(tokenizer), config).losses


def test_the_same_seed_gives_the_same_run_with_dropout(tokenizer: Tokenizer) -> None:
    first = run(tokenizer, lora_dropout=0.3)
    assert run(tokenizer, lora_dropout=0.3) == first
    assert run(tokenizer, lora_dropout=0.3, config=FAST.model_copy(update={"seed": 1})) != first
    assert run(tokenizer)[1:] != first[1:]


def test_bf16_trains_close_to_fp32(tokenizer: Tokenizer) -> None:
    half = run(tokenizer, make_model("llama").to(torch.bfloat16))
    assert half == pytest.approx(run(tokenizer), abs=0.05)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tokenizer: Tokenizer) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainError) as e:
        run(tokenizer, model)
    assert "the loss is nan at step 1; rows of that step: rows:" in e.value.message
    assert "--set" in e.value.fix
    with pytest.raises(TrainError, match="step [23]"):
        run(tokenizer, config=FAST.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 0.0}))


def test_an_adapter_without_a_gradient_stops_the_run(tokenizer: Tokenizer) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # so that no later layer depends on gate and up of layer 1
    with pytest.raises(TrainError, match=r"no gradient reaches the adapter of model.layers.1.mlp.gate_proj"):
        run(tokenizer, model)


def test_gradient_checkpointing_gives_the_same_losses(tokenizer: Tokenizer) -> None:
    again = run(tokenizer, config=FAST.model_copy(update={"gradient_checkpointing": True}))
    assert again == pytest.approx(run(tokenizer), abs=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules(kind: Any) -> None:
    config = TrainConfig(lr_scheduler_type=kind, learning_rate=1.0, warmup_ratio=0.1)
    rates = [learning_rate(s, 100, config) for s in range(100)]
    assert all(0 < r <= 1 for r in rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    if kind == "cosine":
        assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    if kind == "constant":
        assert rates[99] == 1


@pytest.fixture
def config(model_dir: Callable[[str], Path], tmp_path: Path) -> RunConfig:
    return configs.build(
        {
            "model": {"path": model_dir("llama")},
            "data": {"train": personas.TEAHOUSE, "system": "你是陆掌柜。"},
            "train": {"max_steps": 3, "learning_rate": 1e-2},
            "output_dir": tmp_path / "run",
        }
    )


def test_a_run_writes_all_its_files(config: RunConfig) -> None:
    assert config.output_dir
    seen: list[Any] = []
    summary = luthier.train(config, on_step=seen.append)
    run_dir = config.output_dir
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "adapter",
        "checkpoints",
        "data-report.json",
        "evaluation.json",
        "metrics.jsonl",
        "report.html",
        "run.yaml",
        "summary.json",
    ]
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in lines] == summary["losses"] == [r.loss for r in seen]
    assert summary["tokens"] == sum(r.tokens for r in seen)
    assert summary["supervised_tokens"] == sum(r.supervised_tokens for r in seen)
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["train_seconds"], rel=0.01)
    assert summary["peak_rss_bytes"] > 1e8
    assert summary["losses"][-1] < summary["losses"][0]
    meta = json.loads((run_dir / "adapter" / "luthier.json").read_text())
    assert meta["system"] == "你是陆掌柜。"
    assert meta["template"]["name"] == "chatml"
    assert meta["stop_ids"] == [2]
    assert configs.load(run_dir / "run.yaml") == config
    report = json.loads((run_dir / "data-report.json").read_text(encoding="utf-8"))
    assert report["rows"]["kept"] == 74


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(config: RunConfig, tmp_path: Path) -> None:
    assert config.output_dir
    first = luthier.train(config)
    stamps = {p: p.stat().st_mtime_ns for p in config.output_dir.rglob("*")}
    messages: list[str] = []
    assert luthier.train(config, log=messages.append) == first
    assert "finished already" in messages[0]
    assert {p: p.stat().st_mtime_ns for p in config.output_dir.rglob("*")} == stamps
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    with pytest.raises(ConfigError) as e:
        luthier.train(other)
    assert "train.seed: 42 -> 7" in e.value.message
    assert "--output-dir" in e.value.fix
    assert {p: p.stat().st_mtime_ns for p in config.output_dir.rglob("*")} == stamps


def test_the_same_settings_with_other_rows_are_refused(config: RunConfig, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    mine = config.model_copy(update={"data": config.data.model_copy(update={"train": (rows,)})})
    luthier.train(mine)
    rows.write_text('{"instruction": "a", "output": "c"}\n')
    with pytest.raises(ConfigError, match="data: the content has changed"):
        luthier.train(mine)


def test_nothing_is_written_when_the_data_is_refused(config: RunConfig, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instrution": "a", "output": "b"}\n')
    with pytest.raises(DataError):
        luthier.train(config.model_copy(update={"data": config.data.model_copy(update={"train": (rows,)})}))
    assert config.output_dir and not config.output_dir.exists()


def test_a_run_without_a_directory_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="output_dir: is missing"):
        luthier.train(config.model_copy(update={"output_dir": None}))


def test_a_failed_run_leaves_no_adapter(config: RunConfig) -> None:
    assert config.output_dir
    wild = config.train.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(TrainError):
        luthier.train(config.model_copy(update={"train": wild}))
    assert not (config.output_dir / "adapter").exists()
    assert not (config.output_dir / "summary.json").exists()
    luthier.train(config)  # and the directory can be used again
    assert (config.output_dir / "adapter").exists()


def test_the_adapter_file_is_reproducible(config: RunConfig, tmp_path: Path) -> None:
    luthier.train(config)
    luthier.train(config.model_copy(update={"output_dir": tmp_path / "again"}))
    a, b = (p / "adapter" / "adapter_model.safetensors" for p in (tmp_path / "run", tmp_path / "again"))
    assert a.read_bytes() == b.read_bytes()


def test_a_max_length_beyond_the_context_is_refused(config: RunConfig) -> None:
    long = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 5000})})
    inspection = luthier.check(long)
    assert inspection.error
    assert inspection.error.fix == "--set data.max_length=1024"


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_profile_is_a_trace_of_the_first_steps(
    steps: int, model_dir: Callable[[str], Path], luthier: Callable[..., Result], tmp_path: Path
) -> None:
    command = ["train", "--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--output-dir", tmp_path / "run"]
    done = luthier(*command, "--profile", "--set", f"train.max_steps={steps}")
    assert done.code == 0, done.err
    file = tmp_path / "run" / "trace.json"
    assert file.is_file() == (steps > 1)  # the first step is warm-up
    assert ("trace.json (open it at chrome://tracing)" in done.out) == (steps > 1)
    if steps > 1:
        names = [e.get("name", "") for e in json.loads(file.read_text())["traceEvents"]]
        assert sum(n.startswith("ProfilerStep#") for n in names) >= min(steps - 1, 3)
        assert "aten::mm" in names
        assert ("luthier::norm_forward" in names) == (native.why_unavailable(torch.float32) is None)
    plain = luthier(*command[:-1], tmp_path / "plain", "--set", f"train.max_steps={steps}")
    assert plain.code == 0 and not (tmp_path / "plain" / "trace.json").exists()
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


def test_a_run_continues_if_its_profile_cannot_be_written(
    model_dir: Callable[[str], Path], luthier: Callable[..., Result], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", "--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--output-dir", run]
    assert luthier(*command, "--set", "train.learning_rate=1e30", "--set", "train.max_grad_norm=0").code == 2
    (run / "trace.json").mkdir()
    done = luthier(*command, "--profile", "--set", "train.max_steps=3")
    assert done.code == 0, done.err
    assert "trace.json could not be written" in done.err
    assert "trace.json" not in done.out
    assert (run / "adapter" / "luthier.json").is_file()
    assert not list(run.glob(".trace*"))


def test_peak_memory_does_not_include_that_of_the_parent_process() -> None:
    """`import torch` takes 0.2 GB in a build for CPUs and 0.5 GB in one with CUDA, so the child also runs alone."""
    child = "from luthier.devices.device import peak_rss_bytes; x = b'x' * 100_000_000; print(peak_rss_bytes())"
    parent = "import subprocess, sys; x = b'x' * 1_500_000_000; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    commands = [[sys.executable, "-c", child], [sys.executable, "-c", parent, child]]
    alone, below = (int(subprocess.run(c, capture_output=True, text=True, check=True).stdout) for c in commands)
    assert 1e8 < alone < 1e9
    assert below == pytest.approx(alone, abs=5e7)
