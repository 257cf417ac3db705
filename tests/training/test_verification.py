"""The run-time verification of the compiled layers: it accepts what rounding explains and refuses a 5 % fault.

One fault per output of every kernel, in fp32 and in bf16, where transformers' own layers are already off by 1 to 2 %.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.compiled import Unsuitable, compiled_model
from luthier.config import TrainConfig
from luthier.errors import ConfigError
from luthier.kernels import dropout, native
from luthier.kernels.native.signatures import SIGNATURES
from luthier.lora.layers import share_dropout_state
from luthier.models.directory import read_config
from luthier.models.quantization import Quantisation
from luthier.models.quantized_loader import QuantisedOptions, load_quantised
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training import loop
from luthier.training.forward import verify_compiled
from luthier.types import Example
from tests.conftest import make_model
from tests.helpers.rows import examples, with_adapter

pytestmark = pytest.mark.skipif(
    native.why_unavailable(torch.float32) is not None,
    reason=f"no compiled kernels: {native.why_unavailable(torch.float32)}",
)
DTYPES = [torch.float32, torch.bfloat16]
FAULT = 1.05
# what each kernel computes for a layer or for the loss; dropout is not among the compiled layers' kernels
OUTPUTS = {
    "norm_forward": ("out", "saved", "rstd"),
    "norm_backward": ("out", "grad_a"),
    "swiglu_forward": ("out", "saved"),
    "swiglu_backward": ("out", "grad_a"),
    "lora_forward": ("saved",),
    "lora_backward": ("out", "grad_a"),
    "lora_grad_b": ("grad_b",),
    "rotate": ("x",),
    "attend_forward": ("out",),
    "attend_backward": ("dq", "dk", "dv"),
    "cross_entropy": ("logits", "losses"),
}
QUANTISED = {"four_bits": ("out",), "eight_bits": ("out",)}


def test_the_table_names_every_kernel() -> None:
    assert {*OUTPUTS, *QUANTISED, "dropout"} == set(SIGNATURES)


@contextmanager
def faulty(kernel: str, output: str, dtype: torch.dtype) -> Iterator[None]:
    """Within the block one output of a kernel is 5 % too large."""
    kernels = native.kernels(dtype)
    sound = getattr(kernels, kernel)
    place = [p.name for p in native.parameters(SIGNATURES[kernel])].index(output)

    def call(*arguments: native.Argument) -> None:
        sound(*arguments)
        if (tensor := arguments[place]) is not None:
            assert isinstance(tensor, torch.Tensor)
            tensor.mul_(FAULT)

    setattr(kernels, kernel, call)
    try:
        yield
    finally:
        setattr(kernels, kernel, sound)


def verify(model: Any, rows: list[Example], p: float = 0.1) -> None:
    layers = with_adapter(model.train(), lora_dropout=p)
    with compiled_model(model, layers, share_dropout_state(layers), False) as compiled:
        verify_compiled(compiled, model, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "glm"])
def test_sound_kernels_are_accepted(arch: str, dtype: torch.dtype, tokenizer: Tokenizer) -> None:
    for seed in range(3):
        verify(make_model(arch, seed).to(dtype), examples(tokenizer, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "output"), [(k, o) for k, outputs in OUTPUTS.items() for o in outputs])
def test_a_fault_of_five_percent_is_refused(kernel: str, output: str, dtype: torch.dtype, tokenizer: Tokenizer) -> None:
    model, rows = make_model("llama").to(dtype), examples(tokenizer, 2)
    with faulty(kernel, output, dtype), pytest.raises(Unsuitable, match=r"relative error of .* \(rounding explains"):
        verify(model, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "how"), [("four_bits", Quantisation("nf4")), ("eight_bits", Quantisation("int8"))])
def test_a_fault_of_five_percent_in_a_quantised_weight_is_refused(
    kernel: str, how: Quantisation, dtype: torch.dtype, model_dir: Callable[[str], Path], tokenizer: Tokenizer
) -> None:
    path, rows = model_dir("qwen2"), examples(tokenizer, 2)
    model = load_quantised(
        path, dtype, torch.device("cpu"), read_config(path), QuantisedOptions(how, dtype, cache=False)
    )
    verify(model, rows)
    model = load_quantised(
        path, dtype, torch.device("cpu"), read_config(path), QuantisedOptions(how, dtype, cache=False)
    )
    with faulty(kernel, "out", dtype), pytest.raises(Unsuitable, match="relative error"):
        verify(model, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_faulty_dropout_kernel_is_replaced_by_the_definition(dtype: torch.dtype) -> None:
    x = torch.randn(16, 32).to(dtype)
    expected = torch.where(dropout.keep(3, 16, 32, 0.4), x / 0.6, torch.zeros((), dtype=dtype))
    dropout._kernel.cache_clear()
    try:
        with faulty("dropout", "out", dtype):
            out = dropout.dropout(x, 0.4, 3)
    finally:
        dropout._kernel.cache_clear()
    assert torch.allclose(out.float(), expected.float(), rtol=0.01)


def test_the_fault_of_one_layer_is_refused(tokenizer: Tokenizer) -> None:
    """Every layer is verified, not the first ones: here only the last one's weight differs from the model's."""
    model, rows = make_model("llama", num_hidden_layers=4), examples(tokenizer, 2)
    layers = with_adapter(model.train())
    with compiled_model(model, layers, share_dropout_state(layers), False) as compiled:
        verify_compiled(compiled, model, rows)
        compiled.layers[3].norm2 = compiled.layers[3].norm2 * FAULT
        with pytest.raises(Unsuitable, match="layer 3"):
            verify_compiled(compiled, model, rows)


def test_verification_leaves_the_adapter_unchanged(tokenizer: Tokenizer) -> None:
    model = make_model("llama")
    layers = with_adapter(model.train())
    before = {n: (layer.lora_A.clone(), layer.lora_B.clone()) for n, layer in layers.items()}
    with compiled_model(model, layers, share_dropout_state(layers), False) as compiled:
        verify_compiled(compiled, model, examples(tokenizer, 2))
    for name, (a, b) in before.items():
        assert torch.equal(layers[name].lora_A, a) and torch.equal(layers[name].lora_B, b)
    assert all("forward" not in vars(m) for m in model.modules())


def test_training_continues_without_refused_kernels(tokenizer: Tokenizer) -> None:
    rows, config = examples(tokenizer, 7), {"gradient_checkpointing": False, "max_steps": 2}
    expected_message = r"relative error of 0\.0.* \(rounding explains .*luthier doctor"
    with faulty("swiglu_forward", "out", torch.float32):
        model, messages = make_model("llama"), list[str]()
        session = loop.Session(log=messages.append)
        losses = loop.train(model, with_adapter(model), rows, TrainConfig(**config), session).losses
        assert len(messages) == 1 and re.search(expected_message, messages[0]) and "training is slower" in messages[0]
        model = make_model("llama")
        with pytest.raises(ConfigError, match=r"train\.fused: on this machine .* relative error"):
            loop.train(model, with_adapter(model), rows, TrainConfig(**config, fused=True))
    model = make_model("llama")
    expected = loop.train(model, with_adapter(model), rows, TrainConfig(**config, fused=False)).losses
    assert np.array_equal(losses, expected)


def test_a_chosen_attention_kernel_is_reported_as_the_reason_why_compiled_layers_are_not_used(
    tokenizer: Tokenizer,
) -> None:
    config: dict[str, Any] = {"gradient_checkpointing": False, "max_steps": 1}
    rows, model, messages = examples(tokenizer, 7), make_model("llama"), list[str]()
    session = loop.Session(attention="looped", log=messages.append)
    loop.train(model, with_adapter(model), rows, TrainConfig(**config, fused="auto"), session)
    assert any("not used (model.attn_implementation is looped)" in line for line in messages), messages
    model = make_model("llama")
    with pytest.raises(ConfigError, match="model.attn_implementation is looped"):
        loop.train(model, with_adapter(model), rows, TrainConfig(**config, fused=True), session)
