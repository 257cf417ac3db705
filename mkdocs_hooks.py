"""Add CONTRIBUTING.md and CHANGELOG.md, which are kept at the top of the tree, to the documentation site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each file as a page, with links relative to docs/."""
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files
