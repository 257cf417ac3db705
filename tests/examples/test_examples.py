"""The readable loop trains as ``luthier train`` does, and its adapter is one of luthier's."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier import personas
from luthier.config import build, load
from luthier.verbs.chat import chat
from luthier.verbs.train import train
from tests.conftest import ROOT

SETTINGS = ["model.dtype=float32", "data.max_length=256", "train.max_steps=4", "train.learning_rate=5e-3"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["lora.lora_dropout=0.3", "train.per_device_train_batch_size=2", "train.micro_batch_tokens=0"],
        [
            "data.eval_fraction=0.3",
            "data.dedupe=true",
            "train.gradient_checkpointing=true",
            "train.shared_prefix=false",
        ],
        ["model.load_in_8bit=true", "model.rope_theta=5000"],
    ],
)
def test_the_loop_trains_as_the_command_does(
    more: list[str], model_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, settings = model_dir("llama"), [*SETTINGS, *more]
    main = runpy.run_path(str(ROOT / "examples" / "sft_loop.py"))["main"]
    losses = main(model, personas.TEAHOUSE, tmp_path / "adapter", settings)
    assert "step 4/4: loss" in capsys.readouterr().out
    config = build(
        {"model": {"path": model}, "data": {"train": [personas.TEAHOUSE]}, "output_dir": tmp_path / "run"},
        settings=[*settings, "train.eval_time_ratio=0", "train.fused=false"],
    )
    expected = train(config, force=True)["losses"]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "adapter", tmp_path / "run" / "adapter")]
    a, b = (load_file(file) for file in files)
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_its_adapter_can_be_chatted_with(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_dir("llama")
    main = runpy.run_path(str(ROOT / "examples" / "sft_loop.py"))["main"]
    main(model, personas.TEAHOUSE, tmp_path / "adapter", [*SETTINGS, "train.max_steps=1"])
    assert chat(model=model, adapter=tmp_path / "adapter", with_adapter=True).send("你好").reply_tokens > 0


def test_the_example_configuration_is_valid_and_commented() -> None:
    path = ROOT / "examples" / "run.yaml"
    config = load(path)
    assert config.train.learning_rate == 1e-4
    assert config.output_dir == Path("runs/tea-house")
    assert path.read_text(encoding="utf-8").count("#") > 12
