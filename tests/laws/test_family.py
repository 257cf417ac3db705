"""Law "family": a loaded checkpoint computes what its publication defines, and is written back unchanged.

The law can fail: it detects a wrong rotary base, rows that are not normalised, and a fused matrix split at a wrong row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import luthier
from luthier.adapters import directory as adapters
from luthier.adapters.locate import locate_tuned
from luthier.adapters.original_names import Update, to_native, to_original
from luthier.config import LoraConfig
from luthier.exporting.merge import LAYOUTS, merged_tensors, pending_updates
from luthier.models.directory import family_of, read_config
from luthier.models.loader import load_weights
from tests.helpers import published
from tests.helpers.definitions import baichuan2_logits, glm4_logits
from tests.helpers.published import PUBLISHED, read_tensors
from tests.helpers.rows import with_adapter

IDS = torch.randint(0, 700, (2, 40), generator=torch.Generator().manual_seed(5))
ORIGINAL = {"baichuan2": baichuan2_logits, "glm4": glm4_logits}


def logits(path: Path, **kwargs: Any) -> Tensor:
    model = load_weights(path, torch.float32, config=read_config(path, **kwargs))
    with torch.no_grad():
        output: Tensor = model(IDS).logits
    return output


@pytest.mark.parametrize("name", ORIGINAL)
def test_it_computes_the_independent_definition(name: str, tmp_path: Path) -> None:
    path = PUBLISHED[name](tmp_path)
    expected = ORIGINAL[name](read_tensors(path), published.read_config(path), IDS)
    assert (logits(path) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - set(ORIGINAL)))
def test_native_checkpoints_load_as_transformers_loads_them(name: str, tmp_path: Path) -> None:
    path = PUBLISHED[name](tmp_path)
    ours = load_weights(path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    for (a, x), (b, y) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a == b and torch.equal(x, y)
    for (a, x), (b, y) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert a == b and torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("weights", ["bin", "bin-shards", "safetensors"])
def test_every_file_format_gives_the_same_model(weights: Any, tmp_path: Path) -> None:
    path = published.baichuan2(tmp_path / weights, weights)
    assert torch.equal(logits(path), logits(published.baichuan2(tmp_path / "plain", "safetensors")))


def both_layouts(path: Path, folder: Path, with_updates: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Merge and return the tensors in the native layout, and in the base's own."""
    model = load_weights(path, torch.float32)
    layers = with_adapter(model)
    config = LoraConfig.model_validate({"r": 4, "lora_alpha": 8})
    adapters.save_plain(folder, {n: Update(m.lora_A, m.lora_B, config) for n, m in layers.items()}, path)
    tuned = locate_tuned(None, path, folder)
    chat_format = tuned.chat_format()
    pending = pending_updates(tuned, chat_format) if with_updates else {}
    native, original = (dict(merged_tensors(tuned, chat_format, pending, layout)) for layout in LAYOUTS)
    return native, original


@pytest.mark.parametrize("name", ORIGINAL)
def test_converting_there_and_back_gives_the_same_checkpoint(name: str, tmp_path: Path) -> None:
    path = PUBLISHED[name](tmp_path / "base")
    before = read_tensors(path)
    _, original = both_layouts(path, tmp_path / "adapter", with_updates=False)
    assert set(original) == set(before)
    assert all(torch.equal(original[n], before[n]) for n in before)


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_merged_checkpoint_is_the_same_model_in_both_layouts(name: str, tmp_path: Path) -> None:
    path = PUBLISHED[name](tmp_path / "base")
    native, original = both_layouts(path, tmp_path / "adapter", with_updates=True)
    before, rules = read_tensors(path), family_of(path).rules(read_config(path))
    assert {part for rule in rules for part in rule.parts} == set(native)
    changed = 0
    for rule in rules:
        whole = original[rule.source]
        changed += not torch.equal(whole, before[rule.source])
        for part, tensor in rule.split(whole, whole.dtype):
            assert torch.equal(tensor, native[part]), part
    assert changed == len(family_of(path).modules(read_config(path)))


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_law_detects_a_lost_setting(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = PUBLISHED[name](tmp_path)
    expected = ORIGINAL[name](read_tensors(path), published.read_config(path), IDS)
    if name == "glm4":
        assert (logits(path, rope_theta=10000.0) - expected).abs().max() > 1e-3  # rope_ratio lost
    else:
        monkeypatch.setattr("luthier.models.families.base.F.normalize", lambda x, **_: x)
        assert (logits(path) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ORIGINAL)
def test_adapters_of_the_original_modules_are_the_same_update(name: str, tmp_path: Path) -> None:
    """A rank-r update of a fused matrix, split by rows, and three updates stacked to rank 3r give the same weights."""
    path = PUBLISHED[name](tmp_path)
    config = read_config(path)
    modules = family_of(path).modules(config)
    tensors = read_tensors(path)
    torch.manual_seed(0)
    lora = LoraConfig.model_validate({"r": 4, "lora_alpha": 8})
    shapes = {source: tensors[f"{source}.weight"].shape for source in modules}
    fused = {n: Update(torch.randn(4, wide), torch.randn(high, 4), lora) for n, (high, wide) in shapes.items()}
    native = to_native(fused, modules)
    for source, parts in modules.items():
        whole = torch.cat([native[part].b @ native[part].a for part, _ in parts])
        torch.testing.assert_close(whole, fused[source].b @ fused[source].a)
    apart = {n: Update(torch.randn_like(u.a), u.b, lora) for n, u in native.items()}
    apart.pop(next(n for n in apart if n.endswith("k_proj")))  # one that was not trained
    stacked = to_original(apart, modules)
    back = to_native(stacked, modules)
    for part, update in back.items():
        expected = apart[part].b @ apart[part].a if part in apart else torch.zeros(update.b.shape[0], update.a.shape[1])
        torch.testing.assert_close(update.b @ update.a, expected)
        scale = update.config.lora_alpha / update.config.r
        assert scale == pytest.approx(2.0)


def test_the_hf_checkpoint_keeps_its_published_base_and_reports_it(tmp_path: Path) -> None:
    path = published.glm4_hf(tmp_path)
    config = read_config(path)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert "5000000" in " ".join(family_of(path).notes(config))
    other = read_config(path, rope_theta=5e6)
    assert family_of(path).notes(other) == ()
    assert (logits(path) - logits(path, rope_theta=5e6)).abs().max() > 1e-3


@pytest.mark.parametrize("name", PUBLISHED)
def test_load_model_returns_the_model_that_training_uses(name: str, tmp_path: Path) -> None:
    path = PUBLISHED[name](tmp_path)
    model, _ = luthier.load_model(path)
    assert model.dtype is torch.float32
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits(path))
    for file in ("tokenizer.json", "tokenizer.model"):
        (path / file).unlink(missing_ok=True)
    assert luthier.load_model(path)[1] is None
