"""The documentation site builds without a warning, works offline, and its commands and translations are valid."""

from __future__ import annotations

import html.parser
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

from luthier import config as configs
from luthier.cli.main import app
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TRANSLATED = sorted(page.name for page in (DOCS / "zh").glob("*.md"))
FOR_BEGINNERS = {
    "index.md", "quickstart.md", "first-persona.md", "data.md", "recipes.md", "memory.md", "evaluation.md",
    "export-and-serving.md", "troubleshooting.md",
}  # fmt: skip
_COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


class _Resources(html.parser.HTMLParser):
    """Collect the addresses that a browser loads when it opens a page; links that a reader follows do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.addresses.append(values.get("href") or "")
        if tag in ("script", "img", "iframe", "source", "video") and values.get("src"):
            self.addresses.append(values["src"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site strictly: a warning, such as an invalid link or a page outside the navigation, is an error."""
    pytest.importorskip("material", reason="the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    built = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")} - {"404.md"}
    assert built == {str(p.relative_to(DOCS)) for p in PAGES} | {"contributing.md", "changelog.md"}


def test_the_site_works_offline(site: Path) -> None:
    for page in site.rglob("*.html"):
        parser = _Resources()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.addresses, page
        for address in parser.addresses:
            assert not re.match(r"(?:https?:)?//", address), (page.name, address)
            assert page.name == "404.html" or (page.parent / address.partition("?")[0]).exists(), (page.name, address)
    assert (site / "search").is_dir()


def test_the_python_page_documents_every_public_name(site: Path) -> None:
    import luthier

    text = (site / "python-api.html").read_text(encoding="utf-8")
    assert [name for name in luthier.__all__ if name not in text] == []


def test_pages_for_beginners_exist_in_both_languages() -> None:
    assert set(TRANSLATED) == FOR_BEGINNERS
    for name in TRANSLATED:
        english, chinese = ((folder / name).read_text(encoding="utf-8") for folder in (DOCS, DOCS / "zh"))
        assert f"[中文](zh/{name})" in english and f"[English](../{name})" in chinese, name
        assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 200, name
        assert [*commands(english)] == [*commands(chinese)], name
        assert len(re.findall("^#+ ", english, re.MULTILINE)) == len(re.findall("^#+ ", chinese, re.MULTILINE)), name


def commands(text: str) -> Iterator[str]:
    """Yield the luthier commands of a page's shell blocks; a line that ends in a backslash goes on."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("luthier "):
                yield line.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_commands_are_valid(page: Path) -> None:
    """Parse every command as the command line does, without running it; every setting must exist."""
    for line in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)[1:]
        if words[0] in ("--help", "--version"):
            continue
        verb = _COMMANDS[words[0]]
        if "--help" not in words:
            verb.make_context(words[0], list(words[1:]))
        for setting in re.findall(r"--set [\"']?([\w.]+)=", line):
            assert setting in configs.all_keys(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_settings_in_the_text_exist(page: Path) -> None:
    sections = "|".join(sorted({key.partition(".")[0] for key in configs.all_keys() if "." in key}))
    for key in re.findall(rf"`((?:{sections})\.\w+)", page.read_text(encoding="utf-8")):
        assert key in configs.all_keys() or key.endswith((".py", ".json", ".jsonl", ".yaml", ".safetensors")), key


def test_every_decision_is_listed() -> None:
    text = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\d{4}-[^)]*\.md)\)", text)) == sorted(p.name for p in DOCS.glob("decisions/0*.md"))


def test_pictures_exist_and_are_used() -> None:
    used = {Path(x).name for p in [*PAGES, *ROOT.glob("README*.md")] for x in _pictures(p.read_text(encoding="utf-8"))}
    assert used == {p.name for p in (DOCS / "pictures").iterdir()}


def _pictures(text: str) -> list[str]:
    return re.findall(r"!\[[^\]]+\]\(([^)]*pictures/[^)]+)\)", text)


def test_the_navigation_has_every_translation() -> None:
    nav = yaml.safe_load(re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))["nav"]
    chinese = next(section["中文"] for section in nav if "中文" in section)
    assert {Path(path).name for entry in chinese for path in entry.values()} == set(TRANSLATED)


def test_lines_of_chinese_paragraphs_are_joined(site: Path) -> None:
    for page in (site / "zh").glob("*.html"):
        text = re.sub(r"<pre>.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"[\u4e00-\u9fff，。；：]\n *[\u4e00-\u9fff]", text), page
