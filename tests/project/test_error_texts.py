"""Every text for the user is asserted; looking back on the whole suite (make test-all), raised, and its fix typable."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import typer.main

from luthier import config as configs
from luthier.cli.main import app
from tests.conftest import ROOT
from tests.helpers.error_sites import recorder, sites

pytestmark = pytest.mark.last
_STOPS = re.compile(r"[,;)]?(?:\s|$)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
SETTING = re.compile(r"--set (\S+?)=(\S+?)[.,;)]*(?=\s|$)")
COMMAND = re.compile(r"(?:^|: )luthier ([a-z]+)(.*)")
WORDS = 3


@pytest.fixture
def whole_suite(request: pytest.FixtureRequest) -> None:
    run = {Path(item.path).name for item in request.session.items}
    there = {p.name for p in (ROOT / "tests").rglob("test_*.py") if "_slow" not in p.name}
    if there - run or request.config.getoption("-k"):
        pytest.skip("looks back on the whole suite, and only some tests were asked for")


def fragments(part: str) -> Iterator[str]:
    """Every run of three words of a text, or all of it where it is shorter."""
    words = part.split()
    for i in range(max(1, len(words) - WORDS + 1)):
        yield " ".join(words[i : i + WORDS])


def test_every_error_text_is_asserted() -> None:
    tests = "\n".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py") if p.name != Path(__file__).name
    ).replace("\\", "")
    found = list(sites())
    assert len(found) > 100
    lost = [str(s) for s in found if not any(f in tests for part in s.parts for f in fragments(part))]
    assert not lost, "\n".join(lost)


@pytest.mark.slow
def test_every_error_text_was_raised(whole_suite: None) -> None:
    lost = [str(site) for site in sites() if site.seen and not recorder.reached(site)]
    assert not lost, "\n".join(lost)


@pytest.mark.slow
def test_every_fix_that_was_offered_can_be_typed(whole_suite: None) -> None:
    """Options exist, settings are accepted, commands are parsed, extras are there."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {o for verb in verbs.values() for p in verb.params for o in p.opts} | {"--no-save"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert len(recorder.fixes) > 60
    for fix, text in recorder.fixes.items():
        for option in OPTION.findall(fix):
            assert option in options, text
        for key, value in SETTING.findall(fix):
            assert key in configs.all_keys(), text
            if value not in ("...", "VALUE", "FILE"):
                configs.build({"model": {"path": "m"}, "data": {"train": "d"}}, settings=[f"{key}={value}"])
        if match := COMMAND.search(fix):
            assert match.group(1) in verbs, text
            words = shlex.split(_STOPS.split(match.group(2).strip(), maxsplit=0)[0]) if match.group(2) else []
            assert all(not w.startswith("-") or w in options for w in words), text
        if extra := re.search(r"luthier\[(\w+)\]", fix):
            assert extra.group(1) in extras, text
