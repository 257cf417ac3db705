"""The GPU verification program: it says so if there is no GPU, and its small sections pass on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import verify_gpu
from tests.conftest import ROOT


def _run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "verify_gpu.py"), *map(str, arguments)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=hidden, check=False)


def test_without_a_gpu_the_program_says_so() -> None:
    done = _run()
    assert (done.returncode, done.stdout) == (0, "no GPU found\n")


def test_the_laws_hold_on_the_cpu(tmp_path: Path) -> None:
    done = _run("--cpu", "--only", "facts", "laws", "yi-6b", "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stdout + done.stderr
    facts, laws, skipped = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert facts["torch"] and laws["dropout_masks_equal"] and laws["nf4_values_equal"]
    assert "| yi-6b | 0.0 | did not run |" in done.stdout and skipped["skipped"]


def test_a_fault_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dropout masks that depend on the device, or an error in a gradient, fail the section."""
    monkeypatch.setattr(verify_gpu, "keep", lambda *_: verify_gpu.torch.ones(64, 256, dtype=verify_gpu.torch.bool))
    monkeypatch.setattr(verify_gpu, "_distance", lambda *_: float("nan"))
    failed: Any = verify_gpu.laws(tmp_path)["failed"]
    assert "dropout masks" in failed and "padded float32" in failed


@pytest.mark.slow
def test_the_small_sections_pass_on_the_cpu() -> None:
    done = _run("--cpu", "--budget", "900")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| passed |") == 5
