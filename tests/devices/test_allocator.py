"""The C library's allocator is changed by commands only, and a refusal is reported."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from luthier._util.environment import KEEP_FREED_MEMORY
from luthier.cli.main import app
from luthier.devices import device


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the calls to a stand-in for glibc."""
    recorded: list[tuple[int, ...]] = []

    def record(*arguments: int) -> int:
        recorded.append(arguments)
        return 1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=record, malloc_trim=record))
    return recorded


def test_library_use_leaves_the_allocator_unchanged(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (None, "0"):
        if value is None:
            monkeypatch.delenv(KEEP_FREED_MEMORY, raising=False)
        else:
            monkeypatch.setenv(KEEP_FREED_MEMORY, value)
        device.keep_freed_memory()
        with device.returning_freed_memory():
            pass
        assert device.trim_freed_memory() is False
    assert calls == []


def test_a_command_changes_it(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEP_FREED_MEMORY, "1")
    with device.returning_freed_memory():
        assert calls == [(-3, 1 << 24), (-1, 1 << 24)]
    assert calls[2:] == [(-3, 1 << 30), (-1, 1 << 30)]
    assert device.trim_freed_memory() is True
    assert calls[4:] == [(0,)]


def test_a_refusal_is_reported(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEP_FREED_MEMORY, "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *_: 0, malloc_trim=lambda _: 0))
    with pytest.warns(RuntimeWarning, match="mallopt failed"):
        device.keep_freed_memory()
    assert device.trim_freed_memory() is False
    assert calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_this_machines_glibc_accepts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library is not glibc")
    monkeypatch.setenv(KEEP_FREED_MEMORY, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device.keep_freed_memory()


@pytest.mark.parametrize(
    ("options", "variable", "expected"),
    [([], None, "1"), (["--no-keep-freed-memory"], None, "0"), ([], "0", "0"), (["--keep-freed-memory"], "0", "1")],
)
def test_the_switch_of_the_command_line(
    options: list[str], variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEEP_FREED_MEMORY, variable or "unset")  # restored at the end of the test
    if variable is None:
        monkeypatch.delenv(KEEP_FREED_MEMORY)
    done = CliRunner().invoke(app, [*options, "init", "--help"])
    assert done.exit_code == 0, done.output
    assert os.environ[KEEP_FREED_MEMORY] == expected


def test_importing_the_library_sets_nothing() -> None:
    environment = {k: v for k, v in os.environ.items() if k != KEEP_FREED_MEMORY}
    code = f"import os, luthier, luthier.devices.device; assert {KEEP_FREED_MEMORY!r} not in os.environ"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
