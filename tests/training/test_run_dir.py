"""The directory of a run: one training at a time, and nothing of the user's in it is lost or mixed up."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import luthier as library
from luthier import config as configs
from luthier import personas
from luthier.adapters.run_dir import LOCK
from luthier.config import RunConfig
from luthier.errors import DataError, UserError
from tests.conftest import Result

Run = Callable[..., Result]
TRAIN = [sys.executable, "-m", "luthier.cli.main", "train"]

# train, and hang in the second step with a checkpoint of the first
HANG = """
import os, subprocess, sys, time
import luthier
from luthier import config as configs

def on_step(record):
    if record.step == 2:
        FORK
        print("hangs", flush=True)
        time.sleep(600)

luthier.train(configs.load(sys.argv[1]), on_step=on_step)
"""
# a forked worker, and a program that inherits every descriptor that can be inherited
WORKERS = "os.fork() or time.sleep(600); subprocess.Popen(['sleep', '600'], close_fds=False)"


@pytest.fixture
def config(model_dir: Callable[[str], Path], tmp_path: Path) -> RunConfig:
    return configs.build(
        {
            "model": {"path": model_dir("llama"), "dtype": "float32"},
            "data": {"train": personas.TEAHOUSE, "max_length": 64},
            "train": {"max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 2, "eval_time_ratio": 0},
            "output_dir": tmp_path / "run",
        }
    )


def written(config: RunConfig, to: Path) -> Path:
    to.write_text(json.dumps(config.dump()), encoding="utf-8")
    return to


@contextmanager
def hanging(config: RunConfig, file: Path, workers: str = "pass") -> Iterator[subprocess.Popen[bytes]]:
    """Start a training that hangs after its first checkpoint; kill it and its children at the end."""
    argv = [sys.executable, "-c", HANG.replace("FORK", workers), str(written(config, file))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"hangs\n"
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="a directory is not locked on Windows")
def test_a_second_training_in_the_same_directory_is_refused_and_a_killed_one_resumes(
    config: RunConfig, tmp_path: Path
) -> None:
    run, file = config.output_dir, tmp_path / "config.yaml"
    assert run
    started = time.strftime("%Y-%m-%d")
    with hanging(config, file, WORKERS) as first:
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
        second = subprocess.run([*TRAIN, file], capture_output=True, text=True, check=False)
        assert second.returncode == 2, second.stderr
        assert f"{run}: is in use by another training (process {first.pid} on " in second.stderr
        assert f", started {started} " in second.stderr
        assert "  fix: wait for it or stop it, or choose another --output-dir" in second.stderr
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
        first.send_signal(signal.SIGKILL)
        first.wait()
        third = subprocess.run([*TRAIN, file], capture_output=True, text=True, check=False)  # its workers still live
        assert third.returncode == 0, third.stderr
    assert "resuming after step" in third.stderr
    assert [p.name for p in run.rglob(".*")] == []


def test_a_directory_is_locked_in_its_own_process_too_and_unlocked_at_the_end(config: RunConfig) -> None:
    assert config.output_dir
    second: list[str] = []

    def on_step(_: Any) -> None:
        with pytest.raises(UserError) as e:
            library.train(config)
        second.append(e.value.message)

    library.train(config, on_step)
    assert len(second) == 3 and f"(process {os.getpid()} on " in second[0]
    assert not (config.output_dir / LOCK).exists()
    library.train(config)


def test_a_refused_training_leaves_no_directory(config: RunConfig, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instrution": "a", "output": "b"}\n')
    wrong = config.model_copy(update={"data": config.data.model_copy(update={"train": (rows,)})})
    deep = tmp_path / "a" / "b" / "run"
    with pytest.raises(DataError):
        library.train(wrong.model_copy(update={"output_dir": deep}))
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError):
        library.train(wrong.model_copy(update={"output_dir": tmp_path / "mine"}))
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_file_system_without_locks_is_noted(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    messages: list[str] = []
    library.train(config, log=messages.append)
    assert f"note: {config.output_dir}: cannot be locked here; do not start a second training in it" in messages
    assert config.output_dir and not (config.output_dir / LOCK).exists()


def test_only_one_process_at_a_time_holds_a_lock_that_is_deleted_when_it_is_released(tmp_path: Path) -> None:
    """Four processes lock and unlock one file; each makes a file that none of the others may see."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from luthier._util import files\n"
        "folder, times = Path(sys.argv[1]), 0\n"
        "while times < 300:\n"
        "    try:\n"
        "        with files.locked(folder / 'lock', 'me') as supported:\n"
        "            assert supported\n"
        "            os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(folder / 'inside')\n"
        "            times += 1\n"
        "    except BlockingIOError:\n"
        "        pass\n"
    )
    pytest.importorskip("fcntl")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [p.wait(120) for p in processes] == [0] * 4
    assert list(tmp_path.iterdir()) == []
