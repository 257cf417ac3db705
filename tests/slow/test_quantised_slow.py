"""How much quality a 4-bit base model costs, on the run of the demo: minutes on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import luthier
from luthier import personas
from luthier.evaluation.scoring import held_out_loss
from luthier.models.loader import open_base
from luthier.verbs.check import inspect

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]
CPU = torch.device("cpu")


def test_a_4_bit_base_learns_as_well_as_a_16_bit_one(smollm2: Path, tmp_path: Path) -> None:
    """Compare held-out losses with a base in nf4 and in bf16, before and after training, in fp32 on the same rows."""
    before, after = {}, {}
    for kind, settings in {"bf16": {"dtype": "bfloat16"}, "nf4": {"load_in_4bit": True}}.items():
        run = personas.config(smollm2, tmp_path / kind)
        run = run.model_copy(update={"model": run.model.model_copy(update=settings)})
        prepared = inspect(run).prepared()
        rows = prepared.rows.held_out
        before[kind] = held_out_loss(open_base(run.model, torch.float32, CPU, prepared.chat_format.config), rows).loss
        luthier.train(run)
        after[kind] = held_out_loss(luthier.chat(run.output_dir).generator.model, rows).loss
    gaps = {"before": before["nf4"] - before["bf16"], "after": after["nf4"] - after["bf16"]}
    print({"before": before, "after": after, "gap": gaps})
    assert after["bf16"] < 0.65 * before["bf16"]
    assert gaps["after"] < 0.10
