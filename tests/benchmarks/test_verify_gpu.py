"""The GPU verification program: it reports a missing GPU and each failed check; its small sections pass on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_sections
import verify_gpu
from tests.conftest import ROOT


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "verify_gpu.py"), *map(str, arguments)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=hidden, check=False)


def test_a_missing_gpu_is_reported() -> None:
    done = _run()
    assert (done.returncode, done.stdout) == (0, "no GPU found\n")


def test_the_laws_hold_on_the_cpu(tmp_path: Path) -> None:
    done = _run("--cpu", "--only", "facts", "laws", "yi-6b", "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stdout + done.stderr
    facts, laws, skipped = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert facts["torch"] and laws["dropout_masks_equal"] and len(laws["errors"]) == 9
    assert laws["nf4_codes_that_differ"] == laws["nf4_values_differ_by"] == 0
    assert skipped["skipped"] and "| yi-6b | 0.0 | did not run: needs a GPU |" in done.stdout


def test_each_failed_law_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A gradient that is not a number fails, wherever it is; so do masks and quantised values of this device only."""
    distances = [0.0] * 4 + [math.nan]
    monkeypatch.setattr(gpu_sections, "_loss_and_gradients", lambda *_: list(torch.zeros(5)))
    monkeypatch.setattr(gpu_sections, "_distance", lambda *_: distances.append(distances.pop(0)) or distances[-1])
    monkeypatch.setattr(gpu_sections, "keep", lambda *_: torch.ones(64, 256, dtype=torch.bool))
    monkeypatch.setattr(gpu_sections, "_nf4_differences", lambda *_: (0.0, math.nan))
    failed = gpu_sections.laws(tmp_path)["failed"]
    assert {"padded float32", "looped float32", "reference float32", "dropout masks", "nf4"} <= set(failed)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"killed": False}, ["not killed"]),
        ({"again": b"other"}, ["two runs differ"]),
        ({"resumed": b"other"}, ["the resumed run differs"]),
        ({"line": "starting"}, ["not resumed"]),
        ({"last": 6.9}, ["the loss does not fall"]),
        ({}, []),
    ],
)
def test_each_failed_check_of_training_is_reported(
    fault: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {"killed": True, "again": b"a", "resumed": b"a", "line": "resuming after step 10", "last": 2.0, **fault}

    def train(_: Path, run: Path, report: Any = lambda _: None) -> dict[str, Any]:
        (run / "adapter").mkdir(parents=True)
        content = {"straight": b"a", "again": values["again"], "killed": values["resumed"]}[run.name]
        (run / "adapter" / "adapter_model.safetensors").write_bytes(content)
        report(values["line"])
        losses = [7.0, values["last"]]
        held_out = {"base": {"loss": 7.0}, "tuned": {"loss": 6.0}}
        return {"losses": losses, "held_out": held_out, "device": "cuda", "dtype": "bfloat16", "tokens_per_s": 1.0}

    monkeypatch.setattr(gpu_sections, "small_model", lambda folder: folder)
    monkeypatch.setattr(gpu_sections, "_train", train)
    monkeypatch.setattr(gpu_sections, "_kill_when_saved", lambda *_: values["killed"])
    assert gpu_sections.training(tmp_path)["failed"] == expected


def test_a_section_that_crashes_or_did_not_run_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_gpu.sys, "executable", "/bin/false")
    assert not verify_gpu.verify(["facts"], 60, cpu=True, to=None)
    assert "| ended with exit code 1 |" in capsys.readouterr().out
    assert not verify_gpu.verify(["laws"], 1, cpu=True, to=None)
    assert "| did not run: no time left |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_small_sections_pass_on_the_cpu() -> None:
    done = _run("--cpu", "--budget", "1800")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| passed |") == 5
