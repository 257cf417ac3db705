"""Law "resume": killed at any moment and started again = never killed, bit for bit.

A child process trains a tiny model with dropout and is killed with SIGKILL, some kills in the middle of a save (made
slow by a hook in the child); the same command is run until it finishes. The adapter file must be the same bytes.

Shown able to fail: a checkpoint that forgets one of AdamW's moments, and one that is off by a step, give other bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier import config as configs
from luthier import personas
from luthier.api import Stopped
from luthier.config import RunConfig
from luthier.errors import ConfigError
from luthier.training import checkpoint
from luthier.training.optim import Optimizer

STEPS = 24


def config(model: Path, run: Path, **train: Any) -> RunConfig:
    return configs.build(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": personas.TEAHOUSE, "max_length": 64},
            "lora": {"r": 4, "lora_dropout": 0.1},
            "train": {
                "max_steps": STEPS,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "save_steps": 3,
                "learning_rate": 1e-2,
                **train,
            },
            "output_dir": run,
        }
    )


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    found: list[float] = json.loads((run / "summary.json").read_text())["losses"]
    return found


def stop_after(count: int) -> Callable[[], bool]:
    seen = iter(range(1, 10_000))
    return lambda: next(seen) >= count


def interrupted(made: RunConfig, every: int) -> None:
    """Run to the end in sessions of ``every`` steps."""
    for _ in range(100):
        try:
            luthier.train(made, stop=stop_after(every))
        except Stopped:
            continue
        return
    raise AssertionError("never finished")


@pytest.fixture(scope="module")
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    luthier.train(config(model, run))
    return run


@pytest.mark.parametrize("every", [1, 5])
def test_stopped_and_resumed_is_never_stopped(every: int, model: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(config(model, run), every)
    assert adapter(run) == adapter(whole)
    assert losses(run) == losses(whole)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, STEPS + 1))
    assert [x["loss"] for x in lines] == losses(whole)


CHILD = """
import sys, time
import luthier
from luthier import config as configs
from luthier import files
sync = files._sync_tree
files._sync_tree = lambda folder: (time.sleep(float(sys.argv[2])), sync(folder))
sys.stdout.write("ready\\n"); sys.stdout.flush()
luthier.train(configs.load(sys.argv[1]), on_step=lambda r: (print(r.step, flush=True), time.sleep(0.02)))
"""


def test_killed_ten_times_is_never_killed(model: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = config(model, run)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(made.dump()))
    kills = during_save = 0
    for attempt in range(40):
        slow = 0.4 if attempt % 2 else 0.0
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(file), str(slow)], stdout=subprocess.PIPE, text=True, env={**os.environ}
        ) as child:
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
            if kills < 10:
                if slow:  # wait for a half-written checkpoint, and kill in the middle of it
                    deadline = time.monotonic() + 30
                    while not list(run.glob("checkpoints/.step-*.new")) and time.monotonic() < deadline:
                        if child.poll() is not None:
                            break
                        time.sleep(0.01)
                    during_save += bool(list(run.glob("checkpoints/.step-*.new")))
                else:
                    for _ in range(1 + attempt % 3):
                        child.stdout.readline()
                if child.poll() is None:
                    child.send_signal(signal.SIGKILL)
                    kills += 1
            child.stdout.read()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        assert not (run / "summary.json").exists()
    assert (kills, child.returncode) == (10, 0)
    assert during_save >= 3
    assert adapter(run) == adapter(whole)
    assert losses(run) == losses(whole)
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_the_law_sees_a_forgotten_moment(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Optimizer.restore

    def forgetful(self: Optimizer, p: Any, step: int, moments: dict[str, torch.Tensor]) -> None:
        restore(self, p, step, {**moments, "exp_avg": torch.zeros_like(moments["exp_avg"])})

    monkeypatch.setattr(Optimizer, "restore", forgetful)
    interrupted(config(model, tmp_path / "run"), 10)
    assert adapter(tmp_path / "run") != adapter(whole)


def test_the_law_sees_a_step_too_many(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Optimizer.restore
    monkeypatch.setattr(Optimizer, "restore", lambda self, p, step, *m: restore(self, p, step + 1, *m))
    interrupted(config(model, tmp_path / "run"), 10)
    assert adapter(tmp_path / "run") != adapter(whole)


def test_old_checkpoints_are_pruned_and_a_damaged_one_passed_over(model: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = config(model, run)
    with pytest.raises(Stopped, match="stopped after step 11 of 24, which is saved"):
        luthier.train(made, stop=stop_after(11))
    kept = checkpoint.steps(run / "checkpoints")
    assert [p.name for p in kept] == ["step-00000009", "step-00000011"]
    tensors = kept[-1] / checkpoint.TENSORS
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    said: list[str] = []
    luthier.train(made, say=said.append)
    assert any("step-00000011: is damaged" in s for s in said)
    assert any("going on after step 9" in s for s in said)
    assert adapter(run) == adapter(whole)


def test_an_unfinished_run_with_other_settings_or_rows_is_refused(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = tmp_path / "rows.jsonl"
    shutil.copy(personas.TEAHOUSE, rows)
    made = config(model, run)
    made = made.model_copy(update={"data": made.data.model_copy(update={"train": (rows,)})})
    with pytest.raises(Stopped):
        luthier.train(made, stop=stop_after(4))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    other = made.model_copy(update={"lora": made.lora.model_copy(update={"r": 8})})
    with pytest.raises(ConfigError, match=r"an unfinished run with other settings: lora.r: 4 -> 8"):
        luthier.train(other)
    rows.write_text(rows.read_text(encoding="utf-8") + '{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="data: the content has changed"):
        luthier.train(made)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_another_machine_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(model, tmp_path / "run")
    with pytest.raises(Stopped):
        luthier.train(made, stop=stop_after(4))
    here = checkpoint.machine()
    monkeypatch.setattr(checkpoint, "machine", lambda: {**here, "threads": 64})
    said: list[str] = []
    luthier.train(made, say=said.append)
    assert any(
        f"may differ from a run that was never interrupted (threads: {here['threads']} -> 64)" in s for s in said
    )


def test_a_full_disk_leaves_the_last_good_checkpoint(model: Path, whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk; then room is made, and the run goes on."""
    run = tmp_path / "run"
    made = config(model, run)
    with pytest.raises(Stopped):
        luthier.train(made, stop=stop_after(4))
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(made.dump()))
    code = (
        "import resource, signal, sys, luthier\n"
        "from luthier import config as configs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: luthier.train(configs.load(sys.argv[1]))\n"
        "except luthier.UserError as e: print(e); sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "the disk has no room for it" in done.stdout
    assert "free some room, then run the same command again" in done.stdout
    assert [p.name for p in (run / "checkpoints").iterdir()][-1:] != []
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    luthier.train(made)
    assert adapter(run) == adapter(whole)


def test_ctrl_c_saves_and_says_how_to_go_on(model: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [
        "model.dtype=float32", "data.max_length=64", "lora.r=4", "lora.lora_dropout=0.1", f"train.max_steps={STEPS}",
        "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2", "train.save_steps=3",
        "train.learning_rate=1e-2",
    ]  # fmt: skip
    argv = [sys.executable, "-m", "luthier.cli.main", "train", "--model", str(model), "--data", str(personas.TEAHOUSE)]
    argv += ["--output-dir", str(run), *(x for s in settings for x in ("--set", s))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr
        for line in child.stderr:
            if line.startswith("step 1/"):
                child.send_signal(signal.SIGINT)
                break
        rest = child.stderr.read()
    if child.returncode == 130:
        assert "run the same command again" in rest
        assert "which is saved" in rest
        assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    else:
        assert child.returncode == 0  # the signal came after the last step
    assert adapter(run) == adapter(whole)
