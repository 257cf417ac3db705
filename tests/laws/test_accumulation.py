"""Law "accumulation": loss and gradient do not depend on how a step's rows are split into micro-batches.

The law can fail: it detects an average of the micro-batches' means, a common bug of trainers that gives tokens of
different rows different weights.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from luthier.batching.collate import collate, to_device
from luthier.config import TrainConfig
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training.forward import checkpointing, loss_sum, segment_attention
from luthier.training.loop import accumulate
from luthier.training.optimizer import Optimizer
from luthier.types import Example
from tests.conftest import make_model
from tests.helpers.rows import examples, gradients, with_adapter, worst


def step(rows: list[Example], micro: int, recompute: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    model = make_model("llama")
    layers = with_adapter(model)
    optimizer = Optimizer([p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)], TrainConfig())
    batches = [to_device(collate(rows[i : i + micro]), "cpu") for i in range(0, len(rows), micro)]
    model.train()
    with segment_attention(model), checkpointing(model, recompute):
        loss = accumulate(partial(loss_sum, model), batches, optimizer)
    return float(loss), gradients(layers)


def mean_of_means(rows: list[Example], micro: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The fault."""
    model = make_model("llama")
    layers = with_adapter(model)
    cuts = [rows[i : i + micro] for i in range(0, len(rows), micro)]
    total = 0.0
    with segment_attention(model):
        for cut in cuts:
            batch = to_device(collate(cut), "cpu")
            loss = loss_sum(model, batch) / batch.target_ids.shape[0] / len(cuts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return total, gradients(layers)


@pytest.mark.parametrize("micro", [1, 2, 3, 7])
def test_eight_micro_batches_of_one_equal_one_of_eight(micro: int, tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 8)
    assert len({len(r) for r in rows}) > 3
    loss, grads = step(rows, 8)
    other, other_grads = step(rows, micro)
    assert other == pytest.approx(loss, rel=1e-6)
    assert worst(other_grads, grads) < 5e-6


def test_gradient_checkpointing_changes_nothing(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 8)
    loss, grads = step(rows, 4)
    other, other_grads = step(rows, 4, recompute=True)
    assert other == loss
    assert worst(other_grads, grads) < 1e-6


def test_the_law_detects_a_mean_of_means(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 8)
    loss, grads = step(rows, 8)
    other, other_grads = mean_of_means(rows, 1)
    assert other != pytest.approx(loss, rel=1e-3)
    assert worst(other_grads, grads) > 1e-2
