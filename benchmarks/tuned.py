"""Train luthier's side of the comparison: the same rows, settings and number of steps with ``luthier.train``.

    python benchmarks/tuned.py --model DIR --data ROWS.json --dropout 0.1 --set train.NAME=false

Prints one JSON line. train_seconds: from the first step's start to the last one's end, as in ``summary.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any, get_args

from luthier import config as configs
from luthier._util.environment import KEEP_FREED_MEMORY
from luthier.config import RunConfig, TrainConfig
from luthier.verbs.train import train
from workload import ACCUMULATION, ALPHA, BATCH, LEARNING_RATE, MAX_LENGTH, SYSTEM, R

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def config(model: Path, data: Path, to: Path, dropout: float, dtype: str, settings: list[str]) -> RunConfig:
    """Build the configuration equal to the recipe's; Trainer's default schedule is linear without warm-up."""
    values: dict[str, Any] = {
        "model": {"path": str(model), "dtype": _DTYPES[dtype]},
        "data": {"train": str(data), "system": SYSTEM, "max_length": MAX_LENGTH},
        "lora": {"r": R, "lora_alpha": ALPHA, "lora_dropout": dropout},
        "train": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.0,
            "eval_time_ratio": 0.0,
        },
        "output_dir": str(to),
    }
    return configs.build(values, settings=settings)


def switches() -> list[str]:
    """List the ``--set`` values that each turn off one of the boolean options in ``train``."""
    options = []
    for name, field in TrainConfig.model_fields.items():
        if name != "gradient_checkpointing" and (field.annotation is bool or bool in get_args(field.annotation)):
            options.append(f"train.{name}=false")
    return options


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/tuned.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bf16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    a = parser.parse_args()
    os.environ.setdefault(KEEP_FREED_MEMORY, "1")  # as a command does
    with tempfile.TemporaryDirectory() as folder:
        summary = train(config(a.model, a.data, Path(folder) / "run", a.dropout, a.dtype, a.set), force=True)
    keys = ("tokens", "supervised_tokens", "train_seconds", "tokens_per_s", "peak_rss_bytes", "losses")
    print(json.dumps({name: value for name, value in summary.items() if name in keys}))


if __name__ == "__main__":
    main()
