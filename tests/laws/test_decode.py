"""Law "decode": reading a text one token at a time gives the logits of one forward pass over the whole text.

The forward pass is that of transformers' own layers. In fp32 the logits of the compiled layers differ from it by less
than 1e-5 (norm of the difference over norm), in bf16 by what rounding explains. Among themselves they are the same
bits, for a text read alone or together with 15 others, in one call or in several, with its start in the cache or not.

The law can fail: it detects keys of another sequence's page, and an adapter that is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.compiled import Unsuitable
from luthier.compiled.decoder import CompiledDecoder, NewTokens
from luthier.compiled.pages import Pages, Row
from luthier.inference.decoding import CompiledDecoding, Reading, verified_decoding
from luthier.models.directory import read_config
from luthier.models.loader import load_weights
from luthier.models.quantization import Quantisation
from luthier.models.quantized_loader import QuantisedOptions, load_quantised
from tests.conftest import make_model
from tests.helpers.rows import fails, with_adapter
from tests.laws.test_compiled import COMPILED, needs_compiler
from tests.laws.test_quantised import KINDS
from tests.serving.test_serve_engine import prompt

BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.03}
LENGTHS = (75, 3, 41, 64, 32, 33, 1, 90, 17, 60, 2, 29, 31, 65, 7, 50)  # pages end at 32, 64, ...
pytestmark = needs_compiler


def opened(arch: str, dtype: torch.dtype, how: Quantisation | None, path: Path, **sizes: int) -> Any:
    make_model(arch, **{"intermediate_size": 128, **sizes}).save_pretrained(path)
    if how is None:
        return load_weights(path, dtype).eval()
    options = QuantisedOptions(how, dtype, cache=False)
    return load_quantised(path, dtype, torch.device("cpu"), read_config(path), options).eval()


def reference(model: Any, ids: Sequence[int]) -> Tensor:
    """Compute with autograd, so that quantised layers dequantise their weights whatever the number of tokens."""
    logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.detach().float()


def close(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return float((logits - expected).norm() / expected.norm()) < BOUND[dtype]


def whole(decoder: CompiledDecoder, ids: Sequence[int], adapter: int | None = None) -> Tensor:
    return decoder.logits(decoder.pages(1 << 24), [NewTokens(Row(), ids, adapter)], every=True)


def token_by_token(decoder: CompiledDecoder, pages: Pages, lengths: Sequence[int], adapter: int | None) -> list[Tensor]:
    """Decode the prompts of these lengths together, one token each per call; a row leaves at its end."""
    rows, logits = [Row() for _ in lengths], [[] for _ in lengths]  # type: ignore[var-annotated]
    for at in range(max(lengths)):
        running = [i for i, n in enumerate(lengths) if at < n]
        new = [NewTokens(rows[i], [prompt(lengths[i])[at]], adapter) for i in running]
        for i, one in zip(running, decoder.logits(pages, new), strict=True):
            logits[i].append(one)
    return [torch.stack(parts) for parts in logits]


def law(model: Any, dtype: torch.dtype, adapters: Sequence[Any] = (), adapter: int | None = None) -> None:
    decoder = CompiledDecoder(model, adapters)
    pages = decoder.pages(1 << 24)
    for length, beside in zip(LENGTHS, token_by_token(decoder, pages, LENGTHS, adapter), strict=True):
        at_once = whole(decoder, prompt(length), adapter)
        assert close(at_once, reference(model, prompt(length)), dtype)
        assert torch.equal(beside, at_once)
    (alone,) = token_by_token(decoder, pages, LENGTHS[:1], adapter)
    assert torch.equal(alone, whole(decoder, prompt(LENGTHS[0]), adapter))


@pytest.mark.parametrize("how", [None, *KINDS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", COMPILED)
def test_decoding_equals_one_forward_pass(
    arch: str, dtype: torch.dtype, how: Quantisation | None, tmp_path: Path
) -> None:
    model = opened(arch, dtype, how, tmp_path)
    law(model, dtype)
    layers = with_adapter(model)
    law(model, dtype, [layers], 0)


@pytest.mark.parametrize("how", [None, Quantisation("nf4"), Quantisation("int8")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_that_are_not_multiples_of_a_block(dtype: torch.dtype, how: Quantisation | None, tmp_path: Path) -> None:
    """Inputs in two parts of 1024, a last half vector of bf16, a number of outputs that is odd."""
    four_bit = how is not None and how.kind == "nf4"
    sizes = {"hidden_size": 128 if four_bit else 80, "intermediate_size": 1088 if four_bit else 1040}
    model = opened("llama", dtype, how, tmp_path, vocab_size=645, **sizes)
    law(model, dtype, [with_adapter(model)], 0)


@pytest.mark.parametrize("arch", COMPILED)
def test_a_cached_prefix_changes_no_bit(arch: str) -> None:
    """Neither do the parts in which a prompt is read, nor the sequences beside it."""
    model = make_model(arch)
    start = prompt(70)
    prompts = [[*start, *prompt(n)] for n in LENGTHS]
    without = CompiledDecoding(model, memory=1 << 24, prefix_bytes=0)
    expected = [alone(without, Reading(list(ids))) for ids in prompts]
    decoding = CompiledDecoding(model, memory=1 << 24)
    readings = [Reading(list(ids)) for ids in prompts]
    first = [decoding.join(reading) for reading in readings]
    assert all(r.reused >= 70 for r in readings[1:]) and readings[0].reused == 0
    for logits, (one, _) in zip(first, expected, strict=True):
        assert torch.equal(logits, one)
    for reading in readings:
        reading.ids.append(9)
    assert torch.equal(decoding.step(), torch.cat([two for _, two in expected]))


def alone(decoding: CompiledDecoding, reading: Reading) -> tuple[Tensor, Tensor]:
    """The logits after the prompt, and after the token 9, of a sequence by itself."""
    first = decoding.join(reading)
    reading.ids.append(9)
    second = decoding.step()
    decoding.leave(reading)
    return first, second


def test_rows_of_one_call_can_use_different_adapters() -> None:
    expected = []
    for seed in (1, 2):
        model = make_model("llama")
        expected.append((model, with_adapter(model, seed=seed)))
    adapters = [layers for _, layers in expected]
    del adapters[1]["model.layers.0.mlp.up_proj"]  # adapters need not change the same layers
    base = make_model("llama")
    decoder = CompiledDecoder(base, adapters)
    pages = decoder.pages(1 << 24)
    new = [NewTokens(Row(), prompt(20), adapter) for adapter in (0, None, 1, 0)]
    first, without, second, again = decoder.logits(pages, new).split(1)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert close(first, reference(expected[0][0], prompt(20))[-1:], torch.float32)
    assert close(without, reference(base, prompt(20))[-1:], torch.float32)


def test_the_law_detects_a_page_of_another_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Pages.table
    monkeypatch.setattr(Pages, "table", lambda self, rows: table(self, rows).roll(1, 0))
    assert fails(lambda: law(make_model("llama"), torch.float32))


def test_the_law_detects_an_adapter_that_is_left_out() -> None:
    model = make_model("llama")
    layers = with_adapter(model)
    layers.popitem()
    assert fails(lambda: law(model, torch.float32, [layers], 0))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    decoder, threads = CompiledDecoder(make_model("glm")), torch.get_num_threads()
    expected = whole(decoder, prompt(75))
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole(decoder, prompt(75)), expected)
        torch.set_num_threads(3)
        assert torch.equal(whole(decoder, prompt(75)), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_model_whose_layers_compute_something_else_is_refused() -> None:
    model = make_model("llama")
    assert verified_decoding(model, memory=1 << 20)
    model.model.layers[0].mlp.register_forward_hook(lambda *args: args[2] * 1.1)
    with pytest.raises(Unsuitable, match="their logits differ from those of transformers' layers"):
        verified_decoding(model, memory=1 << 20)
