"""The output head reads contiguous inputs: in bfloat16, torch copies its weight once per row of any other input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.models import loader
from luthier.models.directory import read_config
from luthier.models.loader import load_weights
from luthier.models.quantization import Quantisation
from luthier.models.quantized_loader import QuantisedOptions, load_quantised
from luthier.serving import head as serving

BF16 = torch.bfloat16


def whole(path: Path) -> Any:
    return load_weights(path, BF16)


def quantised(path: Path) -> Any:
    options = QuantisedOptions(Quantisation("nf4"), BF16, cache=False)
    return load_quantised(path, BF16, torch.device("cpu"), read_config(path), options)


def quantised_in_fp32(path: Path) -> Any:
    options = QuantisedOptions(Quantisation("nf4"), torch.float32, cache=False)
    return load_quantised(path, torch.float32, torch.device("cpu"), read_config(path), options)


def by_transformers(path: Path) -> Any:
    return loader._load_with_transformers(path, read_config(path), BF16, [])


@pytest.mark.parametrize("load", [whole, quantised, quantised_in_fp32, by_transformers])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # without and with tied embeddings
def test_the_last_tokens_of_several_prompts_are_copied(
    load: Callable[[Path], Any], arch: str, model_dir: Callable[[str], Path]
) -> None:
    model = load(model_dir(arch))
    contiguous: list[bool] = []
    decoder = model.get_decoder()
    decoder.register_forward_hook(lambda _m, _i, out: contiguous.append(out[0][:, -1:].is_contiguous()))
    model.get_output_embeddings().register_forward_hook(
        lambda _m, inputs, _o: contiguous.append(inputs[0].is_contiguous())
    )
    with torch.no_grad():
        model(torch.arange(24).view(3, 8), logits_to_keep=1)
    assert contiguous == [False, True]


def test_the_sliced_head_copies_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base = nn.Linear(16, 2 * serving.SLICE, bias=False)
    x = torch.randn(3, 8, 16)[:, -1:]
    expected = base(x)
    contiguous: list[bool] = []
    linear = torch.nn.functional.linear

    def recorded(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        contiguous.append(x.is_contiguous())
        return linear(x, *rest)

    monkeypatch.setattr(serving.F, "linear", recorded)
    torch.testing.assert_close(serving.SlicedHead(base)(x), expected)
    assert contiguous == [True, True]
