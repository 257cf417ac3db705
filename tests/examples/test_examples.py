"""The readable loop trains as ``luthier train`` does, and its adapter is one of luthier's."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier import personas
from luthier.config import build, load
from luthier.verbs.chat import chat
from luthier.verbs.train import train
from tests.conftest import ROOT

SETTINGS = ["model.dtype=float32", "data.max_length=256", "train.max_steps=4", "train.learning_rate=5e-3"]


def test_the_loop_trains_as_the_command_does(
    model_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_dir("llama")
    main = runpy.run_path(str(ROOT / "examples" / "sft_loop.py"))["main"]
    losses = main(model, personas.TEAHOUSE, tmp_path / "adapter", SETTINGS)
    assert "step 4/4: loss" in capsys.readouterr().out
    config = build(
        {"model": {"path": model}, "data": {"train": [personas.TEAHOUSE]}, "output_dir": tmp_path / "run"},
        settings=[*SETTINGS, "train.eval_time_ratio=0"],
    )
    expected = train(config, force=True)["losses"]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


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
