"""A full disk, a missing home directory or a closed output is one clear message, and nothing is left half-written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from luthier import personas
from luthier._util import files
from luthier.errors import UserError
from tests.conftest import Result
from tests.helpers.handover import tuned

Run = Callable[..., Result]

# --- a full disk ----------------------------------------------------------------------------------------------------

WRITERS = {
    "merge": ["merge", "{adapter}"],
    "peft": ["export", "{adapter}", "--to", "peft"],
    "hf": ["export", "{adapter}", "--to", "hf"],
    "gguf": ["export", "{adapter}", "--to", "gguf"],
    "gguf-lora": ["export", "{adapter}", "--to", "gguf-lora"],
    "train": [
        *("train", "--model", "{model}", "--data", str(personas.TEAHOUSE), "--set", "train.max_steps=4"),
        *("--set", "train.save_steps=2", "--set", "train.eval_time_ratio=0"),
    ],
}  # fmt: skip


@pytest.fixture
def command(model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[[str, Path], list[str]]:
    """Return a function of a name in WRITERS and a directory to write to that returns the command."""
    model = model_dir("llama")
    adapter = tuned(model, tmp_path / "tuned")

    def words(name: str, to: Path) -> list[str]:
        places = {"model": model, "adapter": adapter}
        return [*(w.format(**places) for w in WRITERS[name]), "--output-dir", str(to)]

    return words


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write files of more than ``size`` bytes."""
    resource = pytest.importorskip("resource", reason="this system has no limits of resources")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Mount a file system of this size; skip the test if that is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def left(folder: Path, name: str) -> list[str]:
    """Return what lies at the target ``name`` and under temporary names beside it, except a run's own records."""
    records = {"run.yaml", "data-report.json", "metrics.jsonl"}
    paths = [p for top in (folder / name, *folder.glob(f".{name}*")) for p in (top, *top.rglob("*")) if p.is_file()]
    return sorted(str(p.relative_to(folder)) for p in paths if p.name not in records)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_size_limit_is_named_and_nothing_is_left(
    name: str, luthier: Run, command: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    argv = command(name, tmp_path / "new")
    with largest_file(30_000):
        done = luthier(*argv)
    assert done.code == 2
    assert "the file would exceed the file size limit (File too large); no partial file was left" in done.err
    assert "  fix: raise the limit (ulimit -f unlimited)" in done.err
    assert "Traceback" not in done.err and ".new" not in done.err
    assert left(tmp_path, "new") == []
    again = luthier(*argv)
    assert again.code == 0, again.err


@pytest.mark.parametrize(("name", "kilobytes"), [("merge", 120), ("peft", 30), ("gguf", 120), ("gguf-lora", 120)])
def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    name: str, kilobytes: int, luthier: Run, command: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    argv = command(name, disk / "new")
    with small_disk(disk, kilobytes):
        done = luthier(*argv)
        assert (done.code, done.err.count("Traceback")) == (2, 0)
        assert re.search(rf"error: {re.escape(str(disk))}/new\S*: .*{re.escape(str(disk))} has \S+ kB free", done.err)
        assert "  fix: free some disk space, then run the same command again" in done.err
        assert ".new" not in done.err
        assert left(disk, "new") == []
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = luthier(*argv)
        assert again.code == 0, again.err


def test_a_disk_that_fills_up_in_training_keeps_the_last_checkpoint(
    luthier: Run, command: Callable[[str, Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    argv = command("train", disk / "run")
    monkeypatch.setattr(files, "require_space", lambda *_: None)  # as if another program filled the disk meanwhile
    with small_disk(disk, 260):
        done = luthier(*argv)
        assert (done.code, done.err.count("Traceback")) == (2, 0)
        assert "step-00000004: there is not enough disk space (No space left on device); the disk mounted" in done.err
        assert re.search(r"has \d\S* kB free, \d\S* kB are needed; no partial file was left", done.err)
        assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == ["step-00000002"]
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = luthier(*argv)
        assert again.code == 0, again.err
        assert "resuming after step 2" in again.err


@pytest.mark.parametrize("name", WRITERS)
def test_too_little_space_is_reported_before_the_work_starts(
    name: str,
    luthier: Run,
    command: Callable[[str, Path], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = command(name, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - 999, 999))
        done = luthier(*argv)
    assert done.code == 2
    assert re.search(r"error: \S+new\S*: needs \d\S* kB, and the disk mounted at \S+ has 999 bytes free", done.err)
    assert "step 1" not in done.err and "verifying" not in done.err
    assert left(tmp_path, "new") == []
    with monkeypatch.context() as patch:  # some network file systems report no sizes at all
        patch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
        assert luthier(*argv).code == 0


def test_an_error_of_a_library_in_rust_is_recognised(tmp_path: Path) -> None:
    """The libraries safetensors and tokenizers raise their own errors, whose text ends with the system's number."""
    with (
        pytest.raises(UserError, match=re.escape(f"disk space ({os.strerror(errno.ENOSPC)})")),
        files.new_dir(tmp_path / "new"),
    ):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="os error 2"), files.new_dir(tmp_path / "new"):
        raise SafetensorError("No such file or directory (os error 2)")
    assert left(tmp_path, "new") == []
