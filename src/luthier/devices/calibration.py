"""Measure how fast this machine is, once: the results are cached on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version

import torch

from luthier import __version__
from luthier._util import files
from luthier.devices.device import cpu_name
from luthier.errors import UserError


def machine() -> dict[str, object]:
    """Return what a speed depends on: versions, CPU, threads, GPU."""
    return {
        "luthier": __version__,
        "torch": version("torch"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def calibrated(name: str, measure: Callable[[], float]) -> float:
    """Return a rate of this machine; the first call measures it (about 1 s) and caches it on disk."""
    file = files.cache_root() / "calibration.json"
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rates = {}
    key = f"{json.dumps(machine(), sort_keys=True)} {name}"
    if not isinstance(rates.get(key), float):
        rates = {k: v for k, v in rates.items() if isinstance(v, float)}
        rates[key] = measure()
        with suppress(UserError):  # measured again next time
            files.write_json(file, rates)
    return float(rates[key])


def calls_per_second(work: Callable[[], object], seconds: float) -> float:
    """Call ``work`` for about this long; returns how often it ran per second."""
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        done += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done / (time.perf_counter() - start)
