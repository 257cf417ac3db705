"""Law "LoRA": a new adapter changes nothing; a merged model equals base plus adapter, and differs from the base.

The law can fail: it detects a random B at the start, and a merge that ignores alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.adapters import directory as adapters
from luthier.adapters.locate import locate_tuned
from luthier.adapters.original_names import Update
from luthier.config import LoraConfig
from luthier.errors import ConfigError
from luthier.exporting import merge
from luthier.exporting.merge import merged_tensors, pending_updates
from luthier.lora.layers import LoraLinear, attach, detach, resolve, trainable_parameters
from luthier.models.loader import load_weights
from tests.conftest import ARCHITECTURES, make_model
from tests.helpers.rows import fails, with_adapter

IDS = torch.arange(3, 40)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def unchanged_at_start(model: Any, spoil: bool = False) -> None:
    before = logits(model)
    layers = attach(model, LoraConfig(), resolve(model, None), seed=0)
    if spoil:
        with torch.no_grad():
            next(iter(layers.values())).lora_B.normal_()
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_logits_are_unchanged_at_the_start(arch: str) -> None:
    unchanged_at_start(make_model(arch))


@pytest.mark.parametrize("training", [False, True])
def test_adapter_layers_are_in_the_mode_of_the_layers_they_replace(training: bool) -> None:
    model = make_model("llama").train(training)
    layers = attach(model, LoraConfig(lora_dropout=0.5), resolve(model, None), seed=0)
    assert [layer.training for layer in layers.values()] == [training] * len(layers)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_()
    assert torch.equal(logits(model), logits(model))  # masks follow from (seed, step), so they are equal too
    layer = next(iter(layers.values()))
    x = torch.randn(5, layer.base.in_features)
    with torch.no_grad():
        update = layer(x) - layer.base(x)
        expected = x @ layer.lora_A.T @ layer.lora_B.T * layer.scaling
    assert torch.allclose(update, expected, atol=1e-4) is not training


def test_the_law_detects_a_b_that_is_not_zero() -> None:
    assert fails(lambda: unchanged_at_start(make_model("llama"), spoil=True))


def merged_equals_unmerged(base: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that merged tensors compute the same as base and adapter; return both logits."""
    tuned = locate_tuned(None, base, adapter)
    chat_format = tuned.chat_format()
    plain, unmerged = load_weights(base, torch.float32), load_weights(base, torch.float32)
    adapters.apply(unmerged, tuned.adapter)
    merged = load_weights(base, torch.float32)
    pending = pending_updates(tuned, chat_format)
    merged.load_state_dict(dict(merged_tensors(tuned, chat_format, pending)), strict=False)
    assert float((logits(merged) - logits(unmerged)).abs().max()) < 1e-4
    return logits(plain), logits(merged)


@pytest.fixture
def saved(model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Return a function that makes the directories of a base model and of a random, non-zero adapter for it."""

    def save(arch: str) -> tuple[Path, Path]:
        base = model_dir(arch)
        model = load_weights(base, torch.float32)
        targets, config = resolve(model, None), LoraConfig(r=4, lora_alpha=8)
        layers = with_adapter(model)
        updates = {n: Update(m.lora_A.detach(), m.lora_B.detach(), config) for n, m in layers.items()}
        adapters.save_plain(tmp_path / arch, updates, base)
        assert tuple(updates) == targets.modules
        return base, tmp_path / arch

    return save


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_merged_equals_unmerged_and_changed_something(arch: str, saved: Callable[[str], tuple[Path, Path]]) -> None:
    plain, merged = merged_equals_unmerged(*saved(arch))
    assert float((merged - plain).abs().max()) > 0.1


def test_detach_restores_the_base() -> None:
    model = make_model("llama")
    plain = logits(model)
    detach(model, with_adapter(model))
    assert torch.equal(plain, logits(model))


def test_the_law_detects_an_ignored_alpha(
    saved: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = saved("llama")
    monkeypatch.setattr(merge, "scaling", lambda _: 1.0)
    assert fails(lambda: merged_equals_unmerged(base, adapter))


def test_only_the_adapter_is_trained_and_the_head_has_none() -> None:
    model = make_model("qwen2")
    layers = attach(model, LoraConfig(r=4), resolve(model, None), seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{x}" for n in layers for x in "AB"}
    assert len(layers) == 2 * 7
    assert trainable_parameters(layers) == sum(4 * (m.base.in_features + m.base.out_features) for m in layers.values())


def test_rank_stabilised_scaling() -> None:
    linear = nn.Linear(4, 4)
    assert LoraLinear(linear, LoraConfig(r=16, lora_alpha=32)).scaling == 2
    assert LoraLinear(linear, LoraConfig(r=16, lora_alpha=32, use_rslora=True)).scaling == 8


def test_every_unknown_target_is_listed_with_the_right_names() -> None:
    model = make_model("phi3")
    with pytest.raises(ConfigError) as e:
        resolve(model, ["q_proj", "o_proj", "gate_proj"])
    assert "'q_proj', 'gate_proj' are not modules" in e.value.message
    assert "o_proj, qkv_proj, gate_up_proj, down_proj" in e.value.message
    assert "qkv_proj for q_proj" in e.value.fix


def test_the_same_seed_gives_the_same_start() -> None:
    starts = [attach(m, LoraConfig(), resolve(m, None), seed) for seed in (3, 3, 4) for m in [make_model("llama")]]
    a, b, c = ([layer.lora_A for layer in s.values()] for s in starts)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))
