"""Law "quantised": LoRA on a quantised base trains like on the dequantised weights, before and after an evaluation.

The law can fail: it detects a weight that an evaluation repacks, as bitsandbytes' own layer does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.batching.collate import collate, to_device
from luthier.compiled import compiled_model
from luthier.kernels import native
from luthier.kernels.dropout import DropoutState
from luthier.lora.layers import LoraLinear
from luthier.models.directory import read_config
from luthier.models.loader import load_weights
from luthier.models.quantization import Quantisation, QuantLinear, dequantise, quantise
from luthier.models.quantized_loader import QuantisedOptions, load_quantised
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training.forward import checkpointing, loss_sum, segment_attention
from luthier.types import Example
from tests.helpers.published import PUBLISHED
from tests.helpers.rows import examples, fails, gradients, with_adapter, worst

CPU = torch.device("cpu")
KINDS = [Quantisation("nf4"), Quantisation("nf4", double=False), Quantisation("fp4"), Quantisation("int8")]


def quantised(path: Path, dtype: torch.dtype = torch.float32, how: Quantisation = KINDS[0]) -> Any:
    return load_quantised(path, dtype, CPU, read_config(path), QuantisedOptions(how, dtype, cache=False))


def dequantised(path: Path, model: Any) -> Any:
    """Load the same model in fp32 with the dequantised linear weights."""
    plain = load_weights(path, torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            plain.get_submodule(name).weight.data = layer.dequantised(torch.float32)
    return plain


def step(
    model: Any, layers: dict[str, LoraLinear], rows: list[Example], recompute: bool = False, compiled: bool = False
) -> Any:
    batch = to_device(collate(rows), "cpu")
    model.train()
    if compiled:
        with compiled_model(model, layers, DropoutState(), recompute) as compiled_layers:
            compiled_layers.loss_sum(batch).backward()
        return gradients(layers)
    with segment_attention(model), checkpointing(model, recompute):
        loss_sum(model, batch).backward()
    return gradients(layers)


def evaluate(model: Any, rows: list[Example]) -> None:
    model.eval()
    with torch.no_grad():
        model(torch.from_numpy(rows[0].ids)[None])
        model(torch.from_numpy(rows[1].ids)[None])


def law(path: Path, rows: list[Example], how: Quantisation, recompute: bool = False, compiled: bool = False) -> None:
    small = quantised(path, how=how)
    plain = dequantised(path, small)
    a, b = with_adapter(small), with_adapter(plain)
    assert worst(step(small, a, rows, recompute, compiled), step(plain, b, rows)) < 1e-4
    evaluate(small, rows)
    assert worst(step(small, a, rows, recompute, compiled), step(plain, b, rows)) < 1e-4


@pytest.mark.parametrize("how", KINDS, ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "glm"])
def test_gradients_equal_those_with_dequantised_weights(
    arch: str, how: Quantisation, model_dir: Callable[[str], Path], tokenizer: Tokenizer
) -> None:
    law(model_dir(arch), examples(tokenizer), how)


def test_with_recomputation_too(model_dir: Callable[[str], Path], tokenizer: Tokenizer) -> None:
    law(model_dir("llama"), examples(tokenizer), KINDS[0], recompute=True)


@pytest.mark.skipif(native.why_unavailable(torch.float32) is not None, reason="no compiled kernels here")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("how", KINDS, ids=str)
def test_compiled_layers_dequantise_to_the_same_floats(
    how: Quantisation, recompute: bool, model_dir: Callable[[str], Path], tokenizer: Tokenizer
) -> None:
    law(model_dir("qwen2"), examples(tokenizer, 3), how, recompute, compiled=True)


def test_bfloat16_is_no_less_accurate_than_an_unquantised_run(
    model_dir: Callable[[str], Path], tokenizer: Tokenizer
) -> None:
    path, rows = model_dir("llama"), examples(tokenizer)
    small = quantised(path, torch.bfloat16)
    exact = dequantised(path, small)
    half = dequantised(path, small).to(torch.bfloat16)
    truth = step(exact, with_adapter(exact), rows)
    ours = worst(step(small, with_adapter(small), rows), truth)
    theirs = worst(step(half, with_adapter(half), rows), truth)
    assert ours < 1.3 * theirs


def test_the_law_detects_a_weight_that_an_evaluation_repacks(
    model_dir: Callable[[str], Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = QuantLinear.forward

    def repacking(self: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and not self.training:
            self.packed = self.packed.roll(1)
        return forward(self, x)

    monkeypatch.setattr(QuantLinear, "forward", repacking)
    assert fails(lambda: law(model_dir("llama"), examples(tokenizer), KINDS[0]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_family_loads_quantised(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With split and fused tensors, the embedding on disk and the head in 16 bits; the cached copy gives the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("luthier.models.native_model.PIECE", 6400)  # pieces of 100 rows
    path = PUBLISHED[name](tmp_path / "model")
    config, ids = read_config(path), torch.randint(0, 600, (2, 12), generator=torch.Generator().manual_seed(1))
    messages: list[str] = []
    outputs = []
    for cache in (True, True, False):
        model = load_quantised(
            path, torch.float32, CPU, config, QuantisedOptions(KINDS[0], torch.float32, cache), messages.append
        )
        with torch.no_grad():
            outputs.append(model(ids).logits)
        assert not [n for n, m in model.named_modules() if type(m) is nn.Linear]
        if cache:
            assert type(model.get_input_embeddings()).__name__ == "RowEmbedding"
        assert model.get_output_embeddings().weight.dtype is torch.bfloat16
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])
    assert any("loading the quantised copy" in s for s in messages)
    with torch.no_grad():
        plain = dequantised(path, model)
        plain.lm_head.weight.data = model.get_output_embeddings().weight.data.float()
        assert (plain(ids).logits - outputs[0]).abs().max() < 1e-5


def test_quantised_tensors_have_the_counted_bytes() -> None:
    # 80 and 30 columns: blocks of 64 extend over the ends of rows, and the last block is not full
    for (rows, columns), how in itertools.product(((48, 128), (48, 80), (15, 30)), KINDS):
        weight = torch.randn(rows, columns)
        parts = quantise(weight, how)
        assert tuple(parts) == how.parts
        assert sum(t.numel() * t.element_size() for t in parts.values()) == how.bytes_of(rows, columns)
        off = (dequantise(parts, how, (rows, columns), torch.float32) - weight).norm() / weight.norm()
        assert off < (0.01 if how.kind == "int8" else 0.14)
