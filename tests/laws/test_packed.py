"""Law "packed = padded": the flat stream gives the loss of plain padding, token by token, for every architecture.

Shown able to fail: with one segment in place of many (rows that see their neighbours, as naive packing has it) the
losses differ and a change in one row changes the next; with positions that run on, the losses differ.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from luthier.batch import collate
from luthier.kernels.attention import KERNELS
from luthier.kernels.segments import Segments, to_device
from luthier.models.forward import segment_attention, token_losses
from luthier.models.tokenizer import Tokenizer
from luthier.types import Batch, Example

from ..conftest import ARCHITECTURES, make_model
from .helpers import distance, examples, fails, padded_losses, with_adapter


def losses(model: Any, batch: Batch, kernel: str = "auto") -> torch.Tensor:
    with segment_attention(model, kernel):
        return token_losses(model, to_device(batch, "cpu"))


def law(model: Any, rows: list[Example], batch: Batch, kernel: str = "auto") -> None:
    expected = padded_losses(model, rows)
    found = losses(model, batch, kernel)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-5
    assert abs(float((found - expected).mean())) < 1e-6  # a one-sided drift is a bug


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
@torch.no_grad()
def test_flat_stream_equals_padding(arch: str, kernel: str, tokenizer: Tokenizer) -> None:
    model = make_model(arch)
    with_adapter(model)
    rows = examples(tokenizer)
    law(model, rows, collate(rows), kernel)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_changing_one_segment_never_changes_another(arch: str, tokenizer: Tokenizer) -> None:
    model = make_model(arch)
    isolated(model, examples(tokenizer), lambda batch: batch)


def isolated(model: Any, rows: list[Example], alter: Any) -> None:
    changed = rows[0].ids.copy()
    changed[3:-1] = (changed[3:-1] + 7) % 600 + 3
    other = [Example(changed, rows[0].trained, rows[0].source), *rows[1:]]
    before, after = losses(model, alter(collate(rows))), losses(model, alter(collate(other)))
    first = rows[0].supervised
    assert torch.equal(before[first:], after[first:])
    assert not torch.equal(before[:first], after[:first])


def one_segment(batch: Batch) -> Batch:
    length = len(batch.input_ids)
    index = collate([Example(batch.input_ids, batch.input_ids > -1, batch.sources[0])])
    whole = replace(batch, offsets=(0, length))
    return replace(whole, pad_index=_range(length, index), unpad_index=_range(length, index))


def _range(length: int, like: Batch) -> Any:
    return torch.arange(length).numpy().astype(like.pad_index.dtype)


@torch.no_grad()
def test_the_law_sees_rows_that_see_their_neighbours(tokenizer: Tokenizer) -> None:
    model = make_model("llama")
    rows = examples(tokenizer)
    assert fails(lambda: law(model, rows, one_segment(collate(rows))))
    assert fails(lambda: isolated(model, rows, one_segment))


@torch.no_grad()
def test_the_law_sees_positions_that_run_on(tokenizer: Tokenizer) -> None:
    model = make_model("gemma2")
    rows = examples(tokenizer)
    batch = collate(rows)
    shifted = replace(batch, position_ids=batch.position_ids * 2)
    assert fails(lambda: law(model, rows, shifted))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", [k for k in sorted(KERNELS) if k != "reference"])
def test_fast_attention_equals_its_definition_forward_and_backward(
    name: str, softcap: float | None, window: int | None
) -> None:
    torch.manual_seed(0)
    offsets = (0, 1, 6, 19, 23)
    longest, count, total = 13, 4, 23
    pad = torch.zeros(count * longest, dtype=torch.long)
    for s, (a, b) in enumerate(pairwise(offsets)):
        pad[s * longest : s * longest + b - a] = torch.arange(a, b)
    unpad = torch.cat([s * longest + torch.arange(b - a) for s, (a, b) in enumerate(pairwise(offsets))])
    segments = Segments(offsets, longest, pad, unpad)
    shapes = [(1, 6, total, 8), (1, 2, total, 8), (1, 2, total, 8)]
    inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
    weight = torch.randn(1, total, 6, 8, dtype=torch.float64)
    results = []
    for kernel in (KERNELS["reference"], KERNELS[name]):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = kernel(*leaves, segments, 0.3, sliding_window=window, softcap=softcap)
        (out * weight).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert distance(found, expected) < 1e-6  # scores are softmaxed in fp32 by definition
