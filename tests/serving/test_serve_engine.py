"""The batching engine: together as alone, whatever runs beside it, joins it or leaves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.config import LoraConfig
from luthier.errors import ModelError
from luthier.inference.generation import Generator, Sampling
from luthier.lora.layers import attach, detach, resolve
from luthier.models.chat_format import load_chat_format
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.serving.adapters import install
from luthier.serving.cache import Prefixes, Rows
from luthier.serving.engine import Engine, QueueFull, Request, Token, prove
from luthier.serving.text import ReplyText
from luthier.types import Message
from tests.conftest import ARCHITECTURES, make_model
from tests.helpers.serving import generate

LENGTHS = (3, 41, 17, 60, 2, 29)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(5, 640, (length,), generator=generator).tolist()


def alone(model: Any, ids: list[int], tokens: int, **kwargs: Any) -> list[int]:
    """transformers' own generate, one prompt."""
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, pad_token_id=0, eos_token_id=[], **kwargs
    )
    return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def ask(ids: list[int], tokens: int = 30, adapter: str | None = None, **sampling: Any) -> Request:
    return Request(ids, [], Sampling(max_new_tokens=tokens, **sampling), adapter)


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_together_every_reply_is_the_one_it_would_be_alone(arch: str) -> None:
    prompts = [prompt(n) for n in LENGTHS]
    expected = [alone(make_model(arch), p, 40, do_sample=False) for p in prompts]
    engine = Engine(make_model(arch))
    prove(engine)
    assert generate(engine, [ask(p, 40) for p in prompts]) == expected
    assert engine.counts.steps == 39  # one step a token, however many rows
    assert engine.running == engine.waiting == 0


def adapted(model: nn.Module, seed: int) -> dict[str, Any]:
    """An adapter that changes something."""
    layers = attach(model, LoraConfig(r=4 + seed, lora_alpha=16), resolve(model, None), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_(0, 0.05, generator=generator)
    return layers


def banked(max_batch: int = 16) -> Engine:
    model = make_model("llama")
    adapters = []
    for seed, name in enumerate(("one", "two")):
        layers = adapted(model, seed)
        detach(model, layers)
        adapters.append((name, layers))
    del adapters[1][1]["model.layers.0.mlp.up_proj"]  # not every adapter changes every layer
    return Engine(model, install(model, adapters, model.dtype), max_batch)


def test_rows_of_one_batch_have_adapters_of_their_own() -> None:
    expected = {}
    for seed, name in enumerate(("one", "two")):
        model = make_model("llama")
        layers = adapted(model, seed)
        if name == "two":
            detach(model, {n: layers[n] for n in ("model.layers.0.mlp.up_proj",)})
        expected[name] = [alone(model, prompt(n), 20, do_sample=False) for n in LENGTHS]
    expected[None] = [alone(make_model("llama"), prompt(n), 20, do_sample=False) for n in LENGTHS]
    assert expected["one"] != expected["two"] != expected[None]
    names = ["one", "two", None]
    asked = [(name, i) for i in range(len(LENGTHS)) for name in names]
    got = generate(banked(), [ask(prompt(LENGTHS[i]), 20, name) for name, i in asked])
    assert got == [expected[name][i] for name, i in asked]
    got = generate(banked(), [ask(prompt(n), 20, "two") for n in LENGTHS])  # a batch that is all one adapter's
    assert got == expected["two"]


@pytest.mark.parametrize(
    "drawn",
    [
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 20, "seed": 4},
        {"temperature": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "seed": 5},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
    ],
)
def test_a_row_is_drawn_as_the_generator_draws_it_whatever_runs_beside_it(
    drawn: dict[str, Any], model_dir: Callable[[str], Path]
) -> None:
    found = load_chat_format(model_dir("llama"))
    generator = Generator(make_model("llama"), found)
    messages = [Message("user", "Who are you, and what do you do all day?")]
    sampling = Sampling(max_new_tokens=25, **drawn)
    ids = generator.chat_format.prompt_ids(messages)
    reply = generator.reply(messages, sampling)
    beside = [ask(prompt(n), 12, temperature=1.0, seed=n) for n in LENGTHS]
    engine = Engine(make_model("llama"))
    tokens = generate(engine, [*beside, Request(ids, found.stop_ids, sampling), *beside[:2]])[len(beside)]
    kept = [t for t in tokens if t not in found.stop_ids]
    assert found.tokenizer.decode(kept).removeprefix(found.template.reply_prefix) == reply.text


def test_requests_join_and_leave_between_steps() -> None:
    expected = {n: alone(make_model("llama"), prompt(n), 30, do_sample=False) for n in LENGTHS}
    engine = Engine(make_model("llama"), max_batch=3)
    told: dict[int, list[int]] = {n: [] for n in LENGTHS}
    ends: dict[int, Any] = {}
    requests = {}
    for n in LENGTHS:
        requests[n] = ask(prompt(n))
        requests[n].on_token = lambda t, n=n: told[n].append(t.id) or True
        requests[n].on_end = lambda how, n=n: ends.update({n: how})
    left, refused = LENGTHS[0], LENGTHS[1]
    for n in LENGTHS[:4]:
        engine.submit(requests[n])
    requests[refused].on_token = lambda t: told[refused].append(t.id) or len(told[refused]) < 7
    for _ in range(5):
        engine.step()
    assert engine.running == 3 and engine.waiting == 1
    requests[left].cancel()
    for n in LENGTHS[4:]:
        engine.submit(requests[n])
    while engine.step():
        pass
    assert told[left] == expected[left][: len(told[left])] and len(told[left]) == 6
    assert left not in ends
    assert told[refused] == expected[refused][:7] and ends[refused] == "stop"
    for n in (*LENGTHS[2:],):
        assert told[n] == expected[n] and ends[n] == "length", n


def test_the_stop_token_ends_a_reply_and_the_models_limit_too() -> None:
    whole = alone(make_model("llama"), prompt(17), 30, do_sample=False)
    ends: list[Any] = []
    engine = Engine(make_model("llama"))
    stop = Request(prompt(17), [whole[4]], Sampling(max_new_tokens=30), on_end=ends.append)
    assert generate(engine, [stop]) == [whole[: whole.index(whole[4]) + 1]]
    long = Request(prompt(1020), [], Sampling(max_new_tokens=30), on_end=ends.append)
    assert len(generate(engine, [long])[0]) == 4  # the tiny model reads 1024
    assert ends == ["stop", "length"]


def test_a_prompt_that_begins_as_another_did_is_not_computed_again() -> None:
    shared = prompt(40)
    prompts = [[*shared, *prompt(n)] for n in LENGTHS]
    plain = Engine(make_model("llama"), prefix_bytes=0)
    expected = generate(plain, [ask(p) for p in prompts])
    assert plain.counts.reused_tokens == 0
    engine = Engine(make_model("llama"))
    requests = [ask(p) for p in prompts]
    assert generate(engine, requests) == expected
    assert [r.reused for r in requests] == [0, *[40] * 5]
    conversation = [*prompts[0], *expected[0], *prompt(9)]  # the next turn: prompt and reply come again
    before = engine.counts.reused_tokens
    assert generate(engine, [ask(conversation)]) == generate(Engine(make_model("llama")), [ask(conversation)])
    assert engine.counts.reused_tokens - before == len(prompts[0]) + len(expected[0]) - 1
    same = ask(prompts[1])
    assert generate(engine, [same]) == [expected[1]]
    assert same.reused == len(prompts[1]) - 1  # its last token is computed, for its logits


def test_kept_prompts_are_an_adapters_own() -> None:
    engine = banked()
    first, again, other = (ask(prompt(41), 5, name) for name in ("one", "one", None))
    generate(engine, [first])
    generate(engine, [again])
    generate(engine, [other])
    assert (first.reused, again.reused, other.reused) == (0, 40, 0)


def test_kept_prompts_stay_within_their_bytes() -> None:
    def layers(tokens: int) -> Any:
        return [(torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 4))]  # 64 bytes a token

    kept = Prefixes(64 * 10)
    kept.keep(None, [1, 2, 3, 4], layers(4))
    kept.keep(None, [1, 2, 3, 4, 5], layers(5))  # goes further: the shorter one is not needed
    assert len(kept) == 1 and kept.bytes == 64 * 5
    kept.keep(None, [1, 2], layers(2))
    kept.keep(None, [9, 8, 7, 6], layers(4))
    assert len(kept) == 2
    assert kept.longest(None, [1, 2, 3, 9])[0][0].shape[2] == 3
    kept.keep(None, [5, 5, 5], layers(3))  # 9 8 7 6 was asked for longest ago
    assert kept.longest(None, [9, 8, 7]) == [] and kept.bytes == 64 * 8
    kept.keep(None, list(range(20)), layers(20))
    assert kept.longest(None, [0, 1, 2, 3]) == []


def test_long_prompts_are_read_in_parts() -> None:
    ids = prompt(900)
    assert generate(Engine(make_model("phi3")), [ask(ids, 8)]) == [alone(make_model("phi3"), ids, 8, do_sample=False)]


def test_a_full_queue_refuses() -> None:
    engine = Engine(make_model("llama"), max_queue=2)
    engine.submit(ask(prompt(3)))
    engine.submit(ask(prompt(4)))
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        engine.submit(ask(prompt(5)))


def test_what_fails_ends_its_own_requests_alone() -> None:
    engine = Engine(make_model("llama"))
    ends: list[Any] = []
    deaf = ask(prompt(5))
    requests = [ask(prompt(7), 8), ask(prompt(9), 8)]
    deaf.on_token, deaf.on_end = _raise, ends.append
    engine.submit(deaf)
    assert generate(engine, [requests[0]]) == [alone(make_model("llama"), prompt(7), 8, do_sample=False)]
    assert [str(e) for e in ends] == ["deaf"]
    # a step that fails (as where memory ends) fails those in it, and the next request is served
    requests[1].on_end = ends.append
    update, engine._cache.update = Rows.update, _raise  # type: ignore[method-assign]
    generate(engine, [requests[1]])
    assert str(ends[1]) == "deaf" and engine.running == 0
    assert generate(engine, [ask(prompt(7), 8)]) == [alone(make_model("llama"), prompt(7), 8, do_sample=False)]
    assert Rows.update is update


def _raise(*_: Any) -> Any:
    raise RuntimeError("deaf")


def test_values_that_are_no_numbers_are_an_error() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    ends: list[Any] = []
    request = ask(prompt(5))
    request.on_end = ends.append
    generate(Engine(model), [request])
    assert isinstance(ends[0], ModelError) and "the model's values are not numbers" in str(ends[0])


def test_a_model_that_carries_state_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *given: given[2] + 0.5 * given[2].roll(1, 1))
    with pytest.raises(ModelError, match="token by token it computes something else than at once"):
        prove(Engine(model))
    small = {"vocab_size": 640, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **small))
    with pytest.raises(ModelError, match=r"models of type mamba cannot be served: .*"):
        prove(Engine(mamba))


@torch.no_grad()
def test_log_probabilities_are_the_models() -> None:
    model = make_model("llama")
    heard: list[Token] = []
    request = Request(prompt(9), [], Sampling(max_new_tokens=3), logprobs=4)
    engine = Engine(make_model("llama"))
    request.on_token = lambda t: heard.append(t) or True
    engine.submit(request)
    while engine.step():
        pass
    ids = prompt(9)
    for token in heard:
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        assert [i for i, _ in token.top] == expected.topk(4).indices.tolist()
        ids = [*ids, token.id]


@pytest.mark.parametrize("prefix", ["", "\n"])
@pytest.mark.parametrize("stop", [(), ("zz",), ("lamp",), ("b\n", "The"), ("🦙",)])
def test_text_in_pieces_is_the_whole_text_up_to_a_stop_string(
    tokenizer: Tokenizer, stop: tuple[str, ...], prefix: str
) -> None:
    text = "I mind the lamp. 🦙 naïve 你好 a b\nThe end  "
    ids = list(tokenizer.encode_batch([prefix + text])[0].ids)
    written = ReplyText(tokenizer, prefix, stop)
    pieces = []
    for token in ids:
        pieces.append(written.push(token))
        if written.ended:
            break
    pieces.append(written.end())
    ends = [text.index(s) for s in stop if s in text]
    assert "".join(pieces) == written.text == (text[: min(ends)] if ends else text)
    assert written.ended == bool(ends)
    assert "\ufffd" not in "".join(pieces)
