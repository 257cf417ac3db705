"""Write files and directories atomically: under a temporary name beside the target, synced, then renamed into place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luthier._util.environment import CACHE
from luthier.errors import UserError

if sys.platform != "win32":
    import fcntl

_LIMITS = {  # limits that a write can reach, and what lifts them
    errno.ENOSPC: ("there is not enough disk space", "free some disk space"),
    errno.EDQUOT: ("your disk quota is exhausted", "delete files of yours on this disk, or ask for a larger quota"),
    errno.EFBIG: (
        "the file would exceed the file size limit",
        "raise the limit (ulimit -f unlimited), or use a disk whose file system allows larger files",
    ),
}


def reached_limit(error: OSError) -> tuple[str, str] | None:
    """Return the limit that a write has reached and the fix, or None if the error has another reason."""
    if error.errno not in _LIMITS:
        return None
    limit, fix = _LIMITS[error.errno]
    return f"{limit} ({error.strerror})", f"{fix}, then run the same command again"


def user_error_of(path: Path, error: OSError, size: int = 0) -> UserError:
    """Return the UserError that explains an operating system's error on ``path``. size: bytes to write, if known."""
    if reached := reached_limit(error):
        limit, fix = reached
        needed = f", {human(size)} are needed" if size else ""
        space = f"; {_free(path)[1]} free{needed}" if error.errno == errno.ENOSPC else ""
        return UserError(f"{path}: {limit}{space}; no partial file was left", fix)
    return UserError(f"{path}: {error.strerror or error}", "choose a path that can be written")


def user_path(path: Path | str) -> Path:
    """Return a path that a user typed, with ``~`` expanded.

    Raises UserError if that home directory is unknown, or for a path that is not valid UTF-8.
    """
    try:
        return require_utf8(Path(path).expanduser())
    except RuntimeError:
        raise UserError(f"{path}: the home directory is unknown", "write the whole path") from None


def require_utf8(path: Path) -> Path:
    """Return a path that can be written to a file. Raises UserError if its bytes are not valid UTF-8."""
    text = str(path)
    readable = text.encode("utf-8", "backslashreplace").decode()
    if readable != text:
        raise UserError(f"{readable}: is not valid UTF-8, so it cannot be recorded in a file", "rename it")
    return path


def _free(path: Path) -> tuple[int | None, str]:
    """Return the bytes that can still be written below ``path``, None if unknown, and a text that names its disk."""
    folder = next((p for p in (path.absolute(), *path.absolute().parents) if p.is_dir()), Path.cwd())
    disk = next(p for p in (folder, *folder.parents) if p.is_mount() or p == p.parent)
    usage = shutil.disk_usage(folder)
    free = usage.free if usage.total else None  # some network file systems report no sizes
    return free, f"the disk mounted at {disk} has {'an unknown number of bytes' if free is None else human(free)}"


def require_space(path: Path, size: int, fix: str = "free some disk space, then run the same command again") -> None:
    """Raise UserError, before anything is written, if ``size`` bytes more do not fit on the disk of ``path``."""
    free, disk = _free(path)
    if free is not None and free < size:
        raise UserError(f"{path}: needs {human(size)}, and {disk} free", fix)


def human(size: int) -> str:
    """Format a size in bytes, for example as ``15.2 GB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def ensure_dir(path: Path) -> Path:
    """Create a directory and its parents. Raises UserError if it cannot be created or written to."""
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
    """Flush a directory's entries, so that a rename survives a power cut. Does nothing on systems without support."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically. Raises UserError if it cannot be written."""
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
        raise user_error_of(path, e) from None
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_dir(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``path`` when the block ends without an exception.

    If the process is killed, ``path`` is the old directory or the new one. Between two renames it is missing, and the
    old one has a temporary name; the next call on the same path restores it. Raises UserError if a file cannot be
    written.

    size: bytes that will be written, if known; nothing is started if the disk has less.
    """
    ensure_dir(path.parent)
    sweep(path)
    require_space(path, size)
    temp = _beside(path, "new")
    try:
        temp.mkdir()
        yield temp
        _sync_tree(temp)
        replace_dir(temp, path)
    except BaseException as e:
        shutil.rmtree(temp, ignore_errors=True)
        if reason := _os_error(e):
            raise user_error_of(path, reason, size) from None
        if isinstance(e, UserError):
            e.message = e.message.replace(str(temp), str(path))
        raise


def _os_error(error: BaseException) -> OSError | None:
    """Return the operating system's error behind one; libraries in Rust only name its number in their own error."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)$", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number and int(number[1]) in _LIMITS else None


def replace_dir(new: Path, path: Path) -> None:
    """Rename a directory, whose files must already be synced, to ``path``, and delete what was there before."""
    if path.exists():
        old = _beside(path, "old")
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(path)
    sync_dir(path.parent)


def sweep(path: Path) -> None:
    """Delete temporary files of processes that were killed while writing ``path``; restore what they moved aside."""
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


_locks: set[int] = set()  # the descriptors of the locks that this process holds


@contextmanager
def locked(path: Path, owner: str) -> Iterator[bool]:
    """Lock a file, which is created, contains ``owner`` and is deleted at the end, until the block or process ends.

    Yields false if the system has no locks. Raises BlockingIOError with the other owner's text if the file is locked.
    """
    lock = _lock(path)
    if lock is None:
        yield False
        return
    _locks.add(lock)
    try:
        with suppress(OSError):  # a full disk costs the text only
            os.ftruncate(lock, 0)
            os.write(lock, owner.encode("utf-8", "replace"))
        yield True
    finally:
        if lock in _locks:  # not in a forked child
            _locks.remove(lock)
            with suppress(OSError):  # while it is locked: whoever has it open finds it deleted (see _lock)
                path.unlink()
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Return the descriptor of a locked file, which programs do not inherit; None if the system has no locks."""
    if sys.platform == "win32":
        return None
    while True:
        ensure_dir(path.parent)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just deleted the directory, which it had created
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:
            pass  # its owner deleted it between both calls
        except BlockingIOError as e:
            owner = os.pread(lock, 1000, 0).decode("utf-8", "replace")
            os.close(lock)
            raise BlockingIOError(e.errno, owner) from None
        except OSError:
            os.close(lock)
            path.unlink(missing_ok=True)
            return None
        os.close(lock)


def _close_inherited_locks() -> None:
    """Close the locks in a forked child, which would otherwise hold them after the death of its parent."""
    for lock in _locks:
        os.close(lock)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)


def cache_root() -> Path:
    """Return the directory of all caches: ``$LUTHIER_CACHE``, ``$XDG_CACHE_HOME/luthier`` or ``~/.cache/luthier``."""
    if own := os.environ.get(CACHE):
        return user_path(own)
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "luthier"
    try:
        home = Path.home()
    except RuntimeError:  # a user without an entry in the user database and without $HOME, as in containers
        home = Path("/")
    return home / ".cache" / "luthier"


def unwritable(folder: Path) -> str | None:
    """Create a directory if it is missing; return why it cannot be written, None if it can."""
    try:
        ensure_dir(folder)
    except UserError as e:
        return e.message
    return None


def can_cache(log: Callable[[str], None]) -> bool:
    """Whether the cache can be written. If not, log that once per process: several caches have the same reason."""
    reason = unwritable(cache_root())
    if reason and reason not in _logged:
        _logged.add(reason)
        log(f"note: nothing is cached for later ({reason}); to cache, set {CACHE} to a directory that can be written")
    return reason is None


_logged: set[str] = set()


def key_of(facts: object) -> str:
    """Return a name for a cached result, made from everything that it depends on: JSON, or values with a ``repr``."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()[:20]


def exists(path: Path) -> bool:
    """Whether a path exists, false if a directory above it may not be entered (``Path.exists`` raises then)."""
    return os.path.exists(path)  # noqa: PTH110


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, which is read in blocks."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _alive(pid: int) -> bool:
    """Whether another process with this id may still be writing; true if that cannot be determined safely."""
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
    """Flush a closed file to the disk."""
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
