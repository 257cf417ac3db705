"""The dtype of replies: the fastest one whose greedy replies are those of fp32, compared once and recorded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import luthier as library
from luthier import config as configs
from luthier._util.environment import CACHE
from luthier.adapters.locate import locate_tuned
from luthier.compiled import Unsuitable
from luthier.config import ModelConfig
from luthier.errors import ConfigError, ModelError
from luthier.evaluation import dtype as dtypes
from luthier.evaluation.agreement import Agreement, agreement
from luthier.evaluation.dtype import Subject, bfloat16_is_faster, reply_dtype, tuned_subject
from luthier.lora.layers import LoraLinear
from luthier.models.chat_format import load_chat_format
from luthier.models.protocols import CausalLM
from luthier.models.quantization import Quantisation, dense_product
from luthier.serving.models import open_models, resolve_models
from luthier.training.resources import calibrated
from tests.conftest import TOKENIZER, make_model
from tests.helpers.handover import tuned

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compare tiny models too, on any processor, and use an empty cache. Their logits are close to each other."""
    monkeypatch.setattr(dtypes, "_SMALL_BYTES", 0)
    monkeypatch.setattr(dtypes, "bfloat16_is_faster", lambda _: True)
    monkeypatch.setattr(dtypes, "NEAR", 0.2)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose widths the compiled layers support in 4 bits too."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama", hidden_size=128, intermediate_size=128).save_pretrained(path)
    shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
    return path


def subject_of(base: Path, **settings: object) -> Subject:
    model = ModelConfig.model_validate({"path": base, **settings})
    return Subject(model, load_chat_format(base))


def records(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(p.read_text()) for p in sorted((tmp_path / "cache" / "dtypes").glob("*.json"))]


@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
def test_bfloat16_is_chosen_if_the_replies_agree_and_the_choice_is_recorded(
    settings: dict[str, object], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    subject = subject_of(base, **settings)
    assert reply_dtype("auto", CPU, [subject], log=lines.append) is torch.bfloat16
    (record,) = records(tmp_path)
    assert record["dtype"] == "bfloat16"
    assert record["agreement"]["prompts"] == 16 and record["agreement"]["tokens"] > 16  # type: ignore[index]
    assert lines == [
        "dtype: comparing the model's replies in bfloat16 with those in fp32, once for this model",
        f"dtype: bfloat16, because {record['reason']}",
    ]

    def again(_: Subject) -> Agreement:
        raise AssertionError("compared twice")

    monkeypatch.setattr(dtypes, "_replies_agree", again)
    assert reply_dtype("auto", CPU, [subject], log=lines.append) is torch.bfloat16
    assert len(lines) == 2


def test_fp32_is_chosen_if_a_reply_differs(base: Path, tmp_path: Path) -> None:
    """In this model bfloat16 changes more than near ties: half of it is another model."""

    def attach(model: CausalLM) -> dict[str, LoraLinear]:
        if model.dtype is torch.bfloat16:
            head = model.get_output_embeddings()
            head.weight.data = head.weight.data.roll(1, 0)
        return {}

    lines: list[str] = []
    subject = replace(subject_of(base), attach=attach)
    assert reply_dtype("auto", CPU, [subject], log=lines.append) is torch.float32
    (record,) = records(tmp_path)
    assert record["dtype"] == "float32" and "on 0 of 16 prompts" in str(record["reason"])
    assert "(limit " in lines[-1]


def test_the_adapter_takes_part_in_both_replies(base: Path, tmp_path: Path) -> None:
    """A strong adapter changes every reply; a reference without it would agree with none."""
    run = locate_tuned(tuned(base, tmp_path / "run", size=0.1))
    subject = tuned_subject(run, run.chat_format())
    assert reply_dtype("auto", CPU, [subject]) is torch.bfloat16
    without = replace(subject, attach=lambda model: subject.attach(model) if model.dtype is torch.bfloat16 else {})
    other = replace(without, adapter="another digest")
    assert reply_dtype("auto", CPU, [other]) is torch.float32
    assert len(records(tmp_path)) == 2  # one for each adapter


def test_an_unfinished_adapter_is_compared_too(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Who are you?", "output": "Marlow."}\n' * 8)
    settings = {
        "model": {"path": base, "dtype": "float32"},
        "data": {"train": rows},
        "train": {"max_steps": 2, "save_steps": 1, "eval_time_ratio": 0},
        "output_dir": tmp_path / "run",
    }
    library.train(configs.build(settings))
    for step in (1, 2):
        assert library.chat(tmp_path / "run", checkpoint=step).generator.model.dtype is torch.bfloat16
    assert len(records(tmp_path)) == 2


def test_a_server_needs_the_agreement_of_every_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tuned(base, tmp_path / name, size=size) for name, size in (("one", 0.05), ("two", 0.06))]
    named = resolve_models(runs)
    lines: list[str] = []
    assert open_models(named, log=lines.append)[0].dtype is torch.bfloat16
    assert lines[-1] == "dtype: bfloat16"
    (first, second) = sorted((tmp_path / "cache" / "dtypes").glob("*.json"))
    second.write_text(json.dumps({"dtype": "float32", "reason": "another processor said so"}))
    assert open_models(named)[0].dtype is torch.float32
    assert first.is_file()
    assert open_models(named, "bfloat16")[0].dtype is torch.bfloat16


def test_fp32_is_chosen_without_a_comparison(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is not faster, in a small model, without the compiled layers, or if nothing can be compared."""
    subject = subject_of(base)
    assert reply_dtype("auto", CPU, [subject], fused=False) is torch.float32
    with monkeypatch.context() as m:
        m.setattr(dtypes, "bfloat16_is_faster", lambda _: False)
        assert reply_dtype("auto", CPU, [subject]) is torch.float32
    with monkeypatch.context() as m:
        m.setattr(dtypes, "_SMALL_BYTES", 1 << 40)
        assert reply_dtype("auto", CPU, [subject]) is torch.float32
    assert records(tmp_path) == []
    with monkeypatch.context() as m:
        m.setattr("luthier.inference.generation.verified_decoding", _unsupported)
        assert reply_dtype("auto", CPU, [subject]) is torch.float32
    assert records(tmp_path)[0]["reason"] == "bfloat16 was not compared with it (not this one)"
    lines: list[str] = []
    broken = replace(subject, adapter="broken", attach=_broken)
    assert reply_dtype("auto", CPU, [broken], log=lines.append) is torch.float32
    assert lines[-1] == "dtype: float32, because bfloat16 was not compared with it (no such adapter)"


def _unsupported(*_: object, **__: object) -> None:
    raise Unsuitable("not this one")


def _broken(_: CausalLM) -> dict[str, LoraLinear]:
    raise ModelError("no such adapter", "copy it again")


def test_a_named_dtype_is_used_unchanged(base: Path) -> None:
    for name in ("float32", "bfloat16", "float16"):
        assert reply_dtype(name, CPU, [subject_of(base)]) is getattr(torch, name)
    with pytest.raises(ConfigError, match="int3: is not a dtype"):
        reply_dtype("int3", CPU, [subject_of(base)])


def test_the_speeds_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = iter([3.0, 2.0, 2.1, 2.0])
    monkeypatch.setattr(dtypes, "_products_per_second", lambda *_: next(rates))
    for _ in range(2):
        assert bfloat16_is_faster(None)
        assert not bfloat16_is_faster(Quantisation("int8"))
    assert (tmp_path / "cache" / "calibration.json").is_file()
    monkeypatch.setattr(dtypes, "identity", lambda: None)
    assert not bfloat16_is_faster(None)  # without a compiler, which may be installed later: nothing is stored


def test_the_measured_product_is_that_of_the_matrices() -> None:
    x, weight = torch.randn(3, 64), torch.randn(48, 64)
    for kind in (torch.float32, torch.bfloat16):
        product = dense_product(weight.to(kind))
        assert product
        torch.testing.assert_close(product(x), x @ weight.T, atol=0.1 if kind is torch.bfloat16 else 1e-4, rtol=0)
    assert dense_product(weight.half()) is None
    for how in (None, Quantisation("int8")):
        assert dtypes._products_per_second(how, torch.float32, 0.01) > 0


def test_a_rate_is_measured_again_if_the_cache_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "/proc/nothing")
    rates = iter([1.0, 2.0])
    assert [calibrated("a", lambda: next(rates)) for _ in range(2)] == [1.0, 2.0]


@pytest.mark.parametrize(("furthest", "near"), [(0.0, True), (0.2, True), (0.2001, False)])
def test_a_near_tie_counts_as_the_same_reply(furthest: float, near: bool) -> None:
    assert Agreement(16, 15, 400, furthest, size=2.0).near(0.1) is near


def test_logits_that_are_not_numbers_are_no_agreement(base: Path) -> None:
    model = library.chat(base).generator.model
    model.get_output_embeddings().weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="contains NaN"):
        agreement(model, [[1, 2]], [[3]])
