"""Build commands that install packages into the environment of this process.

luthier may have been installed from a checkout, with or without an activated environment; the command must work in
each case. Source for how a package was installed: PEP 610 (``direct_url.json``).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_command(extra: str) -> str:
    """Return the command that adds an extra to this installation of luthier.

    from a wheel                     pip install 'luthier[export]'
    from a checkout                  pip install '/path/to/checkout[export]', with -e if the installation is editable
    the environment is not active    /path/to/.venv/bin/python -m pip install ...
    the environment has no pip       uv pip install --python /path/to/.venv/bin/python ...
    """
    return pip_install(*_requirement(extra))


def pip_install(*requirements: str) -> str:
    """Return the command that installs packages into the environment of this process."""
    return command_line([*_pip(), *requirements])


def command_line(words: Sequence[str]) -> str:
    """Join the words of a command, quoted for the system's shell."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def _pip() -> list[str]:
    """Return the words before the requirements, for the environment's own pip or, if it has none, for uv."""
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable]
    pip = shutil.which("pip")
    active = pip is not None and Path(pip).parent.resolve() == Path(sys.executable).parent.resolve()
    return [*(["pip"] if active and sys.prefix != sys.base_prefix else [sys.executable, "-m", "pip"]), "install"]


def _requirement(extra: str) -> list[str]:
    checkout, editable = _checkout()
    return [*(["-e"] if editable else []), f"{checkout or 'luthier'}[{extra}]"]


def _checkout() -> tuple[Path | None, bool]:
    """Return the directory that luthier was installed from, if there is one, and whether it is an editable install."""
    for distribution in importlib.metadata.distributions(name="luthier"):
        if distribution.read_text("RECORD") is None:  # the egg-info of a source tree, not an installation
            continue
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        directory = Path(url2pathname(urlsplit(origin.get("url", "")).path))
        if "dir_info" in origin and (directory / "pyproject.toml").is_file():
            return directory, bool(origin["dir_info"].get("editable"))
        return None, False
    source = Path(__file__).parents[3]  # luthier is imported from a source tree that is not installed
    return (source, True) if (source / "pyproject.toml").is_file() else (None, False)
