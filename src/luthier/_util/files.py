"""Files that are either whole or absent: written beside, synced, then renamed into place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def mishap(path: Path, error: OSError) -> UserError:
    """What an operating system's error on ``path`` means for the user."""
    if error.errno in NO_ROOM:
        return UserError(
            f"{path}: the disk has no room for it ({error.strerror}); nothing half-written was left",
            "free some room, then run the same command again",
        )
    return UserError(f"{path}: {error.strerror or error}", "choose a place that can be written")


def ensure_dir(path: Path) -> Path:
    """Make a directory and its parents; a path that cannot be one is the user's to mend."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be used as a directory ({e.strerror or e})", "choose a directory that can be written"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written", "choose a directory that can be written")
    return path


def sync_dir(path: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut (no-op where unsupported)."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically. Raises UserError where the disk does not take it."""
    ensure_dir(path.parent)
    sweep(path)
    temp = _beside(path, "new")
    try:
        with open(temp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temp.replace(path)
    except OSError as e:
        temp.unlink(missing_ok=True)
        raise mishap(path, e) from None
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """A directory that appears at ``path`` only when the block ends well; replaces what was there.

    A kill at any moment leaves the old directory, the new one, or (between two renames) the old one beside, which the
    next call on the same path puts back.
    """
    ensure_dir(path.parent)
    sweep(path)
    temp = _beside(path, "new")
    try:
        temp.mkdir()
        yield temp
        _sync_tree(temp)
        replace_dir(temp, path)
    except OSError as e:
        shutil.rmtree(temp, ignore_errors=True)
        raise mishap(path, e) from None
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def replace_dir(new: Path, path: Path) -> None:
    """Rename a directory, whose files are on the disk already, to ``path``, in the place of what was there."""
    if path.exists():
        old = _beside(path, "old")
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(path)
    sync_dir(path.parent)


def sweep(path: Path) -> None:
    """Clean up after processes that were killed while writing ``path``; put back what they had moved aside."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(new|old)")
    for entry in list(path.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if not match or _alive(int(match.group(1))):
            continue
        if match.group(2) == "old" and not path.exists():
            entry.rename(path)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def cache_root() -> Path:
    """The user's cache: ``$XDG_CACHE_HOME/luthier``, ``~/.cache/luthier`` where that is not set."""
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "luthier"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _alive(pid: int) -> bool:
    """Whether another process may still be writing; where that cannot be asked safely, yes."""
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync_file(path: Path) -> None:
    """Flush a file that another writer has closed."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def _sync_tree(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
            sync_file(file)
    sync_dir(folder)
