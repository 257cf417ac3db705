"""Detect device, dtype, CPU and memory (available, in use, peak), and configure the C library's allocator."""

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
from typing import Any

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
    """Return the device for training: CUDA if available, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # cuBLAS is deterministic only with a workspace of fixed size, which torch reads once, before the first product
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name.

    ``auto``: bfloat16 if the device supports it natively, else float16 on CUDA and float32 on the CPU.
    Raises ConfigError for an unknown name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ConfigError(f"--dtype {name}: is not a dtype", "use auto, float32, bfloat16 or float16")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions; emulated bfloat16 is many times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(capabilities.get("bf16") or capabilities.get("sve_bf16"))
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels within the block, so that a resumed run on CUDA equals an uninterrupted one.

    On CUDA the gradient of ``index_select``, for one, otherwise adds in an order that changes from run to run. torch
    warns of an operation without a deterministic kernel, and continues. The CPU's kernels are deterministic.
    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # it costs a pass over memory, and no result of ours depends on it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def resident_now() -> float:
    """Resident bytes of this process; before a model is loaded, those of the interpreter and the libraries."""
    return float(psutil.Process().memory_info().rss)


def available_memory() -> float:
    """Bytes that this process could use in total: free memory plus its own, at most the container's limit."""
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
    """Peak resident bytes of this process; 0 if unknown (Windows)."""
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    # preferred on Linux, where ru_maxrss includes the size of the parent process
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def physical_memory() -> int | None:
    """Physical memory in bytes; None if unknown (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


# --- the C library's allocator: settings affect the whole process, so nothing changes unless a command allows it ---

_KEPT, _RETURNED = 1 << 30, 1 << 24  # bytes: freed blocks up to this size stay with the process


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Make glibc keep large freed blocks within the block, which saves page faults (docs/benchmarks.md).

    For the compiled layers, whose blocks hardly vary: with others, the memory would be fragmented. Warns if glibc
    refuses. Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    if not _keep(_KEPT):
        warnings.warn("mallopt failed: training may be slower", RuntimeWarning, stacklevel=3)
    trim_freed_memory()
    try:
        yield
    finally:
        _keep(_RETURNED)
        trim_freed_memory()


def _keep(size: int) -> bool:
    """Make glibc keep freed blocks of up to ``size`` bytes; false if it refuses."""
    library = _glibc()
    trim_threshold, mmap_threshold = -1, -3
    return library is None or bool(library.mallopt(mmap_threshold, size) and library.mallopt(trim_threshold, size))


def trim_freed_memory() -> bool:
    """Return freed memory to the system now; true if any was returned. Source: malloc_trim(3)."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and this process may change its settings."""
    if sys.platform != "linux" or os.environ.get(KEEP_FREED_MEMORY) != "1":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
