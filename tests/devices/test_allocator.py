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

from luthier._util.environment import KEEP_FREED_MEMORY, PREPARED_PRODUCTS
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
        with device.keeping_freed_memory():
            pass
        assert device.trim_freed_memory() is False
    assert calls == []


def test_a_command_changes_it(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEP_FREED_MEMORY, "1")
    with device.keeping_freed_memory():
        assert calls == [(-3, 1 << 30), (-1, 1 << 30), (0,)]
    assert calls[3:] == [(-3, 1 << 24), (-1, 1 << 24), (0,)]
    assert device.trim_freed_memory() is True
    assert calls[6:] == [(0,)]


def test_a_refusal_is_reported(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEP_FREED_MEMORY, "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *_: 0, malloc_trim=lambda _: 0))
    with pytest.warns(RuntimeWarning, match="mallopt failed"), device.keeping_freed_memory():
        pass
    assert device.trim_freed_memory() is False
    assert calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_this_machines_glibc_accepts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library is not glibc")
    monkeypatch.setenv(KEEP_FREED_MEMORY, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with device.keeping_freed_memory():
            pass


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
    names = {KEEP_FREED_MEMORY, *PREPARED_PRODUCTS}
    environment = {k: v for k, v in os.environ.items() if k not in names}
    code = f"import os, luthier, luthier.devices.device; assert {names!r}.isdisjoint(os.environ)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_command_keeps_few_prepared_products_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = PREPARED_PRODUCTS
    monkeypatch.setenv(first, "7")
    monkeypatch.setenv(second, "unset")  # restored at the end of the test
    monkeypatch.delenv(second)
    assert CliRunner().invoke(app, ["init", "--help"]).exit_code == 0
    assert (os.environ[first], os.environ[second]) == ("7", PREPARED_PRODUCTS[second])


_PRODUCTS = """
import ctypes, torch
Info = type("Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in "abcdefghij"]})
library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
weight = torch.ones(1024, 1024, dtype=torch.bfloat16)
for rows in range(1, 301):
    torch.ones(rows, 1024, dtype=torch.bfloat16) @ weight
    if rows == 20:
        before = library.mallinfo2().h
print(library.mallinfo2().h - before)  # bytes in use
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer"
)
def test_the_memory_of_prepared_products_does_not_grow_with_the_number_of_shapes() -> None:
    """By default it grows for every number of tokens, and a long training in bfloat16 needs gigabytes more."""
    default = {k: v for k, v in os.environ.items() if k not in PREPARED_PRODUCTS}
    unlimited, limited = (
        int(subprocess.run([sys.executable, "-c", _PRODUCTS], env=e, check=True, capture_output=True, text=True).stdout)
        for e in (default, {**default, **PREPARED_PRODUCTS})
    )
    print(f"{unlimited / 1e6:.1f} MB for 280 shapes by default, {limited / 1e6:.1f} MB with {PREPARED_PRODUCTS}")
    if unlimited < 10e6:
        pytest.skip("torch prepares no bfloat16 products on this processor")
    assert limited < 0.2 * unlimited
