"""The batching engine: a reply does not depend on the requests that run with it, join or leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.compiled import Unsuitable
from luthier.config import LoraConfig
from luthier.errors import ModelError
from luthier.inference.generation import Generator
from luthier.inference.sampling import Sampling
from luthier.lora.layers import attach, detach, resolve
from luthier.models.chat_format import load_chat_format
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.serving import engine as engines
from luthier.serving.adapters import install
from luthier.serving.cache import Prefixes
from luthier.serving.engine import Engine
from luthier.serving.general import verify_batching
from luthier.serving.requests import QueueFull, Request, Token
from luthier.serving.text import ReplyText
from luthier.types import Message
from tests.conftest import ARCHITECTURES, make_model
from tests.helpers.serving import generate

LENGTHS = (3, 41, 17, 60, 2, 29)


@pytest.fixture(autouse=True, params=["compiled", "general"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with the compiled layers and with the model's own."""
    if request.param == "general":

        def refuse(*_: Any) -> Any:
            raise Unsuitable("switched off")

        monkeypatch.setattr(engines, "verified_decoding", refuse)
    return str(request.param)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(5, 640, (length,), generator=generator).tolist()


def reference(model: Any, ids: list[int], tokens: int, **kwargs: Any) -> list[int]:
    """The reply of transformers' own generate to this prompt by itself."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, pad_token_id=0, eos_token_id=[], **kwargs
    )
    return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def ask(ids: list[int], tokens: int = 30, adapter: str | None = None, **sampling: Any) -> Request:
    return Request(ids, [], Sampling(max_new_tokens=tokens, **sampling), adapter)


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_batched_replies_equal_those_of_single_prompts(arch: str) -> None:
    prompts = [prompt(n) for n in LENGTHS]
    expected = [reference(make_model(arch), p, 40, do_sample=False) for p in prompts]
    engine = Engine(make_model(arch))
    verify_batching(engine.decoding)
    assert generate(engine, [ask(p, 40) for p in prompts]) == expected
    assert engine.counts.steps == 39  # one step per token, for any number of rows
    assert engine.running == engine.waiting == 0


def adapted(model: nn.Module, seed: int) -> dict[str, Any]:
    """Attach an adapter with a nonzero update."""
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
    del adapters[1][1]["model.layers.0.mlp.up_proj"]  # adapters need not change the same layers
    return Engine(model, install(model, adapters, model.dtype), max_batch)


def test_rows_of_one_batch_can_use_different_adapters() -> None:
    expected = {}
    for seed, name in enumerate(("one", "two")):
        model = make_model("llama")
        layers = adapted(model, seed)
        if name == "two":
            detach(model, {n: layers[n] for n in ("model.layers.0.mlp.up_proj",)})
        expected[name] = [reference(model, prompt(n), 20, do_sample=False) for n in LENGTHS]
    expected[None] = [reference(make_model("llama"), prompt(n), 20, do_sample=False) for n in LENGTHS]
    assert expected["one"] != expected["two"] != expected[None]
    names = ["one", "two", None]
    requests = [(name, i) for i in range(len(LENGTHS)) for name in names]
    got = generate(banked(), [ask(prompt(LENGTHS[i]), 20, name) for name, i in requests])
    assert got == [expected[name][i] for name, i in requests]
    got = generate(banked(), [ask(prompt(n), 20, "two") for n in LENGTHS])  # all rows use the same adapter
    assert got == expected["two"]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 20, "seed": 4},
        {"temperature": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "seed": 5},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
    ],
)
def test_a_row_is_sampled_like_generator_does_whatever_runs_with_it(
    sampling: dict[str, Any], model_dir: Callable[[str], Path]
) -> None:
    chat_format = load_chat_format(model_dir("llama"))
    generator = Generator(make_model("llama"), chat_format)
    messages = [Message("user", "Who are you, and what do you do all day?")]
    settings = Sampling(max_new_tokens=25, **sampling)
    ids = generator.chat_format.prompt_ids(messages)
    reply = generator.reply(messages, settings)
    others = [ask(prompt(n), 12, temperature=1.0, seed=n) for n in LENGTHS]
    engine = Engine(make_model("llama"))
    tokens = generate(engine, [*others, Request(ids, chat_format.stop_ids, settings), *others[:2]])[len(others)]
    text_ids = [t for t in tokens if t not in chat_format.stop_ids]
    assert chat_format.tokenizer.decode(text_ids).removeprefix(chat_format.template.reply_prefix) == reply.text


def test_requests_join_and_leave_between_steps() -> None:
    expected = {n: reference(make_model("llama"), prompt(n), 30, do_sample=False) for n in LENGTHS}
    engine = Engine(make_model("llama"), max_batch=3)
    tokens: dict[int, list[int]] = {n: [] for n in LENGTHS}
    ends: dict[int, Any] = {}
    requests = {}
    for n in LENGTHS:
        requests[n] = ask(prompt(n))
        requests[n].on_token = lambda t, n=n: tokens[n].append(t.id) or True
        requests[n].on_end = lambda finish, n=n: ends.update({n: finish})
    cancelled, ended = LENGTHS[0], LENGTHS[1]
    for n in LENGTHS[:4]:
        engine.submit(requests[n])
    requests[ended].on_token = lambda t: tokens[ended].append(t.id) or len(tokens[ended]) < 7
    for _ in range(5):
        engine.step()
    assert engine.running == 3 and engine.waiting == 1
    requests[cancelled].cancel()
    for n in LENGTHS[4:]:
        engine.submit(requests[n])
    while engine.step():
        pass
    assert tokens[cancelled] == expected[cancelled][:6]
    assert cancelled not in ends
    assert tokens[ended] == expected[ended][:7] and ends[ended] == "stop"
    for n in (*LENGTHS[2:],):
        assert tokens[n] == expected[n] and ends[n] == "length", n


def test_a_reply_ends_at_a_stop_token_or_at_the_context_length() -> None:
    full = reference(make_model("llama"), prompt(17), 30, do_sample=False)
    ends: list[Any] = []
    engine = Engine(make_model("llama"))
    stop = Request(prompt(17), [full[4]], Sampling(max_new_tokens=30), on_end=ends.append)
    assert generate(engine, [stop]) == [full[: full.index(full[4]) + 1]]
    long = Request(prompt(1020), [], Sampling(max_new_tokens=30), on_end=ends.append)
    assert len(generate(engine, [long])[0]) == 4  # the tiny model's context is 1024
    assert ends == ["stop", "length"]


def test_a_shared_prefix_is_not_computed_again() -> None:
    shared = prompt(40)
    prompts = [[*shared, *prompt(n)] for n in LENGTHS]
    uncached = Engine(make_model("llama"), prefix_bytes=0)
    expected = generate(uncached, [ask(p) for p in prompts])
    assert uncached.counts.reused_tokens == 0
    engine = Engine(make_model("llama"))
    requests = [ask(p) for p in prompts]
    assert generate(engine, requests) == expected
    assert [r.reused for r in requests] == [0, *[40] * 5]
    conversation = [*prompts[0], *expected[0], *prompt(9)]  # the next turn starts with the prompt and the reply
    before = engine.counts.reused_tokens
    assert generate(engine, [ask(conversation)]) == generate(Engine(make_model("llama")), [ask(conversation)])
    assert engine.counts.reused_tokens - before == len(prompts[0]) + len(expected[0]) - 1
    same = ask(prompts[1])
    assert generate(engine, [same]) == [expected[1]]
    assert same.reused == len(prompts[1]) - 1  # its last token is computed, for its logits


def test_cached_prompts_are_not_shared_between_adapters() -> None:
    engine = banked()
    first, again, other = (ask(prompt(41), 5, name) for name in ("one", "one", None))
    generate(engine, [first])
    generate(engine, [again])
    generate(engine, [other])
    assert (first.reused, again.reused, other.reused) == (0, 40, 0)


def test_cached_prompts_stay_within_the_memory_limit() -> None:
    def layers(tokens: int) -> Any:
        return [(torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 4))]  # 64 bytes per token

    prefixes = Prefixes(64 * 10)
    prefixes.keep(None, [1, 2, 3, 4], layers(4))
    prefixes.keep(None, [1, 2, 3, 4, 5], layers(5))  # covers the shorter one, which is dropped
    assert len(prefixes) == 1 and prefixes.bytes == 64 * 5
    prefixes.keep(None, [1, 2], layers(2))
    prefixes.keep(None, [9, 8, 7, 6], layers(4))
    assert len(prefixes) == 2
    assert prefixes.longest(None, [1, 2, 3, 9])[0][0].shape[2] == 3
    prefixes.keep(None, [5, 5, 5], layers(3))  # evicts 9 8 7 6, the least recently used
    assert prefixes.longest(None, [9, 8, 7]) == [] and prefixes.bytes == 64 * 8
    prefixes.keep(None, list(range(20)), layers(20))
    assert prefixes.longest(None, [0, 1, 2, 3]) == []


def test_a_long_prompt_in_several_parts_gives_the_same_reply() -> None:
    ids = prompt(900)
    assert generate(Engine(make_model("phi3")), [ask(ids, 8)]) == [
        reference(make_model("phi3"), ids, 8, do_sample=False)
    ]


def test_a_full_queue_refuses_requests() -> None:
    engine = Engine(make_model("llama"), max_queue=2)
    engine.submit(ask(prompt(3)))
    engine.submit(ask(prompt(4)))
    with pytest.raises(QueueFull, match="2 requests are already waiting"):
        engine.submit(ask(prompt(5)))


def test_a_failure_ends_only_the_requests_it_affects(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(make_model("llama"))
    ends: list[Any] = []
    broken = ask(prompt(5))
    requests = [ask(prompt(7), 8), ask(prompt(9), 8)]
    broken.on_token, broken.on_end = _raise, ends.append
    engine.submit(broken)
    assert generate(engine, [requests[0]]) == [reference(make_model("llama"), prompt(7), 8, do_sample=False)]
    assert [str(e) for e in ends] == ["failed"]
    # a failed step (out of memory, for example) fails its requests, and the next request is served
    requests[1].on_end = ends.append
    with monkeypatch.context() as broken:
        broken.setattr(engine.decoding, "step", _raise)
        generate(engine, [requests[1]])
    assert str(ends[1]) == "failed" and engine.running == 0
    assert generate(engine, [ask(prompt(7), 8)]) == [reference(make_model("llama"), prompt(7), 8, do_sample=False)]


def _raise(*_: Any) -> Any:
    raise RuntimeError("failed")


def test_nan_in_the_output_is_an_error() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    ends: list[Any] = []
    request = ask(prompt(5))
    request.on_end = ends.append
    generate(Engine(model), [request])
    assert isinstance(ends[0], ModelError) and "the model's output contains NaN" in str(ends[0])


def test_a_model_that_carries_state_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *args: args[2] + 0.5 * args[2].roll(1, 1))
    with pytest.raises(ModelError, match="decoding token by token gives other results than one forward pass"):
        verify_batching(Engine(model).decoding)
    small = {"vocab_size": 640, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **small))
    with pytest.raises(ModelError, match=r"models of type mamba cannot be served: decoding a batch fails \("):
        verify_batching(Engine(mamba).decoding)


@torch.no_grad()
def test_log_probabilities_equal_those_of_the_model() -> None:
    model = make_model("llama")
    tokens: list[Token] = []
    request = Request(prompt(9), [], Sampling(max_new_tokens=3), logprobs=4)
    engine = Engine(make_model("llama"))
    request.on_token = lambda t: tokens.append(t) or True
    engine.submit(request)
    while engine.step():
        pass
    ids = prompt(9)
    for token in tokens:
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        assert [i for i, _ in token.top] == expected.topk(4).indices.tolist()
        ids = [*ids, token.id]


@pytest.mark.parametrize("prefix", ["", "\n"])
@pytest.mark.parametrize("stop", [(), ("zz",), ("lamp",), ("b\n", "The"), ("🦙",)])
def test_streamed_pieces_add_up_to_the_text_before_a_stop_string(
    tokenizer: Tokenizer, stop: tuple[str, ...], prefix: str
) -> None:
    text = "I mind the lamp. 🦙 naïve 你好 a b\nThe end  "
    ids = list(tokenizer.encode_batch([prefix + text])[0].ids)
    reply = ReplyText(tokenizer, prefix, stop)
    pieces = []
    for token in ids:
        pieces.append(reply.push(token))
        if reply.ended:
            break
    pieces.append(reply.end())
    ends = [text.index(s) for s in stop if s in text]
    assert "".join(pieces) == reply.text == (text[: min(ends)] if ends else text)
    assert reply.ended == bool(ends)
    assert "\ufffd" not in "".join(pieces)
