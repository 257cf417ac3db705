"""Tensors that are converted while they are read equal those that are read and then converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.errors import ModelError
from luthier.models.checkpoint_reader import _CONVERTED, Shards, write_safetensors

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
    rows = _CONVERTED // 2 // 64 * 5 // 2  # ends within a block
    tensors = {
        "large": torch.randn(rows, 64).to(stored),
        "vector": torch.randn(7).to(stored),
        "scalar": torch.tensor(1.5, dtype=stored),
        "empty": torch.empty(0, 3, dtype=stored),
    }
    shards = Shards.open(write(tmp_path / "model", tensors, pickled))
    for name, tensor in tensors.items():
        for dtype in (*DTYPES, None):
            read = shards.read(name, dtype)
            assert read.dtype is (dtype or stored)
            assert torch.equal(read, tensor.to(dtype or stored))


def test_a_file_that_becomes_shorter_while_it_is_read_is_reported_in_every_dtype(tmp_path: Path) -> None:
    path = write(tmp_path / "model", {"weight": torch.randn(_CONVERTED, 1)}, pickled=False)
    shards = Shards.open(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(2 * _CONVERTED)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ModelError, match=r"is damaged \(.*unexpected end of file"):
            shards.read("weight", dtype)
