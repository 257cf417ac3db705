"""The documentation is up to date: it has every command and key, links are valid, the README's commands work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from luthier import config as configs
from luthier.cli.main import app
from tests.conftest import ROOT
from tests.helpers import make_reference

READMES = ["README.md", "README.zh-CN.md"]
# hosts that code and pages may name: sources of what is done here, and the reader's own machine
HOSTS = (
    "127.0.0.1", "arxiv.org", "docs.pytorch.org", "docs.python.org", "github.com",
    "huggingface.co", "modelscope.cn", "pytorch.org", "www.modelscope.cn",
)  # fmt: skip
GENERATED = {"contributing.md", "changelog.md"}  # pages that the site adds from the top of the tree
PAGES = [
    *READMES,
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
    *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
]


def commands(page: str) -> list[str]:
    """Return the shell lines of the blocks that are marked as run by this test."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- these commands are run[^>]*-->\n```bash\n(.*?)```", text, re.DOTALL)
    assert blocks, f"{page} has no block that is marked as run"
    return [line for block in blocks for line in block.strip().splitlines()]


def test_the_references_of_settings_and_commands_are_generated_from_the_code() -> None:
    for path, page in make_reference.PAGES.items():
        assert path.read_text(encoding="utf-8") == page(), "run python -m tests.helpers.make_reference"
    for key in configs.all_keys():
        assert f"`{key}`" in make_reference.settings_page()


@pytest.mark.parametrize("page", READMES)
def test_every_command_is_documented(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for verb in app.registered_commands:
        assert f"`luthier {verb.name}" in text


def test_every_option_has_a_help_text() -> None:
    for name, verb in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert verb.help and verb.short_help, name
        for parameter in verb.params:
            assert getattr(parameter, "help", None), f"luthier {name}: {parameter.name}"


@pytest.mark.parametrize("page", READMES)
def test_a_readme_starts_with_the_two_commands(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.index("make demo") < text.index("make test") < text.index("luthier check")
    assert "\nmake test\n" in text


@pytest.mark.parametrize("page", PAGES)
def test_links_are_valid(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or Path(target).name in GENERATED or (path.parent / target).exists(), target


def test_lines_of_the_readme_are_short() -> None:
    assert [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if len(line) > 120] == []


def test_both_readmes_have_the_same_commands() -> None:
    assert commands(READMES[0]) == commands(READMES[1])


def test_the_readmes_commands_run(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run them unchanged, with a tiny model in place of the real ones."""
    lines = commands("README.md")
    assert lines[0].startswith("luthier pull smollm2-135m --to model")
    for name in ("model", "Yi-6B-Chat"):
        (tmp_path / name).symlink_to(model_dir("llama"))
    rows = re.search(r"```json\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert rows
    (tmp_path / "rows.jsonl").write_text(rows.group(1), encoding="utf-8")
    (tmp_path / "huanhuan.json").write_text(f"[{rows.group(1)}]", encoding="utf-8")
    for line in lines[1:]:
        argv = [sys.executable, "-m", "luthier.cli.main", *shlex.split(line)[1:]]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr)
    python = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert python
    code = python.group(1).replace('"output_dir": "run"', '"output_dir": "run2"').replace('chat("run")', 'chat("run2")')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_mentions_this_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # computed, so that this file contains no path and no host itself; a host is recognised by its scheme
    forbidden = [
        re.escape(f"{ROOT}/"),
        re.escape(f"{Path.home()}/."),
        rf"https?://(?!{'|'.join(map(re.escape, HOSTS))})",
    ]
    for name in tracked:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".cff", ".ipynb", ".txt", "")
            and path.is_file()
            and path.name not in ("test_docs.py", "LICENSE")
        ):
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not [f for f in forbidden if re.search(f, text)], name


def test_paths_in_the_tour_exist() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    assert len(named) > 25
    assert [p for p in named if not (ROOT / "src" / "luthier" / p).exists() and not (ROOT / p).exists()] == []


def programs(text: str) -> set[str]:
    """The modules and files of this project that a text starts with python."""
    text = re.sub(r'"(benchmarks|examples|notebooks)" / "(\w+\.py)"', r"\1/\2", text)  # as tests build paths
    started = set(re.findall(r"-m[\"', ]+((?:luthier|tests)(?:\.\w+)*)", text))
    return started | set(re.findall(r"(?<![\w/])((?:benchmarks|examples|notebooks)/\w+\.py)", text))


def test_programs_that_tests_and_pages_start_exist() -> None:
    """Slow tests are rarely run, so a program that was moved must be found missing here."""
    files = [ROOT / "Makefile", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.py")]
    started = {p: file for file in files for p in programs(file.read_text(encoding="utf-8"))}
    assert {"luthier", "benchmarks/bench.py", "tests.helpers.make_reference"} <= started.keys()
    places = {p: ROOT / p if "/" in p else ROOT / "src" / p.replace(".", "/") for p in started}
    places = {p: ROOT / p.replace(".", "/") if p.startswith("tests.") else place for p, place in places.items()}
    assert [p for p, place in places.items() if not (place.exists() or place.with_suffix(".py").exists())] == []
