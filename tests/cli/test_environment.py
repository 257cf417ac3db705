"""A full disk, a missing home directory or a closed output is one clear message, and nothing is left half-written."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from luthier import personas
from luthier._util import files
from luthier.encoding import row_cache
from luthier.errors import UserError
from luthier.hub import default_dir
from luthier.kernels import native
from luthier.training import resources
from luthier.training.metrics import MetricsFile, StepRecord
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


# --- no home directory, or one that cannot be written ---------------------------------------------------------------


@pytest.fixture(scope="session")
def compiled() -> Path:
    """Load the kernels, which takes a while the first time on a machine, and return their file."""
    if why := native.why_unavailable(torch.float32):
        pytest.skip(why)
    native.load()
    return native._library_path(native._tools()[0])


@pytest.fixture
def no_home(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the home directory lie below a file, which not even root can write to; return its cache directory."""
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"
    for name in ("LUTHIER_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(files, "_logged", set())
    monkeypatch.setattr(row_cache, "root", lambda: files.cache_root() / "rows")
    return home / ".cache" / "luthier"


def test_without_a_home_directory_only_the_caches_are_lost_with_one_note(
    luthier: Run,
    model_dir: Callable[[str], Path],
    no_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = ["--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--set", "model.load_in_8bit=true"]
    done = luthier("train", *argv, "--output-dir", tmp_path / "run", "--set", "train.max_steps=1")
    assert done.code == 0, done.err
    assert [line for line in done.err.splitlines() if "cache" in line] == [
        f"note: nothing is cached for later ({no_home}: cannot be used as a directory (Not a directory)); "
        "to cache, set LUTHIER_CACHE to a directory that can be written"
    ]
    assert "quantised copy" not in done.err and "encoded rows" not in done.err and ", once" not in done.err
    monkeypatch.setattr(resources, "calls_per_second", lambda *_: 1e3)
    assert luthier("estimate", *argv).code == 0


def test_pull_and_vllm_refuse_a_cache_that_cannot_be_written(
    luthier: Run, model_dir: Callable[[str], Path], no_home: Path, tmp_path: Path
) -> None:
    for name in ("smollm2-135m", "owner/name"):
        done = luthier("pull", name)
        assert done.code == 2
        assert f"{no_home}/models: cannot be used as a directory (Not a directory), so the model cannot" in done.err
        assert "  fix: give --to DIR, or set LUTHIER_CACHE to a directory that can be written" in done.err
    done = luthier("serve", model_dir("llama"), "--engine", "vllm", "--print")
    assert done.code == 2
    assert f"{no_home}/vllm: cannot be used as a directory (Not a directory), so vLLM cannot be handed" in done.err
    assert "  fix: set LUTHIER_CACHE to a directory that can be written" in done.err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    assert "already exists with other content" in luthier("pull", "smollm2-135m", "--to", tmp_path / "model").err


def test_kernels_are_compiled_for_the_process_if_they_cannot_be_cached(
    compiled: Path, no_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def build(_: str, scratch: Path) -> Path:
        built.append(Path(shutil.copy(compiled, scratch / "all.so")))
        return built[-1]

    monkeypatch.setattr(native, "_build", build)
    assert native.needs_compilation()
    assert native.load.__wrapped__().dropout_f32
    assert not built[0].exists() and not no_home.exists()
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    assert Path(native.load.__wrapped__()._name).parent == tmp_path / "cache" / "kernels"
    assert not native.needs_compilation()
    monkeypatch.setenv("LUTHIER_CACHE", str(no_home))
    monkeypatch.setattr(tempfile, "tempdir", str(no_home))
    with pytest.raises(native.Unavailable, match="they cannot be compiled .*Not a directory"):
        native.load.__wrapped__()


def test_the_cache_directory_follows_the_environment(
    no_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.cache_root() == no_home
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_root() == tmp_path / "xdg" / "luthier"
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "own"))
    assert files.cache_root() == tmp_path / "own"
    assert {default_dir("a"), row_cache.root()} == {tmp_path / "own" / "models" / "a", tmp_path / "own" / "rows"}
    for name in ("LUTHIER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # a user without an entry in the user database
    assert files.cache_root() == Path("/.cache/luthier")


def test_a_read_only_cache_is_still_read(
    luthier: Run,
    model_dir: Callable[[str], Path],
    no_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    argv = ["train", "--model", model_dir("llama"), "--data", personas.TEAHOUSE, "--set", "model.load_in_8bit=true"]
    argv += ["--set", "train.max_steps=1", "--output-dir"]
    first = luthier(*argv, tmp_path / "a")
    assert first.code == 0 and "saved the quantised copy" in first.err

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", read_only)
    monkeypatch.setattr(os, "access", lambda path, *_: not str(path).startswith(str(tmp_path / "cache")))
    again = luthier(*argv, tmp_path / "b")
    assert again.code == 0 and "loading the quantised copy" in again.err
    assert "damaged" not in again.err and "encoded again" not in again.err


def test_without_a_directory_for_temporary_files_the_fix_is_printed(
    luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
        patch.setattr("luthier.verbs.doctor.doctor", tempfile.gettempdir)
        done = luthier("doctor")
    assert done.code == 2
    assert done.err == (
        "error: no directory for temporary files can be written\n  fix: set TMPDIR to one that can be written\n"
    )


def test_a_home_that_is_unknown_is_replaced_for_the_libraries(luthier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK, which ROUGE-L imports, stops with an error if ~ cannot be replaced by a directory."""
    with monkeypatch.context() as patch:
        patch.delenv("HOME", raising=False)
        patch.setattr(os, "getuid", lambda: 54321)
        assert luthier("--version").code == 0
        assert os.environ["HOME"] == "/"


# --- output and input -----------------------------------------------------------------------------------------------

COMMAND = f"{shlex.quote(sys.executable)} -m luthier.cli.main"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


def shell(command: str, **environment: str) -> Result:
    """Run a line of shell in which ``luthier`` is this checkout's command."""
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; luthier() {{ {COMMAND} "$@"; }}; {command}'],
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def checked(model_dir: Callable[[str], Path]) -> str:
    return f"luthier check --model {shlex.quote(str(model_dir('llama')))} --data {shlex.quote(str(personas.TEAHOUSE))}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_output_to_a_full_disk_is_one_message(checked: str) -> None:
    for command in ("luthier --version", "luthier check --help", checked):
        done = shell(f"{command} > /dev/full")
        assert (done.code, done.out) == (2, "")
        assert done.err == (
            "error: the output cannot be written: there is not enough disk space (No space left on device)\n"
            "  fix: free some disk space, then run the same command again\n"
        )
    assert shell("luthier check > /dev/full 2> /dev/full").code == 2


def test_a_reader_that_ends_early_ends_the_command_quietly(checked: str) -> None:
    for command in (f"{checked} --show 74", "luthier --help"):
        done = shell(f"{command} | true")
        assert done.err == ""
        assert done.code in (0, 1)  # 0: everything was written before the reader ended


def test_closed_streams_are_empty_streams(
    checked: str, luthier: Run, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("luthier --version >&- 2>&- <&-").code == 0
    assert shell(f"{checked} --show 1 >&- 2>&- <&-").code == 0
    monkeypatch.setattr("sys.stdin", None)
    done = luthier("chat", model_dir("llama"))
    assert done.code == 0 and "error" not in done.err
    monkeypatch.setattr("sys.stdin", None)
    done = luthier("chat", model_dir("llama"), "--prompt", "-")
    assert (done.code, done.err) == (2, "error: the prompt is empty\n  fix: give --prompt TEXT\n")


def test_chinese_text_in_an_ascii_locale(checked: str, model_dir: Callable[[str], Path]) -> None:
    model = shlex.quote(str(model_dir("llama")))
    done = shell(f"{checked} --show 1", **ASCII)
    assert done.code == 0 and "\\u4f60" in done.out
    done = shell(f"echo 你好 | luthier chat {model} --max-new-tokens 2", **ASCII)
    assert done.code == 0 and "error: the message contains bytes that are not text" in done.err
    assert "Traceback" not in done.err
    done = shell(f"{checked} --set data.system=你好", **ASCII)
    assert done.code == 2 and "contains bytes that are not text in this terminal's encoding" in done.err
    assert "  fix: type it in UTF-8, in a terminal with that encoding: export LC_ALL=C.UTF-8" in done.err


def test_an_argument_that_is_not_text_is_refused(luthier: Run) -> None:
    done = luthier("init", "--to", "run-\udcff.yaml")
    assert done.code == 2 and "'run-\\udcff.yaml': contains bytes that are not text" in done.err


def test_metrics_that_cannot_be_written_are_an_error_with_their_path(tmp_path: Path) -> None:
    record = StepRecord(1, 2, 0.5, 1.0, 1.0, 1e-3, 10, 5, 0.1)
    with MetricsFile(tmp_path / "metrics.jsonl", 1) as metrics:
        with largest_file(3), pytest.raises(UserError, match=r"metrics.jsonl: the file would exceed"):
            metrics.write(record)
        metrics.write(record)
    assert (tmp_path / "metrics.jsonl").read_text().endswith('"tokens_per_s": 100.0}\n')
