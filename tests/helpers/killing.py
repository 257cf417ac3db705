"""Kill training sessions at chosen moments: a process that has imported everything forks a child per session.

A moment is a file operation (sync, rename, new directory, removal) or a step, counted from the start of the session.
The child is killed just before the operation; a file about to be synced is first cut to half of its length, and
``metrics.jsonl`` gets half a line, as a crash can leave them.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPERATIONS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


@dataclass(frozen=True)
class SessionEnd:
    """How one session ended: killed (at ``moment``) or finished, and its number of moments."""

    killed: bool
    moments: int
    moment: str


class Zygote:
    """Client of the process that forks sessions."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def train(self, config: Path, kill_at: int | str = 0) -> SessionEnd:
        """Run one session of the YAML file's run.

        kill_at: kill it at this moment (0: never), or at the first one whose name contains this text.
        """
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(config), kill_at]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["code"] == 0, answer
        return SessionEnd(answer["killed"], answer["moments"], answer["moment"])


@contextmanager
def zygote() -> Iterator[Zygote]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join(p for p in (str(root / "src"), os.environ.get("PYTHONPATH", "")) if p)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.killing"], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        yield Zygote(process)
        assert process.stdin
        process.stdin.close()


# --- the process itself ---------------------------------------------------------------------------------------------


def _count(kill_at: int | str, log: int) -> Callable[[str, Path | None], None]:
    """Return a function to call at every moment, which kills this process at the chosen one."""
    seen = 0

    def moment(name: str, half: Path | None = None) -> None:
        nonlocal seen
        seen += 1
        os.pwrite(log, json.dumps({"moments": seen, "moment": name}).encode().ljust(4096), 0)
        if seen == kill_at or (isinstance(kill_at, str) and kill_at in name):
            if half is not None:
                os.truncate(half, half.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return moment


def _watch(moment: Callable[[str, Path | None], None], run: Path) -> None:
    """Report operations on the run's own files as moments; other files, such as a cache, do not count."""

    def ours(path: object) -> bool:
        return not Path(str(path)).is_absolute() or Path(str(path)).is_relative_to(run)

    for name in OPERATIONS:
        plain = getattr(os, name)

        def watched(*args: Any, plain: Any = plain, name: str = name, **kwargs: Any) -> Any:
            if name == "fsync":
                path = Path(f"/proc/self/fd/{args[0]}").readlink()
                if ours(path):
                    moment(f"{name} {path}", path if stat.S_ISREG(os.fstat(args[0]).st_mode) else None)
            elif ours(args[0]):
                moment(f"{name} {args[0]}", None)
            return plain(*args, **kwargs)

        setattr(os, name, watched)


def _session(config: str, kill_at: int | str, log: int) -> None:
    import luthier
    from luthier import config as configs

    run_config = configs.load(config)
    moment = _count(kill_at, log)
    assert run_config.output_dir
    _watch(moment, run_config.output_dir)

    def step(record: Any) -> None:
        assert run_config.output_dir
        metrics = run_config.output_dir / "metrics.jsonl"
        moment(f"step {record.step} metrics", None)  # its line is written
        with metrics.open("r+b") as f:
            f.seek(0, os.SEEK_END)
            size = f.tell()
            f.write(b'{"step": 9')
            f.flush()
            moment(f"step {record.step} half a line", None)
            f.truncate(size)

    luthier.train(run_config, on_step=step)


def _serve() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401 - what a session would import

    import luthier.verbs.train  # noqa: F401

    log = os.memfd_create("moments")
    for line in sys.stdin:
        config, kill_at = json.loads(line)
        os.pwrite(log, json.dumps({"moments": 0, "moment": ""}).encode().ljust(4096), 0)
        child = os.fork()
        if not child:
            os.dup2(2, 1)
            code = 1
            try:
                _session(config, kill_at, log)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        code = 0 if killed else os.waitstatus_to_exitcode(status)
        print(json.dumps({**json.loads(os.pread(log, 4096, 0)), "killed": killed, "code": code}), flush=True)


if __name__ == "__main__":
    _serve()
