"""A verification that has passed is not repeated for the same model on the same machine, and one that fails is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import luthier as library
from luthier import config as configs
from luthier import personas
from luthier._util.environment import CACHE
from luthier.adapters import directory as adapters
from luthier.adapters.locate import locate_tuned
from luthier.compiled import Unsuitable
from luthier.inference import decoding
from luthier.inference.decoding import verified_decoding
from luthier.inference.sampling import Sampling
from luthier.lora.layers import frozen_dtype
from luthier.models import native_model
from luthier.models.native_model import first_layers, verify_once
from luthier.training import loop
from tests.conftest import make_model
from tests.helpers.handover import tuned


@pytest.fixture(autouse=True)
def _remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_model, "REMEMBER", True)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


def test_it_is_called_again_only_for_another_model_or_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[str] = []
    model = make_model("llama")

    def verify(of: str, other: object = model, facts: object = 1, name: str = "law") -> None:
        verify_once(name, other, [facts], lambda: called.append(of))  # type: ignore[arg-type]

    verify("first")
    verify("again")
    verify("other facts", facts=2)
    verify("other name", name="another law")
    verify("other weights", make_model("llama", seed=1))
    verify("other sizes", make_model("llama", intermediate_size=112))
    verify("other dtype", make_model("llama").bfloat16())
    monkeypatch.setattr(native_model, "cpu_name", lambda: "another processor")
    verify("other processor")
    assert called == [
        "first", "other facts", "other name", "other weights", "other sizes", "other dtype", "other processor",
    ]  # fmt: skip
    assert len(list((tmp_path / "cache" / "verified").iterdir())) == 7


def test_a_failure_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = make_model("llama"), []

    def fail() -> None:
        called.append(1)
        raise Unsuitable("no")

    for _ in range(2):
        with pytest.raises(Unsuitable):
            verify_once("law", model, [], fail)
    assert len(called) == 2
    monkeypatch.setenv(CACHE, "/proc/nothing")
    for _ in range(2):
        verify_once("law", model, [], lambda: called.append(1))
    assert len(called) == 4  # without a cache, every time


def test_a_second_training_and_a_second_conversation_verify_nothing(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str) -> list[float]:
        settings = {
            "model": {"path": model_dir("llama"), "dtype": "float32"},
            "data": {"train": personas.TEAHOUSE, "max_length": 128},
            "train": {"max_steps": 2, "eval_time_ratio": 0, "fused": True},
            "output_dir": tmp_path / name,
        }
        return library.train(configs.build(settings))["losses"]

    first = train("one")
    reply = library.chat(tmp_path / "one").send("你好", Sampling(4)).text

    def again(*_: object) -> None:
        raise AssertionError("verified twice")

    monkeypatch.setattr(loop, "verify_compiled", again)
    monkeypatch.setattr("luthier.verbs.train.verify_segments", again)
    monkeypatch.setattr(decoding, "_verify", again)
    assert train("two") == first
    assert library.chat(tmp_path / "one").send("你好", Sampling(4)).text == reply


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_layers_with_an_adapter_are_of_one_kind(arch: str, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Verifying the first layer of each kind must not become verifying all layers."""
    run = locate_tuned(tuned(model_dir(arch), tmp_path / "run"))
    model = library.chat(tmp_path / "run").generator.model
    assert adapters.updates(run.adapter)
    with first_layers(model) as depth:
        assert depth == 1


@pytest.mark.parametrize("arch", ["qwen2", "phi3"])
def test_an_adapter_over_a_quantised_base_is_verified_with_the_bound_of_its_dtype(
    arch: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first parameter of such a model is the adapter's, in fp32: its embedding stays on disk."""
    settings = {
        "model": {"path": model_dir(arch), "dtype": "bfloat16", "load_in_8bit": True},
        "data": {"train": personas.TEAHOUSE, "max_length": 128},
        "train": {"max_steps": 1, "eval_time_ratio": 0},
        "output_dir": tmp_path / "run",
    }
    library.train(configs.build(settings))
    chat = library.chat(tmp_path / "run", dtype="bfloat16")
    assert next(iter(chat.generator.model.parameters())).dtype is torch.float32
    verified_decoding(chat.generator.model, {"a": chat.layers}, "a")
    assert json.loads(next((tmp_path / "cache" / "verified").iterdir()).read_text())["verified"]


def test_a_base_model_is_verified_with_the_bound_of_its_dtype(model_dir: Callable[[str], Path]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = library.chat(model_dir("llama"), dtype=str(dtype).removeprefix("torch.")).generator.model
        assert frozen_dtype(model) is dtype
        verified_decoding(model)
