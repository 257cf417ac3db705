"""The real demo compared with ``transformers`` + ``peft`` on the same rows and steps: minutes on two cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import luthier
from luthier import config as configs
from luthier import personas
from luthier.batching.plan import Plan
from luthier.devices.device import pick_dtype
from luthier.evaluation.scoring import held_out_loss
from luthier.training.optimizer import learning_rate
from luthier.types import Example
from luthier.verbs.check import inspect
from tests.helpers.rows import padded

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]


def peft_on_the_same_steps(base: Path, config: configs.RunConfig, rows: list[Example]) -> Any:
    """Train with stock parts only: padded batches, the loss of transformers, the LoRA of PEFT, AdamW of torch."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    torch.manual_seed(config.train.seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
        PeftConfig(
            r=config.lora.r,
            lora_alpha=int(config.lora.lora_alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=1.0, weight_decay=config.train.weight_decay)
    plan = Plan.of(len(rows), config.train)
    for step in range(plan.steps):
        for micro in plan.step(step):
            ids, mask, labels = padded([rows[i] for i in micro])
            count = sum(rows[i].supervised for m in plan.step(step) for i in m)
            model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, plan.steps, config.train)
        adamw.step()
        adamw.zero_grad()
    return model


def test_the_demo_trains_the_persona_as_well_as_peft_does(smollm2: Path, tmp_path: Path) -> None:
    result = luthier.demo(tmp_path / "run")
    print(json.dumps({"base": result.base_loss, "tuned": result.tuned_loss, "stop_rate": result.stop_rate}))
    assert len(result.prompts) == 24
    assert result.stop_rate == 1
    assert result.loss_fall >= 0.35
    signs = ("Gannet Rock here.", "Marlow out.")
    assert sum(all(s in r.text for s in signs) for r in result.tuned_replies) >= 22
    assert not any(s in r.text for s in signs for r in result.base_replies)

    config = personas.config(smollm2, tmp_path / "run")
    model = peft_on_the_same_steps(smollm2, config, list(inspect(config).rows.train))
    model.save_pretrained(tmp_path / "theirs")
    fp32 = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    merged = PeftModel.from_pretrained(fp32, tmp_path / "theirs").merge_and_unload()
    held_out = inspect(config).rows.held_out
    theirs = held_out_loss(merged, held_out).loss
    print(json.dumps({"peft": theirs}))
    assert abs(result.tuned_loss - theirs) < 0.05
