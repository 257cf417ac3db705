"""After the whole suite (make test): every error text was raised by some test, and every fix can be typed."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import typer.main

from luthier import config as configs
from luthier.cli.main import app
from tests.conftest import ROOT, SHARED_RECORD, WORKER
from tests.helpers.error_sites import recorder, sites

pytestmark = pytest.mark.last
_STOPS = re.compile(r"[,;)]?(?:\s|$)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
SETTING = re.compile(r"--set (\S+?)=(\S+?)[.,;)]*(?=\s|$)")
EXTRA = re.compile(r"pip install .*\[(\w+)\]")  # of luthier's name or of its checkout's directory
COMMAND = re.compile(r"(?:^|: )luthier ([a-z]+)(.*)")


@pytest.fixture
def whole_suite(request: pytest.FixtureRequest) -> None:
    run = {Path(item.path).name for item in request.session.items}
    files = {p.name for p in (ROOT / "tests").rglob("test_*.py") if "_slow" not in p.name}
    if files - run or request.config.getoption("-k"):
        pytest.skip("evaluates the whole suite, and only some tests were selected")
    if WORKER:
        others = [item for item in request.session.items if not item.get_closest_marker("last")]
        request.config.stash[SHARED_RECORD].merge(len(others), limit=900)


def test_every_error_text_was_raised(whole_suite: None) -> None:
    assert len(list(sites())) > 100
    missing = [str(site) for site in sites() if site.seen and not recorder.reached(site)]
    assert not missing, "\n".join(missing)


def test_every_offered_fix_is_valid(whole_suite: None) -> None:
    """Its options exist, its settings are accepted, its commands are parsed, its extras exist."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parameters = [p for verb in verbs.values() for p in verb.params]
    options = {o for p in parameters for o in (*p.opts, *p.secondary_opts)} | {"--no-save", "--rows"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert len(recorder.fixes) > 60
    for fix, text in recorder.fixes.items():
        for option in OPTION.findall(fix):
            assert option in options, text
        for key, value in SETTING.findall(fix):
            assert key in configs.all_keys(), text
            if value.strip(".") not in ("", "VALUE", "FILE"):
                configs.build({"model": {"path": "m"}, "data": {"train": "d"}}, settings=[f"{key}={value}"])
        if match := COMMAND.search(fix):
            assert match.group(1) in verbs, text
            words = shlex.split(_STOPS.split(match.group(2).strip(), maxsplit=0)[0]) if match.group(2) else []
            assert all(not w.startswith("-") or w in options for w in words), text
        if extra := EXTRA.search(fix):
            assert extra.group(1) in extras, text
