"""Download a repository to a directory that is either complete or absent, resuming interrupted downloads.

Files are written to ``.NAME.partial`` next to the target. Each is compared with the hub's listing, and only a complete
directory is renamed to the target.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from luthier._util import files
from luthier.errors import ModelError, UserError
from luthier.hub.catalogue import PART, Hub, RemoteFile, Source, UnreachableError, corrupt, model_files
from luthier.hub.directory import check_owner, holds_another, inspect_dir, write_manifest
from luthier.hub.huggingface import HuggingFace, offline
from luthier.hub.modelscope import ModelScope
from luthier.types import Log

OnProgress = Callable[[int, int], None]  # called with (bytes downloaded, bytes in total)
_HUBS: dict[str, type[Hub]] = {"modelscope": ModelScope, "huggingface": HuggingFace}
_COMMIT = re.compile(r"[0-9a-f]{40}")  # git's id of a commit
_PROGRESS_INTERVAL = 0.3  # seconds between two progress reports


def pull(
    name: str,
    sources: Sequence[Source],
    target: Path,
    hub: str | None,
    revision: str | None,
    log: Log,
    on_progress: OnProgress | None,
) -> Path:
    """Download the model from the first source that can be reached; returns ``target``.

    sources: in order of preference. hub, revision: what the user asked for, None for any. Raises UserError.
    """
    inspection = inspect_dir(target)
    check_owner(target, inspection, name)
    if inspection.state == "whole":
        manifest = inspection.manifest
        recorded = [manifest.get(key) for key in ("revision", "resolved_revision", "commit")]
        same_revision = revision is None or revision in recorded
        if not same_revision or not str(manifest["source"]).startswith(f"{hub}:" if hub else ""):
            raise holds_another(target, inspection)
        log(f"{target}: already complete, nothing to download")
        return target
    if hub != "modelscope" and offline():
        raise ModelError(
            f"{target}: does not exist, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloading it",
            "unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE",
        )
    files.ensure_dir(target.parent)
    partial = target.with_name(f".{target.name}.partial")
    with _locked(target):
        files.sweep(target)
        if inspection.state == "damaged":
            log(f"{target}: is damaged, downloading the damaged files again")
            if not partial.exists():
                target.rename(partial)  # its intact files need not be downloaded again
        for source in sources:
            try:
                _download(name, source, target, partial, log, on_progress)
                break
            except UnreachableError as e:
                if source is sources[-1]:
                    raise
                log(f"{e.message}; trying {_HUBS[sources[-1].hub].title}")
    log(f"{target}: ready")
    return target


def _download(name: str, source: Source, target: Path, partial: Path, log: Log, on_progress: OnProgress | None) -> None:
    """Download a model's files to ``partial``, write its manifest, and rename it to ``target``."""
    hub = _HUBS[source.hub]()
    revision, listed = hub.list(source)
    wanted = model_files(source, listed)
    total = sum(f.size for f in wanted)
    partial.mkdir(exist_ok=True)
    _tidy(partial, wanted)
    missing = [f for f in wanted if not f.matches(partial / f.path)]
    for file in missing:
        (partial / file.path).unlink(missing_ok=True)
    downloaded = _bytes_in(partial)
    log(
        f"{source.repository} from {hub.title}: {len(wanted)} files, {files.human(total)}"
        + (f", {files.human(downloaded)} of it already downloaded" if downloaded else "")
    )
    files.require_space(
        target, total - downloaded, "free some disk space, or choose a directory on another disk with --to DIR"
    )
    with _reporting(partial, total, on_progress):
        for file in missing:
            _fetch(hub, source, revision, file, partial, log)
            log(f"{file.path}: complete, {files.human(file.size)}")
    digests = {f.path: f.sha256 or files.sha256(partial / f.path) for f in wanted}
    commit = revision if _COMMIT.fullmatch(revision) else None
    write_manifest(
        partial, name, str(source), digests, revision=source.revision, resolved_revision=revision, commit=commit
    )
    files.sync_dir(partial)
    files.replace_dir(partial, target)


def _fetch(hub: Hub, source: Source, revision: str, file: RemoteFile, folder: Path, log: Log) -> None:
    """Download one file; if it does not match the listing, download it once more. Raises ModelError."""
    path = folder / file.path
    for _ in range(2):
        _fetch_with_retries(hub, source, revision, file, folder, log)
        if file.matches(path):
            files.sync_file(path)
            return
        path.unlink()
    raise corrupt(hub.title, file)


def _fetch_with_retries(hub: Hub, source: Source, revision: str, file: RemoteFile, folder: Path, log: Log) -> None:
    """Retry as long as bytes arrive, and up to ``hub.retries`` times in a row without any."""
    tries = 0
    while True:
        before = _bytes_in(folder)
        try:
            hub.fetch(source, revision, file, folder)
            return
        except UnreachableError as e:
            tries = 0 if _bytes_in(folder) > before else tries + 1
            if tries > hub.retries:
                raise UnreachableError(f"{file.path}: {e.message}; the downloaded part is kept", e.fix) from None
            log(f"{file.path}: the connection was lost, resuming")
            time.sleep(tries)
        except OSError as e:
            reached = files.reached_limit(e)
            if reached is None:
                raise
            limit, fix = reached
            raise UserError(f"{file.path}: {limit}; the downloaded part is kept", fix) from None


def _bytes_in(folder: Path) -> int:
    """Total size of the complete and partial files in ``folder``."""
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed in the meantime
            continue
    return total


def _tidy(folder: Path, wanted: Sequence[RemoteFile]) -> None:
    """Delete files of an earlier attempt that this one does not need."""
    names = {f.path for f in wanted} | {f.path + PART for f in wanted}
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock on ``target``; the operating system releases it if the process dies.

    Raises ModelError if another process holds it.
    """
    lock = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    lock.unlink()  # while locked: a process waiting on the removed file notices and starts over
    except Timeout:
        raise ModelError(
            f"{target}: is being pulled by another process", "wait for it to end, then run the same command again"
        ) from None


@contextmanager
def _reporting(folder: Path, total: int, on_progress: OnProgress | None) -> Iterator[None]:
    """Call ``on_progress(bytes downloaded, total)`` at intervals from a thread, independently of the client library."""
    if on_progress is None:
        yield
        return
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(_PROGRESS_INTERVAL):
            on_progress(min(_bytes_in(folder), total), total)

    thread = threading.Thread(target=report, daemon=True)
    on_progress(min(_bytes_in(folder), total), total)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        on_progress(min(_bytes_in(folder), total), total)
