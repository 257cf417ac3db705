"""The verification before the first step: it runs one layer of each kind, and still detects what it is there for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from luthier.errors import ModelError
from luthier.kernels.attention import KERNELS, _adapter
from luthier.models.native_model import first_layers
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.serving.engine import Engine
from luthier.serving.general import verify_batching
from luthier.training.forward import announced, verify_segments
from tests.conftest import make_model
from tests.helpers.rows import examples
from tests.models.test_experts import EXPERTS, SIZE

LATE = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Yield the numbers of the layers that run within the block, in order."""
    ran: list[int] = []
    layers = list(model.get_decoder().layers)
    hooks = [m.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(layers)]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()
        assert list(model.get_decoder().layers) == layers


def experts_after_three_layers() -> Any:
    sizes = {**SIZE, **EXPERTS["deepseek_v2"][0], "first_k_dense_replace": 3, "num_hidden_layers": 6}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v2", **sizes)).eval()


@pytest.mark.parametrize(
    ("model", "depth"),
    [
        (lambda: make_model("llama", num_hidden_layers=6), 1),
        (lambda: make_model("phi3", num_hidden_layers=6), 1),
        (lambda: make_model("gemma2", num_hidden_layers=6), 2),
        (lambda: make_model("gemma2", num_hidden_layers=6, layer_types=LATE), 4),
        (experts_after_three_layers, 4),
    ],
    ids=["llama", "phi3", "gemma2", "late", "experts"],
)
def test_one_layer_of_each_kind_is_run(model: Any, depth: int, tokenizer: Tokenizer) -> None:
    verified = model()
    with counted(verified) as ran:
        verify_segments(verified, examples(tokenizer))
    assert ran == [*range(depth)] * 3
    if depth != 4:
        with counted(verified) as ran:
            verify_batching(Engine(verified).decoding)
        assert set(ran) == set(range(depth))


@contextmanager
def broken(fault: Any, kind: str) -> Iterator[None]:
    """Within the block, luthier's attention has a fault in the layers of one kind."""
    sound = _adapter(KERNELS["auto"])

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if module.config.layer_types[module.layer_idx] == kind:
            query, key, options = fault(query, key, options)
        return sound(module, query, key, value, mask, **options)

    AttentionInterface.register("luthier_auto", forward)
    try:
        yield
    finally:
        AttentionInterface.register("luthier_auto", sound)


FAULTS: dict[str, Any] = {
    "positions": lambda query, key, options: (query, key.roll(1, 2), options),
    "scale": lambda query, key, options: (query * 2, key, options),
    "window": lambda query, key, options: (query, key, {**options, "sliding_window": 3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_in_one_kind_of_layer_is_detected(
    fault: str, kind: str, dtype: torch.dtype, tokenizer: Tokenizer
) -> None:
    model, rows = make_model("gemma2", num_hidden_layers=6, layer_types=LATE).to(dtype), examples(tokenizer)
    verify_segments(model, rows)
    with counted(model), broken(FAULTS[fault], kind), pytest.raises(ModelError, match="cannot be trained yet"):
        verify_segments(model, rows)


def test_a_later_kind_of_layer_that_carries_state_is_detected(tokenizer: Tokenizer) -> None:
    kinds = ["full_attention"] * 3 + ["conv", "full_attention"]
    sizes = {**{k: v for k, v in SIZE.items() if k != "num_experts_per_tok"}, "num_hidden_layers": 5}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", layer_types=kinds, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.1)
    with counted(model) as ran, pytest.raises(ModelError, match="carry state from one row"):
        verify_segments(model, examples(tokenizer))
    assert max(ran) == 3


class _Needy(nn.Module):
    """A decoder layer that works only below the last layer of its model."""

    def __init__(self, base: nn.Module, layers: nn.ModuleList) -> None:
        super().__init__()
        self.base, self.others = base, [layers]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if len(self.others[0]) != len(self.model.layers):  # type: ignore[arg-type]
            raise IndexError("the last layer is missing")
        return self.base(*inputs, **options)


def test_a_model_that_needs_all_its_layers_runs_them(tokenizer: Tokenizer) -> None:
    model = make_model("llama", num_hidden_layers=3)
    whole = model.model.layers
    first = _Needy(whole[0], whole)
    vars(first)["model"] = model.model  # not a submodule
    whole[0] = first
    with counted(model) as ran:
        verify_segments(model, examples(tokenizer))
    assert ran == [0, 0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_models_without_a_list_of_layers_are_left_whole() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=64, n_head=4, n_layer=2, vocab_size=640)
    with first_layers(AutoModelForCausalLM.from_config(config)) as depth:
        assert depth == 2


def test_a_long_verification_is_announced() -> None:
    lines: list[str] = []
    with announced(lines.append, "verifying", seconds=0.01):
        time.sleep(0.2)
    assert lines == ["verifying"]
    with announced(lines.append, "again", seconds=0.5):
        pass
    time.sleep(0.6)
    assert lines == ["verifying"]


def test_the_verification_is_announced(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    from luthier.training import forward

    lines: list[str] = []

    class Immediate:
        """A timer that does not wait."""

        daemon = False

        def __init__(self, _: float, log: Any, arguments: list[str]) -> None:
            log(*arguments)

        def start(self) -> None: ...

        def cancel(self) -> None: ...

    monkeypatch.setattr(forward.threading, "Timer", Immediate)
    verify_segments(make_model("llama"), examples(tokenizer), log=lines.append)
    assert lines == ["verifying on two short rows that the model keeps the rows of a batch apart"]
