"""Law "packed = padded": packed rows have the same loss as padded rows, token by token, for every architecture.

The law can fail: it detects rows in one segment, which attend to each other as in naive packing, and positions that
continue from row to row.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from luthier.batching.collate import Segments, collate, to_device
from luthier.kernels import attention as kernels
from luthier.kernels.attention import KERNELS
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training.forward import segment_attention, supervised_logits
from luthier.types import Batch, Example, RowRef
from tests.conftest import ARCHITECTURES, make_model
from tests.helpers.documented import flash_attn_varlen_func
from tests.helpers.rows import distance, examples, fails, padded_losses, with_adapter


@pytest.fixture(autouse=True)
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace FlashAttention's kernel, which needs a GPU, with an implementation of its documentation."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))


def losses(model: Any, batch: Batch, kernel: str = "auto") -> torch.Tensor:
    on_device = to_device(batch, "cpu")
    with segment_attention(model, kernel), torch.no_grad():
        return F.cross_entropy(supervised_logits(model, on_device), on_device.target_ids, reduction="none")


def law(model: Any, rows: list[Example], batch: Batch, kernel: str = "auto") -> None:
    expected = padded_losses(model, rows)
    packed = losses(model, batch, kernel)
    assert packed.shape == expected.shape
    assert float((packed - expected).abs().max()) < 1e-5
    assert abs(float((packed - expected).mean())) < 1e-6  # a one-sided drift is a bug


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
    return collate([Example(np.append(batch.input_ids, 0), np.append(False, batch.input_ids > -1), batch.sources[0])])


def naive(batch: Batch) -> Batch:
    """Make one segment of all rows; positions still start at 0 in each row."""
    whole = one_segment(batch)
    parts = ("offsets", "parents", "query_index", "key_index", "stream_index")
    return replace(batch, **{part: getattr(whole, part) for part in parts})


@torch.no_grad()
def test_the_law_detects_rows_that_attend_to_their_neighbours(tokenizer: Tokenizer) -> None:
    model = make_model("llama")
    rows = examples(tokenizer)
    assert fails(lambda: law(model, rows, naive(collate(rows))))
    assert fails(lambda: isolated(model, rows, naive))


@torch.no_grad()
def test_the_law_detects_positions_that_continue(tokenizer: Tokenizer) -> None:
    model = make_model("gemma2")
    rows = examples(tokenizer)
    batch = collate(rows)
    shifted = replace(batch, position_ids=batch.position_ids * 2)
    assert fails(lambda: law(model, rows, shifted))


def stream(lengths: list[int], shared: int) -> Segments:
    """Make segments of rows with these lengths whose first ``shared`` tokens are the same."""
    rows = [np.append(np.arange(shared), 1000 * (i + 1) + np.arange(n - shared)) for i, n in enumerate(lengths)]
    examples = [Example(np.append(row, 0), np.arange(len(row) + 1) > 0, RowRef("", 1)) for row in rows]
    return to_device(collate(examples, share=True), "cpu").segments


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", [k for k in sorted(KERNELS) if k != "reference"])
def test_fast_attention_equals_its_definition_forward_and_backward(
    name: str, softcap: float | None, window: int | None, shared: int
) -> None:
    torch.manual_seed(0)
    segments = stream([1 + shared, 5 + shared, 13 + shared, 4 + shared], shared)
    assert len(segments.parents) == 5 if shared else 4
    total = segments.offsets[-1]
    shapes = [(1, 6, total, 8), (1, 2, total, 8), (1, 2, total, 8)]
    inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
    weight = torch.randn(1, total, 6, 8, dtype=torch.float64)
    results = []
    for kernel in (KERNELS["reference"], KERNELS[name]):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = kernel(*leaves, segments, 0.3, sliding_window=window, softcap=softcap)
        (out * weight).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for expected, actual in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert distance(actual, expected) < 1e-6  # scores are softmaxed in fp32 by definition


@pytest.mark.parametrize("width", [8, kernels.VARLEN_WIDEST + 8])
def test_flash_attention_is_used_if_available(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        called.append(1)
        return flash_attn_varlen_func(*args, **kwargs)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=counted))
    monkeypatch.setattr(kernels, "serves", lambda *_: True)
    segments = stream([5, 9], 0)
    inputs = [torch.randn(1, heads, 14, width) for heads in (6, 2, 2)]
    out = KERNELS["auto"](*inputs, segments, 0.3)
    assert distance(out, KERNELS["reference"](*inputs, segments, 0.3)) < 1e-6
    assert bool(called) == (width <= kernels.VARLEN_WIDEST)
    monkeypatch.undo()
    assert not kernels.serves(torch.device("cpu"), torch.bfloat16)
