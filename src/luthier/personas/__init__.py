"""Ship the training rows of two personas, and the settings of ``luthier demo``.

keeper.train.jsonl      Marlow, keeper of the Gannet Rock light, on ship-to-shore radio (English)
keeper.heldout.jsonl    held-out questions to him, which are never trained on
teahouse.zh.jsonl       陆掌柜, keeper of a tea house in a water town (Chinese)
"""

from __future__ import annotations

from pathlib import Path

from luthier.config import RunConfig, build

FOLDER = Path(__file__).parent
TRAIN = FOLDER / "keeper.train.jsonl"
HELD_OUT = FOLDER / "keeper.heldout.jsonl"
TEAHOUSE = FOLDER / "teahouse.zh.jsonl"


def config(model: Path, output_dir: Path) -> RunConfig:
    """Return settings that train the keeper persona in a few minutes on two CPU cores."""
    return build(
        {
            "model": {"path": model},
            "data": {"train": TRAIN, "eval": HELD_OUT, "max_length": 512},
            "lora": {"r": 16, "lora_alpha": 32},
            "train": {
                "num_train_epochs": 3,  # after two epochs, one seed in four left a held-out reply without a stop token
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-3,
                "eval_time_ratio": 0,  # the demo evaluates by itself, in fp32
            },
            "output_dir": output_dir,
        }
    )
