"""Law "round trip": saved and loaded, in luthier and in stock ``peft``, an adapter gives identical logits;
a wrong base model is refused, with every mismatch listed.

The law can fail: it detects an adapter directory with a wrong ``lora_alpha``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier._util import files
from luthier.adapters import directory as adapters
from luthier.config import LoraConfig
from luthier.errors import AdapterError
from luthier.lora.layers import resolve
from luthier.models.directory import fingerprint, read_config
from luthier.models.loader import load_weights
from tests.conftest import ARCHITECTURES
from tests.helpers.rows import fails, with_adapter

IDS = torch.arange(3, 43).view(2, 20)
LORA = LoraConfig(r=4, lora_alpha=8)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def saved(base: Path, path: Path, lora: LoraConfig = LORA, targets: Any = None) -> torch.Tensor:
    """Write an adapter; return the logits of the model from which it was saved."""
    model = load_weights(base, torch.float32)
    resolved = resolve(model, targets)
    layers = with_adapter(model, **lora.model_dump(include={"r", "lora_alpha", "use_rslora"}))
    if targets:
        from luthier.lora.layers import detach

        left = {n: m for n, m in layers.items() if n not in resolved.modules}
        detach(model, left)
        layers = {n: m for n, m in layers.items() if n in resolved.modules}
    facts = adapters.Facts("sys", {"name": "chatml"}, "x", (2,), fingerprint(base, read_config(base)), "t", "d")
    adapters.save(path, layers, lora, resolved, facts, base)
    return logits(model)


def same_in_both(base: Path, path: Path, expected: torch.Tensor) -> None:
    ours = load_weights(base, torch.float32)
    adapters.apply(ours, adapters.load(path))
    assert torch.equal(logits(ours), expected)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path)
    assert float((logits(theirs.eval()) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_luthier_and_peft_give_the_same_logits(arch: str, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base = model_dir(arch)
    expected = saved(base, tmp_path / "adapter")
    assert float((expected - logits(load_weights(base, torch.float32))).abs().max()) > 0.1
    same_in_both(base, tmp_path / "adapter", expected)


def test_rank_stabilised_adapters_and_those_of_some_modules_give_the_same_logits(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    base = model_dir("llama")
    lora = LoraConfig(r=4, lora_alpha=8, use_rslora=True)
    same_in_both(base, tmp_path / "a", saved(base, tmp_path / "a", lora))
    same_in_both(base, tmp_path / "b", saved(base, tmp_path / "b", LORA, ["q_proj", "layers.1.mlp.down_proj"]))


def test_the_law_detects_a_wrong_alpha(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base = model_dir("llama")
    expected = saved(base, tmp_path / "adapter")
    config = tmp_path / "adapter" / adapters.CONFIG
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "lora_alpha": 16}))
    assert fails(lambda: same_in_both(base, tmp_path / "adapter", expected))


@pytest.mark.smollm2
def test_smollm2_adapter_loads_in_stock_peft(smollm2: Path, tmp_path: Path) -> None:
    same_in_both(smollm2, tmp_path / "adapter", saved(smollm2, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=2)))


def test_a_wrong_base_is_refused_with_every_mismatch(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    saved(model_dir("llama"), tmp_path / "adapter")
    adapter = adapters.load(tmp_path / "adapter")
    other = model_dir("phi3")
    with pytest.raises(AdapterError) as e:
        adapters.check_base(adapter, other, fingerprint(other, read_config(other)), "another")
    assert "model_type is phi3, the adapter's base has llama" in e.value.message
    assert "weights differ" in e.value.message
    assert "the tokenizer differs" in e.value.message
    narrow = replace(adapter, modules=adapter.modules[:3])
    with pytest.raises(AdapterError, match=r"which the base model does not have"):
        adapters.apply(load_weights(other, torch.float32), narrow)


def test_the_same_base_in_another_dtype_and_other_shards_is_accepted(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    base = model_dir("llama")
    config = read_config(base)
    model = load_weights(base, torch.bfloat16)
    model.save_pretrained(tmp_path / "copy", max_shard_size="50KB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "copy", config) == fingerprint(base, config)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert fingerprint(tmp_path / "other", config).mismatches(fingerprint(base, config))


@pytest.mark.parametrize("fault", ["flip", "cut", "gone", "meta", "config"])
def test_a_damaged_adapter_is_refused(fault: str, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    saved(model_dir("llama"), path)
    weights = path / adapters.WEIGHTS
    raw = bytearray(weights.read_bytes())
    if fault == "flip":
        raw[-3] ^= 1
        weights.write_bytes(raw)
    elif fault == "cut":
        weights.write_bytes(raw[:-100])
    elif fault == "gone":
        weights.unlink()
    else:
        file = path / (adapters.META if fault == "meta" else adapters.CONFIG)
        file.write_text("{")
    with pytest.raises(AdapterError):
        adapters.load(path)


def test_tensors_of_another_shape_are_listed(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base, path = model_dir("llama"), tmp_path / "adapter"
    saved(base, path)
    tensors = load_file(path / adapters.WEIGHTS)
    name = next(n for n in tensors if n.endswith("lora_B.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path / adapters.WEIGHTS)
    meta = json.loads((path / adapters.META).read_text())
    meta["files"][adapters.WEIGHTS] = files.sha256(path / adapters.WEIGHTS)
    (path / adapters.META).write_text(json.dumps(meta))
    with pytest.raises(AdapterError, match="the base needs"):
        adapters.apply(load_weights(base, torch.float32), adapters.load(path))
    shutil.rmtree(path)
