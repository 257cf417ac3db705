"""Training on CUDA uses deterministic kernels, within the training loop only; these tests need no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import luthier
from luthier.devices import device as devices
from luthier.devices.device import deterministic, pick_device
from luthier.training import loop
from tests.conftest import teahouse

CUDA = torch.device("cuda")


def test_kernels_are_deterministic_within_the_block_only() -> None:
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    def fails() -> None:
        with deterministic(CUDA):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()  # a missing kernel does not end a run
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is fill  # type: ignore[attr-defined]


def test_the_settings_of_the_process_are_restored() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic(CUDA):
            pass
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_changes_on_the_cpu() -> None:
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_the_workspace_of_cublas_is_fixed_before_cuda_is_used(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if before:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored afterwards
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == CUDA
    assert devices.os.environ["CUBLAS_WORKSPACE_CONFIG"] == after


def test_every_step_of_a_run_is_within_the_block(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = False

    @contextmanager
    def block(device: torch.device) -> Iterator[None]:
        nonlocal active
        assert device.type == "cpu"
        active = True
        yield
        active = False

    def accumulate(*arguments: object) -> torch.Tensor:
        assert active
        return original(*arguments)  # type: ignore[arg-type]

    original = loop.accumulate
    monkeypatch.setattr(loop, "deterministic", block)
    monkeypatch.setattr(loop, "accumulate", accumulate)
    luthier.train(teahouse(model_dir("llama"), tmp_path / "run", {}, max_steps=2, eval_time_ratio=0))
    assert not active
