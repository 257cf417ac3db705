"""Adapt the documentation site: add pages from the top of the tree, and join the lines of Chinese paragraphs."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
_CHINESE = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
_WRAPPED = re.compile(f"({_CHINESE})\n *(?={_CHINESE})")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CONTRIBUTING.md and CHANGELOG.md as pages, with links relative to docs/."""
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - mkdocs' signature
    """Remove line ends between Chinese characters, which a browser would show as spaces."""
    return _WRAPPED.sub(r"\1", markdown) if page.file.src_uri.startswith("zh/") else markdown
