"""Write tests/golden/run: a tiny model, an adapter and a checkpoint, to test that later versions can read them.

Run once, with the version whose files are wanted: ``python -m tests.helpers.make_golden_run``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import luthier
from luthier import config as configs
from tests.conftest import TOKENIZER, make_model

FOLDER = Path(__file__).parents[1] / "golden" / "run"
SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256,
}  # fmt: skip
ROWS = [{"instruction": f"What is {i} and {i}?", "input": "", "output": f"It is {2 * i}."} for i in range(6)]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    make_model("llama", **SIZES).save_pretrained(FOLDER / "model")
    (FOLDER / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(FOLDER / "model", place / "model")
        shutil.copytree(TOKENIZER, place / "model", dirs_exist_ok=True)
        config = configs.build(
            {
                "model": {"path": place / "model", "dtype": "float32"},
                "data": {"train": FOLDER / "rows.jsonl", "max_length": 128, "system": "You add."},
                "lora": {"r": 2, "lora_alpha": 8},
                "train": {
                    "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 1, "eval_time_ratio": 0,
                },
                "output_dir": place / "run",
            }
        )  # fmt: skip
        summary = luthier.train(config)
        reply = luthier.chat(place / "run").send("What is 2 and 2?")
        run = place / "run"
        shutil.copytree(run / "adapter", FOLDER / "adapter")
        shutil.copytree(run / "checkpoints" / "step-00000002", FOLDER / "checkpoints" / "step-00000002")
        text = (run / "run.yaml").read_text(encoding="utf-8").replace(str(FOLDER), "@").replace(str(place), "@")
        (FOLDER / "run.yaml").write_text(text, encoding="utf-8")
        for file in (FOLDER / "adapter").glob("*.json"):
            file.write_text(file.read_text(encoding="utf-8").replace(str(place), "@"), encoding="utf-8")
        expected = {"losses": summary["losses"], "reply": reply.text, "prompt_tokens": reply.prompt_tokens}
        (FOLDER / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
