"""From a repository to a directory that is whole or absent; what has arrived is kept for the next try.

Files come into ``.NAME.partial`` beside the target. Each is compared with what the hub lists before it counts, and
only a complete directory is renamed to the target.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from luthier._util import files
from luthier.errors import ModelError, UserError
from luthier.hub.catalogue import PART, Hub, RemoteFile, Source, UnreachableError, corrupt, needed
from luthier.hub.directory import check_owner, holds_another, look, write_manifest
from luthier.hub.huggingface import HuggingFace, offline
from luthier.hub.modelscope import ModelScope
from luthier.types import Say

Progress = Callable[[int, int], None]
_HUBS: dict[str, type[Hub]] = {"modelscope": ModelScope, "huggingface": HuggingFace}
_LOOK = 0.3  # seconds between two looks at how much has arrived


def pull(
    name: str,
    places: Sequence[Source],
    target: Path,
    hub: str | None,
    revision: str | None,
    say: Say,
    progress: Progress | None,
) -> Path:
    """Bring the model from the first place that can be reached. hub, revision: as the user gave them."""
    found = look(target)
    check_owner(target, found, name)
    if found.state == "whole":
        there = found.manifest
        if revision not in (None, there.get("revision"), there.get("commit")) or not str(there["source"]).startswith(
            f"{hub}:" if hub else ""
        ):
            raise holds_another(target, found)
        say(f"{target}: there already, and whole")
        return target
    if hub != "modelscope" and offline():
        raise ModelError(
            f"{target}: is not there, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to fetch it",
            "unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE",
        )
    files.ensure_dir(target.parent)
    partial = target.with_name(f".{target.name}.partial")
    with _alone(target):
        files.sweep(target)
        if found.state == "damaged":
            say(f"{target}: is damaged, fetching what is wrong again")
            if not partial.exists():
                target.rename(partial)  # what is right of it need not come again
        for place in places:
            try:
                _bring(name, place, target, partial, say, progress)
                break
            except UnreachableError as e:
                if place is places[-1]:
                    raise
                say(f"{e.message}; trying {_HUBS[places[-1].hub].title}")
    say(f"{target}: ready")
    return target


def _bring(name: str, place: Source, target: Path, partial: Path, say: Say, progress: Progress | None) -> None:
    hub = _HUBS[place.hub]()
    revision, listed = hub.list(place)
    wanted = needed(place, listed)
    total = sum(f.size for f in wanted)
    partial.mkdir(exist_ok=True)
    _tidy(partial, wanted)
    missing = [f for f in wanted if not f.same(partial / f.path)]
    for file in missing:
        (partial / file.path).unlink(missing_ok=True)
    there = _held(partial)
    say(
        f"{place.repository} from {hub.title}: {len(wanted)} files, {human(total)}"
        + (f", of which {human(there)} are here already" if there else "")
    )
    free = shutil.disk_usage(partial).free
    if total - there > free:
        raise ModelError(
            f"{target}: needs {human(total - there)} more, the disk has {human(free)} free",
            "free some room, or choose a place on another disk with --to DIR",
        )
    with _watched(partial, total, progress):
        for file in missing:
            _fetch(hub, place, revision, file, partial, say)
            say(f"{file.path}: whole, {human(file.size)}")
    digests = {f.path: f.sha256 or files.sha256(partial / f.path) for f in wanted}
    write_manifest(partial, name, str(place), digests, revision=place.revision, commit=revision)
    files.sync_dir(partial)
    files.replace_dir(partial, target)


def _fetch(hub: Hub, place: Source, revision: str, file: RemoteFile, folder: Path, say: Say) -> None:
    """One file, compared with what is listed; what is not the same is fetched once more."""
    path = folder / file.path
    for _ in range(2):
        _patiently(hub, place, revision, file, folder, say)
        if file.same(path):
            files.sync_file(path)
            return
        path.unlink()
    raise corrupt(hub.title, file)


def _patiently(hub: Hub, place: Source, revision: str, file: RemoteFile, folder: Path, say: Say) -> None:
    """Try again as long as bytes arrive, and a few times more."""
    tries = 0
    while True:
        before = _held(folder)
        try:
            hub.fetch(place, revision, file, folder)
            return
        except UnreachableError as e:
            tries = 0 if _held(folder) > before else tries + 1
            if tries > hub.patience:
                raise UnreachableError(f"{file.path}: {e.message}; what has arrived is kept", e.fix) from None
            say(f"{file.path}: the connection was lost, going on")
            time.sleep(tries)
        except OSError as e:
            if e.errno not in files.NO_ROOM:
                raise
            raise UserError(
                f"{file.path}: the disk takes no more of it ({e.strerror}); what has arrived is kept",
                "free some room, then run the same command again",
            ) from None


def human(size: int) -> str:
    """``15.2 GB``"""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _held(folder: Path) -> int:
    """Bytes that have arrived, of files that are whole and of parts."""
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


def _tidy(folder: Path, wanted: Sequence[RemoteFile]) -> None:
    """Drop what an earlier try left and this one has no use for."""
    names = {f.path for f in wanted} | {f.path + PART for f in wanted}
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Held by one process at a time; the operating system lets go when that dies."""
    lock = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    lock.unlink()  # while it is held: whoever waits on the removed file sees that, and starts over
    except Timeout:
        raise ModelError(
            f"{target}: is being pulled by another process", "wait for it to end, then run the same command again"
        ) from None


@contextmanager
def _watched(folder: Path, total: int, progress: Progress | None) -> Iterator[None]:
    """Tell ``progress(bytes here, bytes in all)`` now and then, whatever the client does."""
    if progress is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK):
            progress(min(_held(folder), total), total)

    thread = threading.Thread(target=watch, daemon=True)
    progress(min(_held(folder), total), total)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress(min(_held(folder), total), total)
