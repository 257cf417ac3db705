"""Law "rotary": with rotary factors that depend on a row's length (longrope), no row gets those of its neighbours.

transformers chooses the factors by the longest row of a call. The law can fail: it detects short rows that share a
micro-batch, a batch of prompts, or keys and values with longer ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from luthier.batching import plan
from luthier.config import TrainConfig
from luthier.errors import ModelError
from luthier.evaluation.scoring import held_out_loss
from luthier.inference import decoding, generation
from luthier.inference.generation import Generator
from luthier.inference.sampling import Sampling
from luthier.models.chat_format import load_chat_format
from luthier.models.directory import rotary_limit
from luthier.serving import general
from luthier.serving.engine import Engine
from luthier.serving.general import verify_batching
from luthier.training import forward, loop, memory_model
from luthier.training.forward import verify_segments
from luthier.types import Example, Message, RowRef
from tests.conftest import make_model
from tests.helpers.rows import fails, with_adapter
from tests.helpers.serving import generate
from tests.serving.test_serve_engine import ask, prompt, reference

LIMIT = 32
LENGTHS = (3, 41, 17, 60, 12, 29, 31, 32, 33)  # of prompts: many pass the limit while the reply is generated


def longrope(**sizes: Any) -> Any:
    scaling = {"type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [4.0] * 8}
    settings = {"original_max_position_embeddings": LIMIT, "max_position_embeddings": 128, "rope_scaling": scaling}
    return make_model("phi3", **{"sliding_window": None, **settings, **sizes})


def rows(lengths: tuple[int, ...] = (12, 50, 33, 20, 34, 64)) -> list[Example]:
    """Make rows that share their first tokens."""
    generator = np.random.default_rng(0)
    ids = [np.append(np.arange(3, 13), generator.integers(3, 640, n - 10)) for n in lengths]
    return [Example(i, np.arange(len(i)) > len(i) // 2, RowRef("rows", n + 1)) for n, i in enumerate(ids)]


def alone(model: Any, examples: list[Example]) -> torch.Tensor:
    """Return the mean loss of transformers' own model, one row at a time; the last token is only a target."""
    losses = []
    for e in examples:
        logits = model(input_ids=torch.from_numpy(e.ids[:-1])[None], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits, torch.from_numpy(e.ids[1:]), reduction="none")[e.trained[1:]])
    return torch.cat(losses).mean()


def law(settings: dict[str, Any]) -> None:
    """One step has the loss and the gradient norm of its rows alone."""
    model = longrope()
    layers = with_adapter(model)
    expected = alone(model, rows())
    expected.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    norm = float(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
    records: list[Any] = []
    model = longrope()
    config = TrainConfig(max_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=1, **settings)
    loop.train(model, with_adapter(model), rows(), config, loop.Session(on_step=records.append))
    assert records[0].loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert records[0].grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tokens", [0, 2048, 64])
def test_a_step_has_the_loss_and_the_gradient_of_its_rows_alone(tokens: int, share: bool, fused: Any) -> None:
    law({"micro_batch_tokens": tokens, "shared_prefix": share, "fused": fused})


def test_the_law_detects_rows_of_both_kinds_in_one_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "apart", lambda examples, _: [list(examples)])
    assert fails(lambda: law({"fused": False}))


def test_the_factors_matter_and_only_their_limit_counts() -> None:
    assert rotary_limit(longrope().config) == LIMIT
    assert rotary_limit(make_model("llama").config) is None
    assert rotary_limit(make_model("gemma2").config) is None
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert rotary_limit(make_model("llama", rope_parameters=dynamic).config) is None
    verify_segments(make_model("llama", rope_parameters=dynamic), rows())


@torch.no_grad()
def test_the_loss_on_held_out_rows_is_that_of_the_rows_alone() -> None:
    model = longrope()
    assert held_out_loss(model, rows()).loss == pytest.approx(float(alone(model, rows())), rel=1e-5)


def test_a_verified_model_cannot_mix_the_factors_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_segments(longrope(), rows())
    monkeypatch.setattr(forward, "rotary_limit", lambda _: None)
    with pytest.raises(ModelError, match="the rotation of a row depends on longer rows beside it"):
        verify_segments(longrope(), rows())


def test_the_estimate_counts_the_micro_batches_of_the_run() -> None:
    lengths = memory_model.RowLengths([12, 50, 33, 20, 34, 64], [4] * 6)
    config = TrainConfig(per_device_train_batch_size=6, gradient_accumulation_steps=1, shared_prefix=False)
    assert sorted(map(len, memory_model._heaviest(lengths, config, LIMIT))) == [34, 50, 64]


@pytest.fixture
def generator(model_dir: Callable[[str], Path]) -> Generator:
    model = longrope(original_max_position_embeddings=50)
    return Generator(model, load_chat_format(model_dir("llama")), compiled=False)


def test_batched_replies_equal_single_ones(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Hi", "Tell me about the lamp, the stairs and the boat of the lighthouse, please." * 2, "Who are you?"]
    prompts = [[Message("user", text)] for text in texts]
    lengths = [len(generator.chat_format.prompt_ids(p)) for p in prompts]
    assert min(lengths) + 20 < 50 < max(lengths)
    sampling = Sampling(max_new_tokens=20)
    expected = [generator.reply(p, sampling).text for p in prompts]
    assert [r.text for r in generator.replies(prompts, sampling)] == expected
    compiled = Generator(generator.model, generator.chat_format)
    assert [r.text for r in compiled.replies(prompts, sampling)] == expected
    monkeypatch.setattr(generation, "rotary_limit", lambda _: math.inf)
    assert [r.text for r in generator.replies(prompts, sampling)] != expected


@pytest.mark.parametrize("compiled", [True, False])
def test_served_replies_equal_those_of_single_prompts_on_both_sides_of_the_limit(compiled: bool) -> None:
    prompts = [prompt(n) for n in LENGTHS]
    expected = [reference(longrope(), p, 30, do_sample=False) for p in prompts]
    engine = Engine(longrope(), compiled=compiled)
    verify_batching(engine.decoding)
    assert generate(engine, [ask(p, 30) for p in prompts]) == expected
    assert generate(engine, [ask(p, 30) for p in prompts]) == expected  # now with cached prefixes
    assert engine.counts.reused_tokens > 0
    longer = [p + e for p, e in zip(prompts, expected, strict=True)]  # each continues its conversation
    assert generate(engine, [ask(p, 9) for p in longer]) == [
        reference(longrope(), p, 9, do_sample=False) for p in longer
    ]


def test_the_law_detects_decoding_with_the_factors_of_the_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general, "rotate_by_row", lambda _: None)
    assert fails(lambda: test_served_replies_equal_those_of_single_prompts_on_both_sides_of_the_limit(False))
    monkeypatch.setattr(decoding, "rotary_limit", lambda _: None)
    assert fails(lambda: test_served_replies_equal_those_of_single_prompts_on_both_sides_of_the_limit(True))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_long_prompt_is_read_in_parts_with_one_kind_of_factors(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general, "CHUNK", 16)
    monkeypatch.setattr(decoding, "_CHUNK", 16)
    expected = reference(longrope(), prompt(60), 30, do_sample=False)
    assert generate(Engine(longrope(), compiled=compiled), [ask(prompt(60), 30)]) == [expected]
