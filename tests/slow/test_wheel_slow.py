"""The wheel works where nothing else is installed and no checkout is near: contents, commands, and the demo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from luthier import __version__
from tests.conftest import ROOT
from tests.helpers.layout import SOURCE

pytestmark = pytest.mark.slow
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILDER = "setuptools>=77"
OURS = ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")  # variables of this test run


@dataclass(frozen=True, slots=True)
class Place:
    """A temporary directory outside the checkout in which commands run, with a cache of its own."""

    path: Path
    pip_cache: str

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._call([str(word) for word in command], check)

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        return self._call(line, True)

    def _call(self, command: str | list[str], check: bool) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in OURS}
        environment |= {"XDG_CACHE_HOME": str(self.path / "cache"), "PIP_CACHE_DIR": self.pip_cache}
        work = self.path / "work"
        work.mkdir(exist_ok=True)
        shell = isinstance(command, str)
        done = subprocess.run(
            command, shell=shell, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Make the place; skip if pip cannot download here, which is not a fault of the package."""
    cache = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory(prefix="luthier-wheel-") as folder:
        made = Place(Path(folder), cache.stdout.strip())
        probe = made.run(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", "probe", BUILDER, check=False)
        if probe.returncode:
            pytest.skip(f"pip cannot download {BUILDER}: {[*probe.stderr.splitlines(), 'no message'][-1]}")
        yield made


@pytest.fixture(scope="module")
def checkout(place: Place) -> Path:
    """Copy the checkout, tests and benchmarks included, without what builds and runs leave in it."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "runs"
    )
    return Path(shutil.copytree(ROOT, place.path / "a checkout", ignore=ignored))


@pytest.fixture(scope="module")
def wheel(place: Place, checkout: Path) -> Path:
    """Build the wheel in an environment that has only the build's requirements, so neither torch nor numpy."""
    place.run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", checkout)
    (path,) = (place.path / "work" / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def programs(place: Place, checkout: Path, wheel: Path) -> Path:
    """Install the wheel into an environment of its own; returns the directory of its programs."""
    place.run(sys.executable, "-m", "venv", place.path / "environment")
    path = place.path / "environment" / ("Scripts" if sys.platform == "win32" else "bin")
    place.run(path / "python", "-m", "pip", "install", "--quiet", "-c", checkout / "constraints.txt", wheel)
    return path


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
        info = f"luthier-{__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    files = {p.relative_to(SOURCE.parent).as_posix() for p in SOURCE.rglob("*") if p.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert {n for n in names if not n.startswith(f"{info}/")} == expected
    assert {Path(n).suffix for n in expected} == {".py", ".typed", ".yaml", ".jsonl", ".cpp", ".h"}
    assert f"{info}/licenses/LICENSE" in names
    assert (metadata["Name"], metadata["Version"]) == ("luthier", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Project-URL"] is metadata["Home-page"] is None
    assert "luthier = luthier.cli.main:main" in entry_points


def test_only_pinned_packages_of_the_core_are_installed(place: Place, checkout: Path, programs: Path) -> None:
    listed = json.loads(place.run(programs / "python", "-m", "pip", "list", "--format", "json").stdout)
    installed = {canonicalize_name(p["name"]): p["version"] for p in listed}
    lines = (checkout / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    unpinned = {n: v for n, v in installed.items() if Version(v).public != pins.get(n)}
    assert set(unpinned) <= {"luthier", "pip", "setuptools"}
    core = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
    assert core <= set(installed)
    extras = {canonicalize_name(Requirement(r).name) for rs in PROJECT["optional-dependencies"].values() for r in rs}
    brought = {"httpx2"}  # by huggingface_hub
    assert extras & set(installed) - brought == {"luthier"}


def test_every_module_imports_without_extras(place: Place, programs: Path) -> None:
    code = (
        "import importlib, pkgutil, luthier\n"
        "names = [module.name for module in pkgutil.walk_packages(luthier.__path__, 'luthier.')]\n"
        "print(len([importlib.import_module(name) for name in names]))"
    )
    assert int(place.run(programs / "python", "-c", code).stdout) > 100


def test_help_and_doctor_work(place: Place, programs: Path) -> None:
    assert place.run(programs / "luthier", "--version").stdout == f"luthier {__version__}\n"
    assert "doctor" in place.run(programs / "luthier", "--help").stdout
    report = json.loads(place.run(programs / "luthier", "doctor", "--json").stdout)
    assert report["smoke"]["ok"] is True
    assert not any(report["extras"].values())
    module = place.run(programs / "python", "-c", "import luthier; print(luthier.__file__)").stdout
    assert Path(module.strip()).is_relative_to(programs.parent)


def test_the_command_that_adds_an_extra_works_after_a_wheel(place: Place, programs: Path) -> None:
    """Although no index has luthier: pip reads the extra from the installed package."""
    line = next(s for s in place.run(programs / "luthier", "doctor").stdout.splitlines() if "to install the extra" in s)
    command = line.partition(": ")[2].replace("NAME", "parquet")
    assert str(programs / "python") in command and "luthier[parquet]" in command
    assert "Would install pyarrow-" in place.shell(f"{command} --dry-run").stdout


@pytest.mark.parametrize("options", [["-e"], []], ids=["editable", "copied"])
def test_the_command_that_adds_an_extra_works_after_a_checkout(
    options: list[str], place: Place, checkout: Path, tmp_path: Path
) -> None:
    place.run(sys.executable, "-m", "venv", tmp_path / "environment")
    python = tmp_path / "environment" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    place.run(python, "-m", "pip", "install", "--no-deps", *options, checkout)
    code = "from luthier._util.installation import install_command; print(install_command('parquet'))"
    command = place.run(python, "-c", code).stdout.strip()
    assert f"{checkout}[parquet]" in command and (" -e " in command) == bool(options)
    done = place.shell(f"{command} --no-deps --dry-run")
    assert f"Would install luthier-{__version__}" in done.stdout and "does not provide the extra" not in done.stderr


def test_the_demo_works(place: Place, programs: Path) -> None:
    """It also downloads and converts the embedded model, which needs packages that nothing else here uses."""
    run = place.path / "marlow"
    done = place.run(programs / "luthier", "demo", "--output-dir", run)
    assert "held-out loss:" in done.stdout and f"chat with it: luthier chat {run}" in done.stdout
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "report.html").is_file()
