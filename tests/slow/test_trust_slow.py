"""Long tests of robustness: a million rows in constant memory, and a real model's run killed twenty times."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import luthier
from check import checked
from luthier import config as configs
from luthier import personas
from tests.conftest import SHARED

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]
STEPS = 60


def test_a_million_rows_are_checked_in_under_a_gigabyte(smollm2: Path, tmp_path: Path) -> None:
    source = SHARED / "data" / "huanhuan.json"
    if source.exists():
        rows = json.loads(source.read_text(encoding="utf-8"))
    else:
        rows = [json.loads(line) for line in personas.TRAIN.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "million.jsonl"
    with path.open("w", encoding="utf-8") as f:
        for i in range(1_000_000):
            f.write(json.dumps({**rows[i % len(rows)], "index": i}, ensure_ascii=False) + "\n")
    result, seconds, peak = checked(smollm2, path)
    print(json.dumps({"peak_rss_bytes": peak, "rows_per_s": round(1_000_000 / seconds)}))
    assert result["rows"] == {"read": 1_000_000, "kept": 1_000_000, "dropped": 0, "changed": result["rows"]["changed"]}
    assert result["notes"] == [{"note": "key 'index' is not used", "rows": 1_000_000}]
    assert peak < 1e9


def test_a_run_killed_twenty_times_writes_the_same_bytes(smollm2: Path, tmp_path: Path) -> None:
    def config(run: Path) -> configs.RunConfig:
        return configs.build(
            {
                "model": {"path": smollm2},
                "data": {"train": personas.TRAIN},
                "lora": {"lora_dropout": 0.1},
                "train": {
                    "max_steps": STEPS,
                    "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 1,
                    "save_steps": 2,
                },
                "output_dir": run,
            }
        )

    luthier.train(config(tmp_path / "whole"))
    run = tmp_path / "run"
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config(run).dump()))
    code = (
        "import sys, luthier\n"
        "from luthier import config\n"
        "luthier.train(config.load(sys.argv[1]), on_step=lambda r: print(r.step, flush=True))\n"
    )
    generator = random.Random(0)
    kills = with_checkpoint = 0
    while True:
        with subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            if kills < 20:  # after two steps, while the second is saved or a little later: every session makes progress
                child.stdout.readline()
                start = time.monotonic()
                child.stdout.readline()
                time.sleep(generator.uniform(0, 1.5 * (time.monotonic() - start)))
                if child.poll() is None:
                    os.kill(child.pid, signal.SIGKILL)
                    kills += 1
                    with_checkpoint += any((run / "checkpoints").glob("step-*"))
            child.stdout.read()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    assert kills == 20
    print(json.dumps({"kills": kills, "with_checkpoint": with_checkpoint}))
    assert with_checkpoint >= 10
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses = [json.loads((p / "summary.json").read_text())["losses"] for p in (run, tmp_path / "whole")]
    assert losses[0] == losses[1]
