"""Train the baseline: transformers' Trainer and peft as in the tutorials, with padded batches and all logits.

    python benchmarks/recipe.py --model DIR --data ROWS.json --dropout 0.1 --gradient-checkpointing

Prints one JSON line. train_seconds: duration of ``Trainer.train``. Tokens do not include padding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from luthier.devices.device import peak_rss_bytes
from workload import ACCUMULATION, ALPHA, BATCH, LEARNING_RATE, MAX_LENGTH, SYSTEM, R

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def encode(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Encode one row with the tutorials' function."""
    prompt = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{row['instruction'] + row['input']}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply = tokenizer(f"{row['output']}<|im_end|>\n", add_special_tokens=False)["input_ids"]
    labels = [-100] * len(ids) + reply
    ids = (ids + reply)[:MAX_LENGTH]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels[:MAX_LENGTH]}


def train(
    model_dir: Path, rows: list[dict[str, str]], dropout: float, dtype: str, checkpointing: bool
) -> dict[str, Any]:
    """Train one epoch over the rows and return the measurements."""
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ds = Dataset.from_list(rows)
    ds = ds.map(lambda row: encode(tokenizer, row), remove_columns=ds.column_names)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch_dtype)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, target_modules=TARGETS, r=R, lora_alpha=ALPHA, lora_dropout=dropout
    )
    model = get_peft_model(model, config)
    if checkpointing:
        model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                gradient_accumulation_steps=ACCUMULATION,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                gradient_checkpointing=checkpointing,
                bf16=dtype == "bf16",
                use_cpu=not torch.cuda.is_available(),
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=ds,
            data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    tokens = sum(map(len, ds["input_ids"]))
    return {
        "tokens": tokens,
        "supervised_tokens": sum(sum(x != -100 for x in row) for row in ds["labels"]),
        "train_seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "losses": [float(x["loss"]) for x in trainer.state.log_history if "loss" in x],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/recipe.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="a ChatML model's directory")
    parser.add_argument("--data", required=True, type=Path, help="a JSON array of instruction rows")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    a = parser.parse_args()
    rows = json.loads(a.data.read_text(encoding="utf-8"))
    print(json.dumps(train(a.model, rows, a.dropout, a.dtype, a.gradient_checkpointing)))


if __name__ == "__main__":
    main()
