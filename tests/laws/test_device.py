"""A training step runs on the meta device: it creates no tensor on a hard-coded device and reads no device value.

Meta tensors have no values, so a step that reads one (``.item()``, ``if tensor``, a mask computed from ids) raises,
and so does a step that mixes in a CPU tensor. Code that passes also runs on a GPU.

The law can fail: an attention function that makes an index on the CPU raises, and so does a step that checks whether
the loss is finite.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.batching.collate import collate, to_device
from luthier.config import LoraConfig, TrainConfig
from luthier.kernels import attention as kernels
from luthier.lora.layers import attach, resolve
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training.forward import checkpointing, loss_sum, segment_attention
from luthier.training.loop import accumulate
from luthier.training.optimizer import Optimizer
from tests.conftest import _SIZE, ARCHITECTURES
from tests.helpers.rows import examples


def step(
    arch: str, tokenizer: Tokenizer, kernel: str = "auto", recompute: bool = False, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.device("meta"):
        config = AutoConfig.for_model(**{**_SIZE, **ARCHITECTURES[arch]})
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = LoraConfig(lora_dropout=0.1)
    layers = attach(model, lora, resolve(model, None), seed=0)
    parameters = [p for m in layers.values() for p in (m.lora_A, m.lora_B)]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    optimizer = Optimizer(parameters, TrainConfig())
    rows = examples(tokenizer)
    model.train()
    with segment_attention(model, kernel), checkpointing(model, recompute):
        loss = accumulate(
            partial(loss_sum, model),
            [to_device(collate(rows[:4]), "meta"), to_device(collate(rows[4:]), "meta")],
            optimizer,
        )
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)
    return loss, optimizer.update(1e-4)


@pytest.mark.parametrize("kernel", ["auto", "padded", "looped"])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_a_step_runs_without_values(arch: str, kernel: str, tokenizer: Tokenizer) -> None:
    loss, norm = step(arch, tokenizer, kernel)
    assert loss.is_meta
    assert norm.is_meta
    assert loss.dtype == torch.float32


def test_with_recomputation_too(tokenizer: Tokenizer) -> None:
    assert step("llama", tokenizer, recompute=True)[0].is_meta


def test_the_law_detects_a_tensor_on_a_fixed_device(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_causal", lambda length, *_: torch.zeros(length, length))
    with pytest.raises(RuntimeError, match="device"):
        step("llama", tokenizer, "padded")


def test_the_law_detects_a_step_that_reads_a_value(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Optimizer.update

    def reading(self: Optimizer, lr: float) -> torch.Tensor:
        norm = update(self, lr)
        assert bool(torch.isfinite(norm))
        return norm

    monkeypatch.setattr(Optimizer, "update", reading)
    with pytest.raises(RuntimeError, match="item.. cannot be called on meta tensors"):
        step("llama", tokenizer)
