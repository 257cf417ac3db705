"""Law "resume": a run that is killed at any moment and resumed gives the same bytes as an uninterrupted run.

A child process trains a tiny model with dropout and is killed with SIGKILL at chosen steps and file operations, leaving
half-written files like a crash (``tests/helpers/killing.py``); the run is started again until it finishes. The adapter
file must have the same bytes.

The law can fail: it detects a checkpoint that lacks one of AdamW's moments, and one that is off by a step.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier import config as configs
from luthier import personas
from luthier.config import RunConfig
from luthier.errors import ConfigError
from luthier.training import checkpoint
from luthier.training.optimizer import Optimizer
from luthier.verbs.train import Stopped
from tests.helpers.killing import zygote

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
    values: list[float] = json.loads((run / "summary.json").read_text())["losses"]
    return values


def stop_after(count: int) -> Callable[[], bool]:
    seen = iter(range(1, 10_000))
    return lambda: next(seen) >= count


def interrupted(run_config: RunConfig, every: int) -> None:
    """Run to the end in sessions of ``every`` steps each."""
    for _ in range(100):
        try:
            luthier.train(run_config, stop=stop_after(every))
        except Stopped:
            continue
        return
    raise AssertionError("never finished")


@pytest.fixture(scope="module")
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run without interruption."""
    run = tmp_path_factory.mktemp("whole") / "run"
    luthier.train(config(model, run))
    return run


@pytest.mark.parametrize("every", [1, 5])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    every: int, model: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted(config(model, run), every)
    assert adapter(run) == adapter(whole)
    assert losses(run) == losses(whole)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, STEPS + 1))
    assert [x["loss"] for x in lines] == losses(whole)


def yaml(tmp_path: Path, run_config: RunConfig) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(run_config.dump()))
    return file


linux = pytest.mark.skipif(sys.platform != "linux", reason="sessions are forked and watched through /proc")


@linux
def test_a_run_killed_ten_times_equals_an_uninterrupted_one(model: Path, tmp_path: Path) -> None:
    """Kill one run at ever later moments of its sessions: in steps, in saves, and after the last step."""
    moments = []
    with zygote() as sessions:
        assert not sessions.train(yaml(tmp_path, config(model, tmp_path / "whole"))).killed
        run = tmp_path / "run"
        file = yaml(tmp_path, config(model, run))
        for kill_at in itertools.chain(range(5, 200, 7), itertools.repeat(0)):
            ended = sessions.train(file, kill_at)
            if not ended.killed:
                break
            moments.append(ended.moment)
            assert not (run / "summary.json").exists()
        late = tmp_path / "late"
        file = yaml(tmp_path, config(model, late))
        assert "/.adapter." in sessions.train(file, "/.adapter.").moment
        assert not sessions.train(file).killed
    assert len(moments) >= 10
    assert sum("/checkpoints/.step-" in m for m in moments) >= 3
    assert sum(m.startswith("step ") for m in moments) >= 3
    assert adapter(run) == adapter(late) == adapter(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in lines] == losses(run)
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


@linux
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_nothing(every: int, model: Path, tmp_path: Path) -> None:
    """Kill a short run at its n-th moment, for every n (every 9th in the quick suite), then run it to the end."""
    short = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1}
    seen = set()
    with zygote() as sessions:
        whole = tmp_path / "whole"
        moments = sessions.train(yaml(tmp_path, config(model, whole, **short))).moments
        assert moments > 50
        for kill_at in range(every, moments + 1, every):
            run = tmp_path / str(kill_at)
            file = yaml(tmp_path, config(model, run, **short))
            ended = sessions.train(file, kill_at)
            assert ended.killed
            assert not sessions.train(file).killed
            assert adapter(run) == adapter(whole), ended.moment
            assert losses(run) == losses(whole), ended.moment
            assert [p.name for p in run.rglob(".*")] == [], ended.moment
            seen.add(ended.moment.replace(str(run), "").split(" ")[0])
            shutil.rmtree(run)
    print(json.dumps({"moments": moments, "kills": moments // every}))
    assert {"step", "fsync"} <= seen


def test_the_law_detects_a_lost_moment(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Optimizer.restore

    def forgetful(self: Optimizer, p: Any, step: int, moments: dict[str, torch.Tensor]) -> None:
        restore(self, p, step, {**moments, "exp_avg": torch.zeros_like(moments["exp_avg"])})

    monkeypatch.setattr(Optimizer, "restore", forgetful)
    interrupted(config(model, tmp_path / "run"), 10)
    assert adapter(tmp_path / "run") != adapter(whole)


def test_the_law_detects_an_additional_step(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Optimizer.restore
    monkeypatch.setattr(Optimizer, "restore", lambda self, p, step, *m: restore(self, p, step + 1, *m))
    interrupted(config(model, tmp_path / "run"), 10)
    assert adapter(tmp_path / "run") != adapter(whole)


def test_old_checkpoints_are_deleted_and_a_damaged_one_is_skipped(model: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_config = config(model, run)
    with pytest.raises(Stopped, match="stopped after step 11 of 24, which is saved"):
        luthier.train(run_config, stop=stop_after(11))
    remaining = checkpoint.steps(run / "checkpoints")
    assert [p.name for p in remaining] == ["step-00000009", "step-00000011"]
    tensors = remaining[-1] / checkpoint.TENSORS
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    messages: list[str] = []
    luthier.train(run_config, log=messages.append)
    assert any("step-00000011: is damaged" in s for s in messages)
    assert any("resuming after step 9" in s for s in messages)
    assert adapter(run) == adapter(whole)


def test_a_flipped_bit_anywhere_is_detected(model: Path, whole: Path, tmp_path: Path) -> None:
    """In the tensors, and in every byte of the JSON file."""
    saved = checkpoint.steps(whole / "checkpoints")[-1]
    checkpoint.read(saved)
    copy = tmp_path / saved.name
    shutil.copytree(saved, copy)
    for name, stride in ((checkpoint.STATE, 1), (checkpoint.TENSORS, 20_011)):
        raw = (copy / name).read_bytes()
        for i in range(0, len(raw), stride):
            damaged = bytearray(raw)
            damaged[i] ^= 1 << (i % 7)
            (copy / name).write_bytes(damaged)
            if name == checkpoint.STATE and _equal_json(raw, bytes(damaged)):
                continue  # white space
            with pytest.raises((ValueError, KeyError, TypeError, OSError)):
                checkpoint.read(copy)
        (copy / name).write_bytes(raw)
    checkpoint.read(copy)


def _equal_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def test_a_run_with_damaged_checkpoints_only_starts_again_and_warns(model: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_config = config(model, run)
    with pytest.raises(Stopped):
        luthier.train(run_config, stop=stop_after(7))
    for path in checkpoint.steps(run / "checkpoints"):
        (path / checkpoint.STATE).write_text("[]")
    messages: list[str] = []
    luthier.train(run_config, log=messages.append)
    assert sum("is damaged" in s for s in messages) == 2
    assert any("no usable checkpoint, so the run starts again at its first step" in s for s in messages)
    assert adapter(run) == adapter(whole)


def test_an_unfinished_run_with_other_settings_or_rows_is_refused(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = tmp_path / "rows.jsonl"
    shutil.copy(personas.TEAHOUSE, rows)
    run_config = config(model, run)
    run_config = run_config.model_copy(update={"data": run_config.data.model_copy(update={"train": (rows,)})})
    with pytest.raises(Stopped):
        luthier.train(run_config, stop=stop_after(4))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    other = run_config.model_copy(update={"lora": run_config.lora.model_copy(update={"r": 8})})
    with pytest.raises(ConfigError, match=r"an unfinished run with other settings: lora.r: 4 -> 8"):
        luthier.train(other)
    rows.write_text(rows.read_text(encoding="utf-8") + '{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="data: the content has changed"):
        luthier.train(run_config)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_resuming_on_another_machine_is_reported(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_config = config(model, tmp_path / "run")
    with pytest.raises(Stopped):
        luthier.train(run_config, stop=stop_after(4))
    here = checkpoint.machine()
    assert {"luthier", "torch", "transformers", "tokenizers", "numpy", "cpu", "threads"} <= here.keys()
    monkeypatch.setattr(checkpoint, "machine", lambda: {**here, "threads": 64})
    messages: list[str] = []
    luthier.train(run_config, log=messages.append)
    assert any(
        f"may differ in the last bits from an uninterrupted run (threads: {here['threads']} -> 64)" in s
        for s in messages
    )


def test_a_write_that_fails_leaves_the_last_good_checkpoint(model: Path, whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes the write fail, as a full disk does; without it, the run resumes."""
    run = tmp_path / "run"
    run_config = config(model, run)
    with pytest.raises(Stopped):
        luthier.train(run_config, stop=stop_after(4))
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(run_config.dump()))
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
    assert "the file would exceed the file size limit (File too large); no partial file was left" in done.stdout
    assert "raise the limit (ulimit -f unlimited)" in done.stdout
    assert [p.name for p in (run / "checkpoints").iterdir()][-1:] != []
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    luthier.train(run_config)
    assert adapter(run) == adapter(whole)


def test_ctrl_c_saves_and_prints_how_to_resume(model: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "luthier.cli.main", "train", str(yaml(tmp_path, config(model, run)))]
    code, rest = interrupted_by_hand(argv, 1)
    assert code in (0, 130)  # 0: the signal came after the last step
    if code == 130:
        assert "run the same command again" in rest
        assert "which is saved" in rest
        assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    assert adapter(run) == adapter(whole)


def test_a_second_ctrl_c_stops_at_once(model: Path, tmp_path: Path) -> None:
    """Here during the first step, in which the model's code never returns."""
    code = (
        "import sys, threading, luthier.training.loop as loop\n"
        "def hang(*_): sys.stderr.write('step 1/\\n'); sys.stderr.flush(); threading.Event().wait(600)\n"
        "loop._step = hang\n"
        "from luthier.cli.main import main\n"
        "sys.argv = ['luthier', *sys.argv[1:]]\n"
        "main()\n"
    )
    argv = [sys.executable, "-c", code, "train", str(yaml(tmp_path, config(model, tmp_path / "run")))]
    code_, rest = interrupted_by_hand(argv, 2)
    assert code_ == 130
    assert "stopped at once" in rest
    assert "run the same command again" in rest
    assert "Traceback" not in rest


def interrupted_by_hand(argv: list[str], times: int) -> tuple[int, str]:
    """Send Ctrl-C to a command after its first step; return its exit code and its output from then on."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a script ignore Ctrl-C by default
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with child:
        assert child.stderr
        messages = ""
        for line in child.stderr:
            if line.startswith("step 1/") or (messages and "stopping after this step" in line):
                messages += line
                child.send_signal(signal.SIGINT)
                times -= 1
                if not times:
                    break
        messages += child.stderr.read()
    return child.returncode, messages
