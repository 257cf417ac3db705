"""Law "optimised": every optimisation by itself, and all together, train like the reference.

The plain side: one row per segment, no shared prefix, the reference attention, transformers' own layers and autograd.
First-step loss within 1e-6 relative, gradients within 5e-5 (norm of the difference over norm, per tensor, from a random
non-zero adapter), losses of 20 steps within 1e-4.

The law can fail: it detects a shared prefix whose gradients are not summed, and the dropout mask of another step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier import personas
from luthier.batching.collate import collate, to_device
from luthier.compiled import Unsuitable, compiled_model, unsuitable
from luthier.config import LoraConfig, TrainConfig
from luthier.errors import ConfigError
from luthier.kernels import dropout, native
from luthier.kernels.dropout import DropoutState
from luthier.lora.layers import attach, resolve, share_dropout_state
from luthier.models.loader import load_weights
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training import loop, memory_model
from luthier.training.forward import loss_sum, segment_attention
from luthier.types import Batch, Example
from luthier.verbs.check import inspect
from tests.conftest import ARCHITECTURES, make_model
from tests.helpers.rows import distance, examples, fails, gradients, with_adapter, worst

COMPILED = ["llama", "qwen2", "phi3", "glm"]
Result = tuple[float, dict[str, torch.Tensor]]

needs_compiler = pytest.mark.skipif(
    native.why_unavailable(torch.float32) is not None,
    reason=f"no compiled kernels: {native.why_unavailable(torch.float32)}",
)


def measured(model: Any, layers: dict[str, Any], batch: Batch, kernel: str | None, recompute: bool = False) -> Result:
    """Compute loss and gradients of one batch by transformers' layers with ``kernel``; None: compiled layers."""
    on_device = to_device(batch, "cpu")
    if kernel is None:
        with compiled_model(model, layers, next(iter(layers.values())).dropout_state, recompute) as compiled_layers:
            loss = compiled_layers.loss_sum(on_device)
            loss.backward()
    else:
        with segment_attention(model, kernel):
            loss = loss_sum(model, on_device)
            loss.backward()
    return float(loss.detach()), gradients(layers)


def plain(arch: str, rows: list[Example], share: bool = False, **lora: Any) -> Result:
    """Compute the definition. share: on a stream with a shared prefix, so that dropout masks equal the other side's."""
    model = make_model(arch).train()
    layers = with_adapter(model, **lora)
    set_dropout(layers)
    return measured(model, layers, collate(rows, share), "reference")


def compiled(arch: str, rows: list[Example], share: bool, recompute: bool, step: int = 3, **lora: Any) -> Result:
    model = make_model(arch).train()
    layers = with_adapter(model, **lora)
    set_dropout(layers, step)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    result = measured(model, layers, collate(rows, share), None, recompute)
    assert all(torch.equal(weights[n], p) and p.is_contiguous() for n, p in model.named_parameters())
    return result


def set_dropout(layers: dict[str, Any], step: int = 3) -> None:
    state = share_dropout_state(layers)
    state.seed, state.step = 7, step


def equal(result: Result, expected: Result) -> None:
    assert result[0] == pytest.approx(expected[0], rel=1e-6)
    assert worst(result[1], expected[1]) < 5e-5


@needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("arch", COMPILED)
def test_compiled_layers_equal_the_definition(arch: str, share: bool, recompute: bool, tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 8)
    equal(compiled(arch, rows, share, recompute), plain(arch, rows))
    dropped = plain(arch, rows, share, lora_dropout=0.3)
    equal(compiled(arch, rows, share, recompute, lora_dropout=0.3), dropped)


@needs_compiler
def test_the_law_detects_another_steps_mask(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 4)
    expected = plain("llama", rows, lora_dropout=0.3)
    assert fails(lambda: equal(compiled("llama", rows, False, False, step=4, lora_dropout=0.3), expected))


@needs_compiler
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("o_proj", "up_proj"), ("k_proj",)])
def test_compiled_layers_equal_the_definition_on_some_modules(targets: tuple[str, ...], tokenizer: Tokenizer) -> None:
    rows, results = examples(tokenizer, 4), []
    for kernel in ("reference", None):
        model = make_model("llama").train()
        layers = attach(model, LoraConfig(r=3, use_rslora=True), resolve(model, targets), 1)
        torch.manual_seed(1)
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_B, 0, 0.1)
        results.append(measured(model, layers, collate(rows, kernel is None), kernel))
    equal(results[1], results[0])


@needs_compiler
def test_memory_grows_from_a_small_batch_to_a_large_one(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 8)
    for recompute in (False, True):
        model = make_model("llama").train()
        layers = with_adapter(model)
        with compiled_model(model, layers, DropoutState(), recompute) as compiled_layers:
            for part in (rows[:2], rows):
                for layer in layers.values():
                    layer.lora_A.grad = layer.lora_B.grad = None
                loss = compiled_layers.loss_sum(to_device(collate(part), "cpu"))
                loss.backward()
        equal((float(loss.detach()), gradients(layers)), plain("llama", rows))


@needs_compiler
@pytest.mark.parametrize(("r", "heads"), [(400, 4), (4, 72)])
def test_large_ranks_and_many_heads_over_one_key(r: int, heads: int, tokenizer: Tokenizer) -> None:
    """Scratch memory has no fixed size: ranks of 1200 on one input, 72 query heads per key head."""
    rows, results = examples(tokenizer, 3), []
    sizes = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": 1}
    for kernel in ("reference", None):
        model = make_model("llama", **sizes).train()
        results.append(measured(model, with_adapter(model, r=r), collate(rows), kernel))
    equal(results[1], results[0])


@needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_memory_equals_the_estimate(recompute: bool, tokenizer: Tokenizer) -> None:
    model = make_model("llama").train()
    layers = with_adapter(model)
    batch = to_device(collate(examples(tokenizer, 8)), "cpu")
    with compiled_model(model, layers, DropoutState(), recompute) as compiled_layers:
        compiled_layers.loss_sum(batch).backward()
        held = compiled_layers.bytes_held()
    tokens, targets = batch.input_ids.shape[1], len(batch.target_ids)
    counted = memory_model.compiled_activations(model, tokens, recompute, 4) + memory_model.compiled_logits(
        model.config.vocab_size, targets, 4
    )
    assert counted == pytest.approx(held, rel=0.25)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
@pytest.mark.parametrize("kernel", ["padded", "looped", "reference"])
def test_a_shared_prefix_changes_nothing(arch: str, kernel: str, tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 8)
    model = make_model(arch).train()
    layers = with_adapter(model)
    batch = collate(rows, share=True)
    assert len(batch.input_ids) < len(collate(rows).input_ids) - 50
    equal(measured(model, layers, batch, kernel), plain(arch, rows))


def test_the_law_detects_a_prefix_whose_gradients_are_not_summed(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 8)
    expected = plain("llama", rows)
    model = make_model("llama").train()
    layers = with_adapter(model)
    batch = collate(rows, share=True)
    inner = max(batch.parents) + 1

    def cut(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        first = batch.offsets[inner]
        return torch.cat([output[:, :first].detach(), output[:, first:]], 1)

    for name in ("k_proj", "v_proj"):
        model.model.layers[1].self_attn.get_submodule(name).register_forward_hook(cut)
    broken = measured(model, layers, batch, "reference")
    assert fails(lambda: equal(broken, expected))


SWITCHES = [
    {"micro_batch_tokens": 150},
    {"shared_prefix": True},
    {"fused": "auto"},
    {"gradient_checkpointing": True},
    {"micro_batch_tokens": 150, "shared_prefix": True, "fused": "auto"},
    {"micro_batch_tokens": 2048, "shared_prefix": True, "fused": "auto", "gradient_checkpointing": True},
]
OFF: dict[str, Any] = {
    "micro_batch_tokens": 0,
    "shared_prefix": False,
    "fused": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "learning_rate": 3e-3,
    "max_steps": 20,
}


def twenty_losses(rows: Sequence[Example], **switches: Any) -> list[float]:
    model = make_model("llama")
    layers = with_adapter(model)
    return loop.train(model, layers, rows, TrainConfig(**{**OFF, **switches})).losses


def test_twenty_steps_with_each_optimisation_and_with_all(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 7)
    expected = twenty_losses(rows)
    for switches in SWITCHES:
        losses = twenty_losses(rows, **switches)
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4, switches


@needs_compiler
def test_bf16_gradients_are_as_close_to_fp32_as_the_plain_ones(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 8)
    truth = plain("llama", rows)
    gaps = []
    for kernel in ("reference", None):
        model = make_model("llama").to(torch.bfloat16).train()
        loss, gradients = measured(model, with_adapter(model), collate(rows), kernel)
        gaps.append(np.mean([distance(gradients[n], truth[1][n]) for n in truth[1]]))
        assert loss == pytest.approx(truth[0], rel=5e-3)
    assert gaps[1] < 1.2 * gaps[0]


def within_the_band(run: Callable[..., list[float]]) -> None:
    """Check that the optimisations change losses less than the choice among three seeds does.

    run(seed, optimised) -> losses, always of the same rows in the same order; the seed is that of the adapter only.
    """
    plain_runs = np.array([run(seed, False) for seed in (0, 1, 2)])
    optimised_runs = np.array([run(seed, True) for seed in (0, 1, 2)])
    spread, differences = np.ptp(plain_runs, axis=0), np.abs(optimised_runs - plain_runs)
    print(
        f"spread of three seeds {spread.round(4).tolist()}, "
        f"differences from the plain run {differences.max(0).round(4).tolist()}"
    )
    assert (differences.mean(1) < spread.mean()).all()


@needs_compiler
def test_twenty_steps_in_bf16_stay_within_the_noise_of_three_seeds(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 7)

    def run(seed: int, optimised: bool) -> list[float]:
        model = make_model("llama").to(torch.bfloat16)
        layers = with_adapter(model, seed)
        return loop.train(model, layers, rows, TrainConfig(**{**OFF, **(SWITCHES[-2] if optimised else {})})).losses

    within_the_band(run)


@needs_compiler
@pytest.mark.slow
@pytest.mark.smollm2
def test_twenty_steps_of_smollm2_in_bf16_stay_within_the_noise_of_three_seeds(smollm2: Path, tmp_path: Path) -> None:
    rows = list(inspect(personas.config(smollm2, tmp_path)).rows.train[:60])

    def run(seed: int, optimised: bool) -> list[float]:
        model = load_weights(smollm2, torch.bfloat16)
        layers = attach(model, LoraConfig(), resolve(model, None), seed)
        return loop.train(model, layers, rows, TrainConfig(**{**OFF, **(SWITCHES[-2] if optimised else {})})).losses

    within_the_band(run)


# --- the parts --------------------------------------------------------------------------------------------------------


def test_every_implementation_makes_the_defined_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 48)
    for p, key in ((0.1, 5), (0.5, 2**31 + 9), (0.9, 2**32 - 1)):
        expected = torch.where(dropout.keep(key, 37, 48, p), x / (1 - p), torch.zeros(()))
        assert torch.allclose(dropout.dropout(x, p, key), expected)
        monkeypatch.setattr(dropout, "_kernel", lambda _: None)  # without a compiler, of a transposed tensor too
        assert torch.allclose(dropout.dropout(x.T.contiguous().T, p, key), expected)
        monkeypatch.undo()
    big = dropout.keep(DropoutState(1, 2, 3).key(4), 1000, 1000, 0.1).float()
    assert abs(float(big.mean()) - 0.9) < 0.002
    assert float(big.mean(0).std()) < 0.012 and float(big.mean(1).std()) < 0.012  # binomial: 0.0095
    keys = {DropoutState(s, t, m).key(g) for s, t, m, g in itertools.product(range(6), repeat=4)}
    assert len(keys) == 6**4


def test_the_reason_why_a_model_is_not_supported_is_reported(tokenizer: Tokenizer) -> None:
    model = make_model("gemma2")
    layers = with_adapter(model)
    assert "not Gemma2DecoderLayer" in str(unsuitable(model, layers))
    messages: list[str] = []
    config = TrainConfig(max_steps=1)
    loop.train(model, layers, examples(tokenizer, 2), config, loop.Session(log=messages.append))
    assert len(messages) == 1 and "training is slower" in messages[0]
    with pytest.raises(ConfigError, match=r"train\.fused: they support the layers of"):
        loop.train(model, layers, examples(tokenizer, 2), config.model_copy(update={"fused": True}))


def test_training_continues_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in str(native.why_unavailable(torch.float32))
    model = make_model("llama")
    layers = with_adapter(model)
    with pytest.raises(Unsuitable, match="no C\\+\\+ compiler"):
        compiled_model(model, layers, DropoutState(), False).__enter__()
    messages: list[str] = []
    loop.train(model, layers, examples(tokenizer, 2), TrainConfig(max_steps=1), loop.Session(log=messages.append))
    assert len(messages) == 1 and "g++" in messages[0]


@needs_compiler
def test_the_first_compilation_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make_model("llama")
    messages: list[str] = []
    loop.train(
        model,
        with_adapter(model),
        examples(tokenizer, 2),
        TrainConfig(max_steps=1),
        loop.Session(log=messages.append),
    )
    assert messages == ["compiling the training step for this processor, once (about 10 s)"]
