"""The directory of a pulled model: its default path, and its state according to the manifest, which is written last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from luthier._util import files
from luthier.errors import ModelError

MANIFEST = "luthier-model.json"
DirectoryState = Literal["absent", "whole", "damaged", "foreign"]


def default_dir(name: str) -> Path:
    """Return the default directory of a pulled model: ``models/NAME`` in the user's cache."""
    return files.cache_root() / "models" / name.replace("/", "--")


@dataclass(frozen=True, slots=True)
class DirectoryInspection:
    """The state of a model directory.

    state: ``damaged``: written by luthier and changed since; ``foreign``: not written by luthier, or damaged and with
    files that luthier did not write.
    """

    state: DirectoryState
    manifest: Mapping[str, object] = field(default_factory=dict)
    extra: bool = False  # it also holds files that luthier did not write


def inspect_dir(target: Path) -> DirectoryInspection:
    """Determine the state of ``target``. Reads every file, since an unchanged size does not mean unchanged content."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return DirectoryInspection("absent")
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        digests = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return DirectoryInspection("foreign")
    extra = bool({p.name for p in target.iterdir()} - {*digests, MANIFEST})
    if digests and all((target / n).is_file() and files.sha256(target / n) == digest for n, digest in digests.items()):
        return DirectoryInspection("whole", manifest, extra)
    return DirectoryInspection("foreign" if extra else "damaged", manifest, extra)


def check_owner(target: Path, inspection: DirectoryInspection, name: str) -> None:
    """Raise ModelError if pulling ``name`` into ``target`` would overwrite another model or other files."""
    if inspection.state == "foreign":
        raise ModelError(
            f"{target}: already exists with other content, which is never overwritten",
            "choose an empty or new directory for --to",
        )
    if inspection.manifest and inspection.manifest.get("name") != name:
        raise holds_another(target, inspection)


def holds_another(target: Path, inspection: DirectoryInspection) -> ModelError:
    """Return the error for a directory that holds another model, or the same model from another source or revision."""
    manifest = inspection.manifest
    revision = f" at revision {manifest['revision']}" if manifest.get("revision") else ""
    return ModelError(
        f"{target}: contains {manifest.get('name')} from {manifest.get('source')}{revision}, not the requested model",
        "choose another directory with --to DIR, or delete this one",
    )


def write_manifest(folder: Path, name: str, source: str, digests: Mapping[str, str], **facts: object) -> None:
    """Write the manifest, always as the last file: it marks the directory as complete.

    digests: SHA-256 by file name. facts: further entries of the manifest. Those of a hub are ``revision``, as
    requested; ``resolved_revision``, as the hub resolved it; and ``commit``, the same if it is a commit, else null.
    (Before ``resolved_revision`` existed, ``commit`` could be the name of a branch.)
    """
    content = {"name": name, "source": source, **facts, "files": dict(sorted(digests.items()))}
    files.write_json(folder / MANIFEST, content)
