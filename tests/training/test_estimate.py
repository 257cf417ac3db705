"""The estimate equals measured memory; a run that does not fit is refused, with settings that make it fit."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import luthier as library
from luthier import config as configs
from luthier import personas
from luthier.batching.collate import collate, to_device
from luthier.compiled.decoder import CompiledDecoder
from luthier.config import LoraConfig, TrainConfig
from luthier.errors import UserError
from luthier.lora.layers import attach, resolve
from luthier.models.directory import cache_bytes, read_config
from luthier.models.loader import load_weights
from luthier.models.native_model import empty_model
from luthier.models.quantization import Quantisation, QuantLinear
from luthier.models.quantized_loader import QuantisedOptions, load_quantised
from luthier.training import memory_model, resources
from luthier.training.forward import checkpointing, loss_sum, segment_attention
from luthier.training.memory_model import Precision, RowLengths, estimate
from tests.conftest import Result
from workload import train_command

Run = Callable[..., Result]
FP32 = Precision("float32", torch.float32)
# started through a small process: the peak of a child begins with the size of its parent
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(resources, "_flops", lambda *_: 1e11)
    monkeypatch.setattr(resources, "_dequantised", lambda *_: 1e9)


def look(path: Path, rows: RowLengths, recompute: bool = False, precision: Precision = FP32) -> memory_model.Memory:
    config = read_config(path)
    targets = resolve(empty_model(config), None)
    train = TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=1)
    return estimate(config, targets, LoraConfig(), train, rows, precision, recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "glm", "gemma2"])
def test_what_autograd_saves_is_counted_to_the_byte(
    arch: str, recompute: bool, model_dir: Callable[[str], Path]
) -> None:
    """A forward pass with values on the CPU saves as many bytes as counted on the meta device."""
    path = model_dir(arch)
    rows = [memory_model._synthetic_row(40, 12), memory_model._synthetic_row(25, 20)]
    model = load_weights(path, torch.float32)
    attach(model, LoraConfig(), resolve(model, None), seed=0)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with (
        segment_attention(model, "padded"),
        checkpointing(model, recompute),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        loss_sum(model, to_device(collate(rows), "cpu"))
    measured = sum(t.untyped_storage().nbytes() for t in saved.values())
    blank = empty_model(read_config(path)).to(torch.float32)
    attach(blank, LoraConfig(), resolve(blank, None), seed=0)
    counted = memory_model._count(blank, rows, recompute, "padded")
    assert counted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_extrapolation_from_three_layers_is_exact(recompute: bool, model_dir: Callable[[str], Path]) -> None:
    config = read_config(model_dir("llama"))
    config.num_hidden_layers = 7
    model: Any = empty_model(config)
    attach(model, LoraConfig(), resolve(model, None), seed=0)
    rows = [memory_model._synthetic_row(40, 12), memory_model._synthetic_row(25, 20)]
    extrapolated = memory_model._count(model, rows, recompute, "padded")
    assert len(model.get_decoder().layers) == 7
    assert extrapolated == memory_model._counted(model, rows, recompute, "padded")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_models_of_experts_are_counted_in_every_type(kind: str) -> None:
    """The meta device supports the products of experts in bfloat16 only."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, head_dim=16, moe_intermediate_size=32)
    config.vocab_size = 640
    targets = resolve(empty_model(config), None)
    estimates = [
        estimate(config, targets, LoraConfig(), TrainConfig(), RowLengths.of_length(40, 4), Precision("", dtype), False)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert estimates[0].activations == pytest.approx(2 * estimates[1].activations, rel=0.1)
    assert estimates[0].base == 2 * estimates[1].base


def test_base_and_adapter_equal_those_in_memory(model_dir: Callable[[str], Path]) -> None:
    path = model_dir("qwen2")
    expected = look(path, RowLengths.of_length(50, 4))
    model = load_weights(path, torch.float32)
    assert expected.base + expected.embedding_and_head == sum(p.numel() * 4 for p in model.parameters())
    layers = attach(model, LoraConfig(), resolve(model, None), seed=0)
    trained = sum(p.numel() * 4 for m in layers.values() for p in (m.lora_A, m.lora_B))
    assert (expected.adapter, expected.gradients, expected.optimizer) == (trained, trained, 2 * trained)
    how = Quantisation("nf4")
    small = load_quantised(
        path, torch.float32, torch.device("cpu"), read_config(path), QuantisedOptions(how, torch.float32, cache=False)
    )
    stored = sum(
        getattr(m, part).numel() * getattr(m, part).element_size()
        for m in small.modules()
        if isinstance(m, QuantLinear)
        for part in how.parts
    )
    norms = sum(p.numel() * 4 for n, p in small.named_parameters() if "norm" in n or "bias" in n)
    for dtype in (torch.float32, torch.bfloat16):
        four = look(path, RowLengths.of_length(50, 4), precision=Precision("nf4", dtype, how))
        assert four.base == stored + norms * dtype.itemsize / 4
        assert four.on_disk > 0  # the embedding
        # chat computes in fp32 on a CPU
        rest = -memory_model._RUNTIME + 50 * cache_bytes(read_config(path), 4)
        assert four.chat - four.library == pytest.approx(stored + norms + four.embedding_and_head + 2 * trained + rest)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "glm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conversation_holds_what_decoding_stores(
    arch: str, dtype: torch.dtype, model_dir: Callable[[str], Path]
) -> None:
    path = model_dir(arch)
    model = load_weights(path, dtype)
    short, long = (look(path, RowLengths([40, n], [20, 20]), precision=Precision("", dtype)) for n in (70, 100))
    moved = long.library - short.library  # this process has grown between
    assert long.chat - short.chat - moved == pytest.approx(30 * CompiledDecoder(model).token_bytes)
    weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
    trained = sum(
        4 * p.numel()
        for m in attach(model, LoraConfig(), resolve(model, None), seed=0).values()
        for p in (m.lora_A, m.lora_B)
    )
    rest = -memory_model._RUNTIME + 70 * CompiledDecoder(model).token_bytes
    assert short.chat - short.library == pytest.approx(weights + 2 * trained + rest)
    assert replace(short, chat=1e12).peak == short.peak


def test_a_model_without_attention_stores_no_keys_and_values() -> None:
    assert cache_bytes(AutoConfig.for_model("mamba"), 4) == 0


def test_longer_rows_need_more_memory_and_recomputation_needs_less(model_dir: Callable[[str], Path]) -> None:
    short, long = (look(model_dir("llama"), RowLengths.of_length(n, 4)) for n in (50, 200))
    assert long.activations > 3.5 * short.activations
    assert look(model_dir("llama"), RowLengths.of_length(200, 4), recompute=True).activations < 0.8 * long.activations


def test_the_largest_micro_batch_is_one_of_the_runs_plan() -> None:
    lengths = list(range(10, 110))
    train = TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2, micro_batch_tokens=0)
    tokens = sum(len(e) for e in memory_model._heaviest(RowLengths(lengths, [5] * 100), train))
    plan = memory_model.Plan(100, 2, 3, train.seed, train.num_train_epochs, 2)
    assert tokens == max(sum(lengths[i] for i in micro) for step in range(2) for micro in plan.step(step))


def run_config(model: Path, run: Path | None = None, **train: Any) -> configs.RunConfig:
    values = {"model": {"path": model}, "data": {"train": personas.TEAHOUSE}, "output_dir": run}
    return configs.build({**values, "train": {"max_steps": 1, **train}})


def test_a_run_that_cannot_fit_is_refused_and_the_fix_fits(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_dir("llama")
    whole, lean = (
        library.estimate(run_config(path, gradient_checkpointing=r, per_device_train_batch_size=b)).chosen.memory.peak
        for r, b in ((False, 8), (True, 8))
    )
    base = resources.resident_now()
    limit = (whole + lean) / 2
    monkeypatch.setattr(resources, "resident_now", lambda: base)
    monkeypatch.setattr(resources, "available_memory", lambda: limit)
    argv = ["train", "--model", path, "--data", personas.TEAHOUSE, "--output-dir", tmp_path / "run"]
    argv += ["--set", "train.max_steps=1", "--set", "train.per_device_train_batch_size=8"]
    done = luthier(*argv, "--set", "train.gradient_checkpointing=false")
    assert done.code == 2
    assert re.search(r"the run needs about \d+\.\d GB of memory, but only \d+\.\d GB are available", done.err)
    fix = done.err.strip().splitlines()[-1].removeprefix("  fix: ")
    assert "to start anyway: --force" in fix
    assert not (tmp_path / "run" / "run.yaml").exists()
    again = luthier(*argv, *shlex.split(fix.split(", or ")[0].split(" (")[0]))
    assert again.code == 0, again.err
    assert "estimate: " in again.err


def test_a_fix_lists_changed_settings_only_and_resets_conflicting_ones(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(**model: bool) -> configs.RunConfig:
        lean = {"gradient_checkpointing": True, "per_device_train_batch_size": 1, "micro_batch_tokens": 0}
        run = run_config(model_dir("llama"), **lean)
        return run.model_copy(update={"model": run.model.model_copy(update=model)})

    base = resources.resident_now()
    monkeypatch.setattr(resources, "resident_now", lambda: base)
    eight, four = (library.estimate(config(**{k: True})).chosen.memory.peak for k in ("load_in_8bit", "load_in_4bit"))
    assert four < eight
    monkeypatch.setattr(resources, "available_memory", lambda: (eight + four) / 2)
    fixes = library.estimate(config(load_in_8bit=True)).fixes
    assert fixes == ("--set model.load_in_8bit=false --set model.load_in_4bit=true",)
    monkeypatch.setattr(resources, "available_memory", lambda: four / 2)
    assert library.estimate(config(load_in_4bit=True)).fixes == ()


def test_force_starts_a_run_that_does_not_fit(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 1.0)
    with pytest.raises(UserError):
        library.train(run_config(model_dir("llama"), tmp_path / "run"))
    messages: list[str] = []
    summary = library.train(run_config(model_dir("llama"), tmp_path / "run"), log=messages.append, force=True)
    assert summary["steps"] == 1
    assert any("gradient checkpointing is on to save memory" in s for s in messages)


def test_the_command_and_its_json(model_dir: Callable[[str], Path], luthier: Run) -> None:
    argv = ["estimate", "--model", model_dir("llama")]
    done = luthier(*argv, "--length", 100)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[2:6]] == ["float32", "bfloat16", "int8", "nf4"]
    assert all(len(line) <= 80 for line in done.out.splitlines()[1:6])
    report = json.loads(luthier(*argv, "--data", personas.TEAHOUSE, "--json").out)
    assert report["trainable_parameters"] > 0
    assert {r["precision"] for r in report["rows"]} == {"float32", "bfloat16", "int8", "nf4"}
    for row in report["rows"]:
        assert row["peak_bytes"] == max(row["load_bytes"], row["training_bytes"])
        assert row["seconds_per_epoch"] > 0
    assert library.estimate(run_config(model_dir("llama"))).parameters == report["parameters"]
    assert luthier("estimate", "--model", model_dir("llama"), "--data", "none.json").code == 2


def test_the_table_shows_the_estimates_and_libraries_that_are_measured_once(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring the machine's speed makes the process larger; a run does not."""
    sizes = itertools.count(4e8, 1e8)
    monkeypatch.setattr(resources, "resident_now", lambda: next(sizes))
    expected = library.estimate(run_config(model_dir("llama")))
    every = [e.memory for e in (expected.chosen, *expected.by_precision)]
    assert {m.library for m in every} == {4e8 + memory_model._RUNTIME}
    head, *lines = (line.split() for line in resources.table(expected.by_precision))
    assert head[4:7] == ["libraries", "peak", "chat"]
    for line, m in zip(lines, every[1:], strict=True):
        assert line[4:7] == [f"{size / 1e9:.2f}" for size in (m.library, m.peak, m.chat)]


def test_the_calibration_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources.files, "cache_root", lambda: tmp_path)
    first = resources.rate("flops", torch.float32)
    monkeypatch.setattr(resources, "_flops", lambda *_: 5.0)
    monkeypatch.setattr(resources, "_dequantised", lambda *_: 7.0)
    assert resources.rate("flops", torch.float32) == first
    assert resources.rate("flops", torch.float16) == 5.0
    assert resources.rate("dequantised", torch.float16) == 7.0


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_the_peak_is_within_ten_per_cent(
    kind: str, recompute: bool, smollm2: Path, huanhuan: Path, tmp_path: Path
) -> None:
    """Run each in a separate process for two steps; the estimate is in the first line that the run prints."""
    settings = {
        "train.max_steps": 2,
        "train.gradient_accumulation_steps": 1,
        "train.per_device_train_batch_size": 8,
        "train.gradient_checkpointing": str(recompute).lower(),
        "train.eval_time_ratio": 0,
        "model.dtype": "float32" if kind == "nf4" else kind,
        "model.load_in_4bit": str(kind == "nf4").lower(),
        "model.quantised_cache": "false",
    }
    command = train_command(smollm2, huanhuan, tmp_path / "run", [f"{k}={v}" for k, v in settings.items()])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    estimated = float(re.findall(r"estimate: ([\d.]+) GB", done.stderr)[0]) * 1e9
    peak = json.loads((tmp_path / "run" / "summary.json").read_text())["peak_rss_bytes"]
    print(f"{kind} checkpointing={recompute}: estimated {estimated / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB")
    assert np.isclose(estimated, peak, rtol=0.10)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "nf4"])
def test_the_memory_of_a_conversation_is_within_ten_per_cent(
    kind: str, smollm2: Path, huanhuan: Path, tmp_path: Path
) -> None:
    """Training and two conversations, each in a process of its own; the first one verifies and fills caches."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    settings = {
        "train.max_steps": 1,
        "train.eval_time_ratio": 0,
        "model.dtype": dtype,
        "model.load_in_4bit": str(kind == "nf4").lower(),
        "model.load_in_8bit": str(kind == "int8").lower(),
    }
    run = tmp_path / "run"
    options = [f"{k}={v}" for k, v in settings.items()]
    subprocess.run(train_command(smollm2, huanhuan, run, options), capture_output=True, check=True)
    command = [sys.executable, "-m", "luthier"]
    done = subprocess.run(
        [*command, "estimate", str(run / "run.yaml"), "--json"], capture_output=True, text=True, check=True
    )
    estimated = next(r["chat_bytes"] for r in json.loads(done.stdout)["rows"] if r["precision"] == kind)
    chat = [*command, "chat", str(run), "--dtype", dtype, "--prompt", "Tell a story.", "--max-new-tokens", "200"]
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PEAK, *chat], capture_output=True, text=True, check=True)
    peak = 1024 * int(done.stdout)
    print(f"{kind}: estimated {estimated / 1e9:.3f} GB, measured {peak / 1e9:.3f} GB")
    assert np.isclose(estimated, peak, rtol=0.10)
