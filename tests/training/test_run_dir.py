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
from luthier.adapters.run_dir import LOCK, RunDir
from luthier.config import RunConfig
from luthier.errors import ConfigError, DataError, UserError
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


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FOREIGN = ["summary.json", "metrics.jsonl", "report.html", "data-report.json", "checkpoints/a", "adapter/a", "rows.csv"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_with_other_files_is_refused(name: str, config: RunConfig) -> None:
    assert config.output_dir
    file = config.output_dir / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ConfigError) as e:
        library.train(config)
    first = name.partition("/")[0]
    assert e.value.message == f"{config.output_dir}: holds files that luthier did not write for a run: {first}"
    assert e.value.fix == "choose a directory for this run only, as --output-dir runs/NAME"
    assert files_in(config.output_dir) == {name: b"mine"}


def test_a_configuration_of_the_user_is_not_overwritten(
    config: RunConfig, luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, rows = str(config.model.path), str(personas.TEAHOUSE)
    common = ["init", "--model", model, "--data", rows, "--output-dir"]
    for argv in ([*common, "."], [*common, "runs/a", "--to", "runs/a/b/run.yaml"]):
        refused = luthier(*argv)
        assert refused.code == 2
        assert "run.yaml: would be in the directory of the run, " in refused.err
        assert "--output-dir runs/NAME" in refused.err
    assert list(tmp_path.iterdir()) == []
    assert luthier(*common, "runs/a").code == 0
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    for argv in (["train", "run.yaml", "--output-dir", "."], [*common, ".", "--to", str(tmp_path.parent / "x.yaml")]):
        refused = luthier(*argv)
        assert refused.code == 2
        assert "holds files that luthier did not write for a run: run.yaml" in refused.err
    assert (tmp_path / "run.yaml").read_text(encoding="utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_hidden_files_and_an_empty_directory_are_accepted_and_other_files_of_a_run_stay(config: RunConfig) -> None:
    run = config.output_dir
    assert run
    run.mkdir()
    (run / ".DS_Store").write_bytes(b"\0")
    (run / ".gitignore").write_text("*\n")
    seen: list[int] = []
    with pytest.raises(library.Stopped):
        library.train(config, lambda r: seen.append(r.step), stop=lambda: True)
    mine = ["notes.txt", "talk.jsonl", "checkpoints/notes.txt", "checkpoints/step-00000001-best/a", "events/a"]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    library.train(config, lambda r: seen.append(r.step))
    assert seen == [1, 2, 3]
    assert {name: (run / name).read_text() for name in mine} == dict.fromkeys(mine, "mine")
    assert (run / ".DS_Store").exists() and (run / ".gitignore").exists()
    library.train(config)
    assert seen == [1, 2, 3]


def test_the_configuration_of_a_run_must_not_be_edited_but_comments_and_places_may(
    config: RunConfig, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    run = config.output_dir
    assert run
    file = run / "run.yaml"
    with pytest.raises(library.Stopped):
        library.train(config, stop=lambda: True)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("seed: 42", "seed: 7"), encoding="utf-8")
    before = files_in(run)
    with pytest.raises(ConfigError) as e:
        library.train(library.load(file))
    assert e.value.message == f"{file}: was edited after the run had started"
    assert f"luthier train {file} --output-dir runs/NAME trains with these settings" in e.value.fix
    assert files_in(run) == before
    moved = tmp_path / "moved"
    config.model.path.rename(moved)
    text = text.replace(str(config.model.path), str(moved)).replace("max_new_tokens: 512", "max_new_tokens: 9")
    commented = text + "# my comment\n"
    file.write_text(commented, encoding="utf-8")
    try:
        library.train(library.load(file))
    finally:
        moved.rename(config.model.path)
    assert file.read_text(encoding="utf-8") == commented


def test_a_run_that_failed_before_its_first_checkpoint_starts_again_with_its_edited_configuration(
    config: RunConfig,
) -> None:
    run = RunDir(config.output_dir or Path())
    run.start(config, {})
    text = run.config_file.read_text(encoding="utf-8")
    run.config_file.write_text(text.replace("seed: 42", "seed: 7 # better"), encoding="utf-8")
    with pytest.raises(ConfigError, match="was edited"):
        library.train(config)
    library.train(library.load(run.config_file))
    assert "seed: 7 # better" in run.config_file.read_text(encoding="utf-8")
    assert run.config().train.seed == 7
    library.train(library.load(run.config_file))


def test_results_without_an_adapter_are_not_overwritten_by_another_run(config: RunConfig) -> None:
    run = RunDir(config.output_dir or Path())
    run.start(config, {})
    run.summary_file.write_text("{}")
    with pytest.raises(ConfigError, match="holds an unfinished run with other settings: train.seed: 42 -> 7"):
        library.train(config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})}))
    assert run.summary_file.read_text() == "{}"


def test_a_finished_run_is_trained_further_as_the_message_says(config: RunConfig, luthier: Run, tmp_path: Path) -> None:
    run, file = config.output_dir, written(config, tmp_path / "config.yaml")
    assert run and luthier("train", file).code == 0
    longer = luthier("train", file, "--set", "train.max_steps=6")
    assert longer.code == 2
    assert f"{run}: holds a finished run with other settings: train.max_steps: 3 -> 6" in longer.err
    fix = longer.err.strip().splitlines()[-1]
    assert fix.startswith("  fix: choose another --output-dir; to train its result further, use the model that")
    command = fix.partition("luthier ")[2].replace(" merged", f" {tmp_path / 'merged'}")
    assert luthier(*command.split()).code == 0
    done = luthier("train", file, "--model", tmp_path / "merged", "--output-dir", tmp_path / "second")
    assert done.code == 0, done.err
    assert f"loss {json.loads((tmp_path / 'second' / 'summary.json').read_text())['losses'][0]:.3f}" in done.out


def test_a_run_an_adapter_and_a_checkpoint_are_no_models(config: RunConfig, luthier: Run, tmp_path: Path) -> None:
    run = config.output_dir
    assert run
    with pytest.raises(library.Stopped):
        library.train(config, stop=lambda: True)
    rows = ["--data", personas.TEAHOUSE]
    unfinished = [("train", "--model", run, *rows, "--output-dir", tmp_path / "b"), ("merge", run, "--output-dir", "m")]
    for argv in unfinished:
        done = luthier(*argv)
        assert f"error: {run}: the run has no adapter yet" in done.err
        assert f"  fix: finish it: luthier train {run / 'run.yaml'}" in done.err
    assert luthier("train", run / "run.yaml").code == 0
    for path in (run, run / "adapter"):
        for argv in (["train", "--output-dir", tmp_path / "b"], ["check"], ["estimate"]):
            done = luthier(*argv, "--model", path, *rows)
            assert done.code == 2
            assert f"error: {path}: is a run or an adapter, not a base model" in done.err
            assert f"luthier merge {path} --output-dir merged" in done.err
    step = run / "checkpoints" / "step-00000003"
    for path in (step, step.parent):
        for command in ("merge", "export", "serve", "chat", "eval"):
            done = luthier(command, path, *(["--output-dir", tmp_path / "m"] if command in ("merge", "export") else []))
            assert done.code == 2
            assert f"error: {path}: is a checkpoint, which only chat and eval can open" in done.err
            assert "  fix: luthier chat RUN --checkpoint N; for another command, finish the run" in done.err
    assert luthier("chat", run, "--checkpoint", 3, "--prompt", "a", "--max-new-tokens", 1).code == 0
    done = luthier("merge", "--model", config.model.path, "--adapter", run, "--output-dir", tmp_path / "m")
    assert done.code == 0 and (tmp_path / "m" / "model.safetensors").is_file()
