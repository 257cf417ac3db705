"""Law "reference": luthier trains like ``transformers`` and ``peft`` on the same rows in the same order.

The reference uses their parts only: padded batches, their loss, their LoRA, torch's AdamW. Both start from one adapter.
First-step loss within 1e-6 relative, gradients within 5e-5 (norm of the difference over norm, per tensor), losses
of 20 steps within 1e-4.

The law can fail: it detects division by the supervised tokens of a micro-batch instead of the step, and a learning rate
with an error of 0.1 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from luthier import personas
from luthier.adapters import directory as adapters
from luthier.batching.collate import collate, to_device
from luthier.batching.plan import Plan
from luthier.config import LoraConfig, TrainConfig
from luthier.data.loader import DataReport
from luthier.encoding.encoder import Encoder
from luthier.lora.layers import LoraLinear, resolve
from luthier.models.chat_format import load_chat_format
from luthier.models.directory import Fingerprint
from luthier.models.loader import load_weights
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training import loop
from luthier.training.forward import loss_sum, segment_attention
from luthier.training.optimizer import Optimizer, learning_rate
from luthier.types import Example
from tests.conftest import ARCHITECTURES, make_model
from tests.helpers.rows import encode, examples, fails, gradients, load, padded, with_adapter, worst

LORA = LoraConfig(r=4, lora_alpha=8)
TRAIN = TrainConfig(max_steps=20, per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=3e-3)
FACTS = adapters.Facts(None, {"name": "chatml"}, "", (2,), Fingerprint({}, ""), "", "")


@dataclass
class Pair:
    """One base model and adapter, loaded twice: in luthier, and in transformers and peft."""

    ours: Any
    layers: dict[str, LoraLinear]
    theirs: Any


def pair(build: Any, tmp: Path) -> Pair:
    ours = build()
    layers = with_adapter(ours)
    adapters.save(tmp / "start", layers, LORA, resolve(build(), None), FACTS, Path("base"))
    theirs = PeftModel.from_pretrained(build(), tmp / "start", is_trainable=True)
    return Pair(ours, layers, theirs)


def their_loss(model: Any, rows: Sequence[Example], supervised: int) -> torch.Tensor:
    ids, mask, labels = padded(rows)
    out: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=supervised).loss
    return out


def their_gradients(model: Any) -> dict[str, torch.Tensor]:
    by_name = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            by_name[f"{module}.lora_{rest[0]}"] = p.grad.clone()
    return by_name


def first_step(both: Pair, rows: list[Example], own_count: bool = False) -> None:
    supervised = sum(e.supervised for e in rows)
    optimizer = Optimizer([p for m in both.layers.values() for p in (m.lora_A, m.lora_B)], TRAIN)
    batches = [to_device(collate(rows[i : i + 2]), "cpu") for i in range(0, len(rows), 2)]
    loss_of = partial(loss_sum, both.ours)
    with segment_attention(both.ours):
        if own_count:
            for batch in batches:
                loop.accumulate(loss_of, [batch], optimizer)
            loss = loop.accumulate(loss_of, batches[:1], optimizer)
        else:
            loss = loop.accumulate(loss_of, batches, optimizer)
    expected = their_loss(both.theirs, rows, supervised)
    expected.backward()  # type: ignore[no-untyped-call]
    difference = worst(gradients(both.layers), their_gradients(both.theirs))
    both.theirs.zero_grad()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert difference < 5e-5


def twenty_steps(both: Pair, rows: list[Example], config: TrainConfig, rate_error: float = 1.0) -> list[float]:
    ours = loop.train(both.ours, both.layers, rows, config).losses
    parameters = [p for p in both.theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    plan = Plan.of(len(rows), config)
    theirs = []
    for step in range(plan.steps):
        chosen = [rows[i] for micro in plan.step(step) for i in micro]
        loss = their_loss(both.theirs, chosen, sum(e.supervised for e in chosen))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, plan.steps, config) * rate_error
        adamw.step()
        adamw.zero_grad()
        theirs.append(float(loss.detach()))
    assert len(ours) == len(theirs) == 20
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    return ours


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_first_step_equals_transformers_and_peft(arch: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    first_step(pair(lambda: make_model(arch), tmp_path), examples(tokenizer, 8))


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_twenty_steps_equal_transformers_and_peft(scheduler: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = TRAIN.model_copy(update={"lr_scheduler_type": scheduler, "warmup_ratio": 0.2, "weight_decay": 0.01})
    losses = twenty_steps(pair(lambda: make_model("llama"), tmp_path), examples(tokenizer, 7), config)
    assert losses[-1] < losses[0] - 0.5


def test_the_law_detects_division_by_a_micro_batchs_count(tmp_path: Path, tokenizer: Tokenizer) -> None:
    both = pair(lambda: make_model("llama"), tmp_path)
    assert fails(lambda: first_step(both, examples(tokenizer, 8), own_count=True))


def test_the_law_detects_a_wrong_learning_rate(tmp_path: Path, tokenizer: Tokenizer) -> None:
    both = pair(lambda: make_model("llama"), tmp_path)
    assert fails(lambda: twenty_steps(both, examples(tokenizer, 7), TRAIN, rate_error=1.001) and None)


@pytest.fixture
def embedded(smollm2: Path, tmp_path: Path) -> tuple[Pair, list[Example]]:
    """Load the embedded model in fp32 twice, and the shortest rows of the shipped persona."""
    v = load_chat_format(smollm2)
    rows = load(personas.TRAIN).conversations[:24]
    encoded = encode(Encoder(v.template, v.tokenizer, v.stop_ids, 512), rows, DataReport())
    return pair(lambda: load_weights(smollm2, torch.float32), tmp_path), sorted(encoded, key=len)


@pytest.mark.smollm2
def test_smollm2_equals_transformers_and_peft(embedded: tuple[Pair, list[Example]]) -> None:
    first_step(embedded[0], embedded[1][:6])


@pytest.mark.slow
@pytest.mark.smollm2
def test_twenty_steps_of_smollm2_equal_transformers_and_peft(embedded: tuple[Pair, list[Example]]) -> None:
    config = TrainConfig(max_steps=20, per_device_train_batch_size=1, gradient_accumulation_steps=1, learning_rate=2e-4)
    losses = twenty_steps(*embedded, config)
    assert all(map(math.isfinite, losses))
