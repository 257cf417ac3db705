"""The command that an error offers to install an extra works for the way in which luthier was installed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier._util.installation import command_line, install_command, pip_install
from luthier.verbs import doctor
from tests.conftest import Result
from tests.helpers.layout import SOURCE

Origin = dict[str, object] | None  # the content of direct_url.json, if luthier has one
PIP = "pip.exe" if sys.platform == "win32" else "pip"
WHEEL: Origin = {"archive_info": {}, "url": "file:///downloads/luthier-0.1.0-py3-none-any.whl"}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an activated virtual environment whose path needs quotes; returns its directory of programs."""
    path = tmp_path / "my env" / "bin"
    path.mkdir(parents=True)
    for name in ("python", PIP):
        (path / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(path / "python"))
    monkeypatch.setattr(sys, "prefix", str(path.parent))
    monkeypatch.setenv("PATH", str(path))
    return path


@pytest.fixture
def installed(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Origin], None]:
    """Return a function that makes luthier installed from an origin."""

    def install(origin: Origin) -> None:
        info = programs.parent / "site-packages" / "luthier-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.4\nName: luthier\nVersion: 0.1.0\n")
        (info / "RECORD").touch()
        if origin is not None:
            (info / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.syspath_prepend(info.parent)

    return install


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    path = tmp_path / "my checkout"
    path.mkdir()
    (path / "pyproject.toml").touch()
    return path


@pytest.mark.parametrize("origin", [None, WHEEL], ids=["from an index", "from a file"])
def test_after_installing_a_wheel_the_command_names_the_package(
    origin: Origin, installed: Callable[[Origin], None]
) -> None:
    installed(origin)
    assert install_command("export") == command_line(["pip", "install", "luthier[export]"])


@pytest.mark.parametrize("editable", [True, False])
def test_after_installing_a_checkout_the_command_names_its_directory(
    editable: bool, installed: Callable[[Origin], None], checkout: Path
) -> None:
    installed({"dir_info": {"editable": True} if editable else {}, "url": checkout.as_uri()})
    options = ["-e"] if editable else []
    assert install_command("export") == command_line(["pip", "install", *options, f"{checkout}[export]"])


def test_a_deleted_checkout_is_not_named(installed: Callable[[Origin], None], checkout: Path) -> None:
    (checkout / "pyproject.toml").unlink()
    installed({"dir_info": {}, "url": checkout.as_uri()})
    assert install_command("export") == command_line(["pip", "install", "luthier[export]"])


@pytest.mark.parametrize("other", [True, False], ids=["another pip comes first", "there is no pip"])
def test_without_activation_the_command_names_the_interpreter(
    other: bool, installed: Callable[[Origin], None], programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if other:
        (tmp_path / PIP).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    installed(None)
    python = str(programs / "python")
    assert install_command("export") == command_line([python, "-m", "pip", "install", "luthier[export]"])


def test_outside_virtual_environments_the_command_names_the_interpreter(
    installed: Callable[[Origin], None], programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pip beside a system's python may belong to another version of Python."""
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    installed(None)
    python = str(programs / "python")
    assert install_command("export") == command_line([python, "-m", "pip", "install", "luthier[export]"])


def test_the_metadata_of_a_source_tree_is_no_installation(
    installed: Callable[[Origin], None], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setuptools leaves it in src/, which may come first on Python's path."""
    installed({"dir_info": {"editable": True}, "url": checkout.as_uri()})
    metadata = checkout / "src" / "luthier.egg-info"
    metadata.mkdir(parents=True)
    (metadata / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: luthier\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(metadata.parent)
    assert install_command("export") == command_line(["pip", "install", "-e", f"{checkout}[export]"])


@pytest.mark.skipif(sys.platform == "win32", reason="quotes of a POSIX shell")
def test_the_command_is_quoted_for_the_shell(installed: Callable[[Origin], None], checkout: Path) -> None:
    installed({"dir_info": {}, "url": checkout.as_uri()})
    assert install_command("export") == f"pip install '{checkout}[export]'"
    assert shlex.split(install_command("export")) == ["pip", "install", f"{checkout}[export]"]


def test_doctor_prints_the_command_if_an_extra_is_missing(
    luthier: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in doctor.EXTRAS:
        monkeypatch.setitem(doctor.EXTRAS, name, ("numpy",))
    assert "to install" not in luthier("doctor").out
    monkeypatch.setitem(doctor.EXTRAS, "parquet", ("numpy", "no-such-package"))
    out = luthier("doctor").out
    assert "  extra parquet    not installed\n" in out
    assert f"  to install the extra NAME: {install_command('NAME')}\n" in out


def test_no_message_has_a_command_of_its_own() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.name != "installation.py":
            assert "luthier[" not in path.read_text(encoding="utf-8"), path


def test_a_source_tree_that_is_not_installed_is_named(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: [])
    assert install_command("export") == command_line(["pip", "install", "-e", f"{SOURCE.parents[1]}[export]"])


def test_an_environment_without_pip_is_changed_by_uv(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (programs / PIP).unlink()
    assert pip_install("vllm") == command_line([sys.executable, "-m", "pip", "install", "vllm"])
    (programs / ("uv.exe" if sys.platform == "win32" else "uv")).touch(0o755)
    assert pip_install("vllm") == command_line(["uv", "pip", "install", "--python", sys.executable, "vllm"])
