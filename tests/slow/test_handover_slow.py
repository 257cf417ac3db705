"""Merged and exported models at their real size: stock libraries and llama.cpp agree with luthier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import luthier
from luthier import personas
from luthier.adapters.locate import locate_tuned
from luthier.config import build
from luthier.evaluation.agreement import chats
from luthier.models.tokenizer.tokenizer import TOKENIZER_FILES
from tests.exporting.test_exporting import counted

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps with a system prompt: enough to change every reply."""
    path = tmp_path_factory.mktemp("run") / "marlow"
    train: dict[str, Any] = {"max_steps": 12, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    luthier.train(
        build(
            {
                "model": {"path": smollm2},
                "data": {"train": personas.TRAIN, "max_length": 256, "system": "You are Marlow."},
                "train": {**train, "learning_rate": 1e-3},
                "output_dir": path,
            }
        )
    )
    return path


@torch.no_grad()
def logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([row])).logits[0] for row in rows])


def test_stock_libraries_compute_the_same_logits_as_luthier(run: Path, smollm2: Path, tmp_path: Path) -> None:
    done = luthier.merge(run, tmp_path / "merged")
    print(
        json.dumps({"maximum": done.closeness.largest, "mean": done.closeness.mean, "adapter": done.closeness.adapter})
    )
    assert done.closeness.largest < 1e-3 and done.closeness.adapter > 0.1
    for name in TOKENIZER_FILES:
        if (smollm2 / name).is_file():
            assert (tmp_path / "merged" / name).read_bytes() == (smollm2 / name).read_bytes()
    tuned = locate_tuned(run)
    rows = [tuned.chat_format().prompt_ids(chat) for chat in chats(tuned.system)[:4]]
    expected = logits(luthier.chat(run).generator.model, rows)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    adapted = logits(PeftModel.from_pretrained(base, run / "adapter").eval(), rows)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval(), rows)
    for name, theirs in (("adapter", adapted), ("merged", merged)):
        error = float((theirs - expected).abs().max() / expected.abs().max())
        print(json.dumps({name: error}))
        assert error < 1e-5


def test_llama_cpp_gives_the_replies_of_the_tuned_model(run: Path, tmp_path: Path) -> None:
    for to in ("gguf", "gguf-lora"):
        done = luthier.export(run, to, tmp_path / to)
        print(json.dumps(done.as_dict()))
        same, tokens, furthest = counted(done.verification[-1])
        assert same >= 15 and tokens > 300 and furthest < 0.01  # one near-tie, decided by the order of sums
    done = luthier.export(run, "gguf", tmp_path / "q8_0", quantization="q8_0")
    print(json.dumps(done.as_dict()))
    assert done.not_verified is None
