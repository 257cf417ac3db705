"""Tensors that are converted while they are read equal those that are read and then converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.errors import ModelError
from luthier.models.checkpoint_reader import _CONVERTED, Shards, write_safetensors
from luthier.models.families.base import Rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write(path: Path, tensors: dict[str, torch.Tensor], pickled: bool) -> Path:
    path.mkdir()
    if pickled:
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        write_safetensors(path / "model.safetensors", tensors)
    return path


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_reading_in_another_dtype_converts_every_value(stored: torch.dtype, pickled: bool, tmp_path: Path) -> None:
    rows = _CONVERTED // 2 // 64 * 5 // 2 + 1  # ends within a block
    tensors = {
        "large": torch.randn(rows, 64).to(stored),
        "vector": torch.randn(7).to(stored),
        "scalar": torch.tensor(1.5, dtype=stored),
        "empty": torch.empty(0, 3, dtype=stored),
        "whole": torch.arange(12).reshape(3, 4),
    }
    shards = Shards.open(write(tmp_path / "model", tensors, pickled))
    for name, tensor in tensors.items():
        for dtype in (*DTYPES, None):
            read = shards.read(name, dtype)
            assert read.dtype is (dtype or tensor.dtype)
            assert torch.equal(read, tensor.to(dtype or tensor.dtype))


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_file_can_be_read_again(old: bool, tmp_path: Path) -> None:
    """The format before torch 1.6 cannot be mapped: releasing its pages would set them to zero."""
    weight = torch.randn(300, 1024)
    torch.save(
        {"weight": weight, "tied": weight}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old
    )
    shards = Shards.open(tmp_path)
    for name in ("weight", "tied", "weight"):
        for dtype in (None, torch.bfloat16):
            assert torch.equal(shards.read(name, dtype), weight.to(dtype or weight.dtype))
    assert torch.equal(shards.rows("weight", [7]), weight[7:8])


@pytest.mark.parametrize(
    "rule", [Rule("w", ("a", "b"), (40, 24)), Rule("w", ("a",), unit_rows=True), Rule("w", ("a",))]
)
def test_rules_split_and_normalise_what_is_stored(rule: Rule, tmp_path: Path) -> None:
    """A normalised row would differ in bits if it were converted first."""
    weight = torch.randn(64, 32, dtype=torch.float32)
    shards = Shards.open(write(tmp_path / "model", {"w": weight}, pickled=False))
    for dtype in (torch.bfloat16, torch.float32, None):
        expected = dict(rule.split(weight, dtype or torch.float32))
        parts = dict(rule.read(shards, dtype))
        assert parts.keys() == expected.keys()
        assert all(torch.equal(parts[name], part) for name, part in expected.items())


def test_a_file_that_becomes_shorter_while_it_is_read_is_reported_in_every_dtype(tmp_path: Path) -> None:
    path = write(tmp_path / "model", {"weight": torch.randn(_CONVERTED, 1)}, pickled=False)
    shards = Shards.open(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(2 * _CONVERTED)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ModelError, match=r"is damaged \(.*unexpected end of file"):
            shards.read("weight", dtype)
