"""Which processor this is, as Linux tells it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


def name() -> str:
    """Its name; its kind alone where the system does not tell."""
    return _field("model name") or platform.processor() or platform.machine()


def instructions() -> str:
    """The instruction sets that it knows, in one line; empty where the system does not tell."""
    return _field("flags") or _field("Features")


@cache
def _field(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((value.strip() for k, _, value in (line.partition(":") for line in lines) if k.strip() == key), "")
