"""A pulled model's directory: where it goes by default, and whether it is whole, by the manifest written last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier._util import files
from luthier.errors import ModelError

MANIFEST = "luthier-model.json"
State = Literal["absent", "whole", "damaged", "foreign"]


def default_dir(name: str) -> Path:
    """Where a pulled model goes: ``models/NAME`` in the user's cache."""
    return files.cache_root() / "models" / name.replace("/", "--")


@dataclass(frozen=True, slots=True)
class Found:
    """``damaged``: ours, but not as we wrote it; ``foreign``: not ours, or with files of others among damaged ones."""

    state: State
    manifest: Mapping[str, Any] = field(default_factory=dict)
    extra: bool = False  # other people's files beside ours


def look(target: Path) -> Found:
    """What is at ``target``; every file is read, since a size proves nothing."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return Found("absent")
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        known = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return Found("foreign")
    extra = bool({p.name for p in target.iterdir()} - {*known, MANIFEST})
    if known and all((target / n).is_file() and files.sha256(target / n) == digest for n, digest in known.items()):
        return Found("whole", manifest, extra)
    return Found("foreign" if extra else "damaged", manifest, extra)


def check_owner(target: Path, found: Found, name: str) -> None:
    """Raises ModelError where ``target`` holds something that pulling ``name`` would have to replace."""
    if found.state == "foreign":
        raise ModelError(f"{target}: is, or holds, something else", "choose an empty or new directory for --to")
    if found.manifest and found.manifest.get("name") != name:
        raise holds_another(target, found)


def holds_another(target: Path, found: Found) -> ModelError:
    """The error for a directory of ours with another model, or the same from another place or revision."""
    manifest = found.manifest
    revision = f" at revision {manifest['revision']}" if manifest.get("revision") else ""
    return ModelError(
        f"{target}: holds {manifest.get('name')} from {manifest.get('source')}{revision}, not what was asked for",
        "choose another directory with --to DIR, or delete this one",
    )


def write_manifest(folder: Path, name: str, source: str, digests: Mapping[str, str], **facts: Any) -> None:
    """The last file to be written: with it the directory is whole. digests: SHA-256 by file name."""
    content = {"name": name, "source": source, **facts, "files": dict(sorted(digests.items()))}
    files.write_json(folder / MANIFEST, content)
