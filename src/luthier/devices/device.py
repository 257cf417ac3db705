"""What this machine offers: device and dtype, processor, memory that is free, in use and at the peak; the allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import torch

from luthier._util.environment import KEEP_FREED_MEMORY
from luthier.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cpu_name() -> str:
    """CPU model, or architecture if unknown."""
    return _field("model name") or platform.processor() or platform.machine()


def cpu_instructions() -> str:
    """Instruction sets of the CPU in one line; empty if unknown."""
    return _field("flags") or _field("Features")


@cache
def _field(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((value.strip() for k, _, value in (line.partition(":") for line in lines) if k.strip() == key), "")


def pick_device() -> torch.device:
    """The device that trains: CUDA where there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the device computes in it natively; CUDA without it: float16; else float32.

    Raises ConfigError for a name that is none.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ConfigError(f"--dtype {name}: is not a type", "use auto, float32, bfloat16 or float16")
    if device.type == "cuda":  # not yet run on a GPU
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Emulated bfloat16 is many times slower than float32, so only the real thing counts."""
    found = torch.cpu.get_capabilities()
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(found.get("bf16") or found.get("sve_bf16"))
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def resident_now() -> float:
    """Bytes of this process that are resident: interpreter and libraries, before a model is loaded."""
    return float(psutil.Process().memory_info().rss)


def available() -> float:
    """Bytes that this process could have in all: free memory and what it has, or the container's limit."""
    free = float(psutil.virtual_memory().available) + resident_now()
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(file, encoding="ascii") as f:
                text = f.read().strip()
        except OSError:
            continue
        if text.isdigit():
            free = min(free, float(text))
    return free


def peak_rss_bytes() -> int:
    """The process's largest resident size so far; 0 where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    # Linux's own count: its ru_maxrss begins with the size of the program that started this one
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int | None:
    """Physical memory; None if unknown (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


# --- the C library's allocator: it serves the whole process, so nothing here acts unless a command allows it ---

_KEPT, _RETURNED = 1 << 30, 1 << 24  # bytes: freed blocks up to this size stay with the process


def keep_freed_memory(size: int = _KEPT) -> None:
    """Make glibc keep freed blocks of up to ``size`` bytes: given back, every page of the next one faults (10 to 30 %).

    Warns if glibc refuses. Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    library = _glibc()
    if library is None:
        return
    trim_threshold, mmap_threshold = -1, -3
    if not (library.mallopt(mmap_threshold, size) and library.mallopt(trim_threshold, size)):
        warnings.warn("mallopt failed: training may be 10 to 30 % slower", RuntimeWarning, stacklevel=2)


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Within the block glibc returns large freed blocks to the system: blocks of changing sizes would leave holes."""
    keep_freed_memory(_RETURNED)
    try:
        yield
    finally:
        keep_freed_memory()


def trim_freed_memory() -> bool:
    """Return freed memory to the system now; whether any was returned. Source: malloc_trim(3)."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and this process may change its settings."""
    if sys.platform != "linux" or os.environ.get(KEEP_FREED_MEMORY) != "1":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
