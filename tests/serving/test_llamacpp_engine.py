"""The engine of ``serve --engine llama.cpp``: concurrent requests, cancelling, limits, and failures of llama.cpp."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import luthier as library
from luthier.errors import ModelError, UserError
from luthier.exporting.gguf.llamacpp import LlamaServer, ServerOptions
from luthier.inference.sampling import Sampling
from luthier.lora.layers import disable_adapter
from luthier.serving.llamacpp import LlamaEngine, open_models
from luthier.serving.models import resolve_models
from luthier.serving.requests import QueueFull, Request, Token
from tests.conftest import Result
from tests.helpers.handover import tuned
from tests.helpers.llama import alike
from tests.helpers.serving import serving, wait_for

Run = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("llama_files")


@pytest.fixture(scope="module")
def base(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(base, tmp_path_factory.mktemp("runs") / "marlow", size=0.1)


@pytest.fixture(scope="module")
def engine(run: Path) -> Iterator[LlamaEngine]:
    model, _ = open_models(resolve_models([run]), parallel=4)
    engine = LlamaEngine(model, max_batch=4, max_queue=8)
    engine.start()
    yield engine
    engine.close()


class Asked:
    """A request, its tokens, and how it ended."""

    def __init__(
        self, engine: LlamaEngine, ids: list[int], tokens: int, adapter: str | None = None, **options: Any
    ) -> None:
        self.tokens: list[Token] = []
        self.end: str | Exception | None = None
        self.ended = threading.Event()
        self.request = Request(ids, options.pop("stop_ids", ()), Sampling(tokens), adapter, **options)
        self.request.on_token = lambda t: self.tokens.append(t) is None
        self.request.on_end = self._end
        engine.submit(self.request)

    def _end(self, how: str | Exception) -> None:
        self.end = how
        self.ended.set()

    def wait(self) -> list[int]:
        assert self.ended.wait(60)
        if isinstance(self.end, Exception):
            raise self.end
        return [t.id for t in self.tokens]


def test_requests_of_several_models_are_answered_together(engine: LlamaEngine, run: Path) -> None:
    """Each reply is the one that luthier's own layers choose; a near tie may be resolved differently."""
    own = library.chat(run).generator
    prompts = [[5 + i, 9, 11, 30 + i, 7] for i in range(3)]
    asked = [Asked(engine, p, 6, a) for a in ("marlow", None) for p in prompts]
    replies = [a.wait() for a in asked]
    same = 0
    for base in (False, True):
        with disable_adapter(own._adapter_layers() if base else {}):
            expected = own.reply_ids(prompts, Sampling(6))
        for reply, ids in zip(replies[3 * base :], expected, strict=False):
            text, all_of_it = (own.tokenizer.decode([t for t in x if t >= 0]) for x in (reply, ids))
            same += alike(text, all_of_it)
    assert same >= 5
    assert {a.end for a in asked} <= {"length", "stop"}
    assert [sum(t.count for t in a.tokens) for a in asked].count(6) >= 5
    wait_for(lambda: engine.running == 0 and engine.waiting == 0)
    assert engine.counts.reply_tokens >= 30 and engine.counts.prompt_tokens >= 30


def test_log_probabilities_stop_tokens_and_cancelling(engine: LlamaEngine) -> None:
    prompt = [5, 9, 11, 30, 7]
    plain = Asked(engine, prompt, 6)
    ids = plain.wait()
    scored = Asked(engine, prompt, 6, logprobs=3)
    assert scored.wait() == ids
    known = [t for t in scored.tokens if t.text is None]
    assert known
    for token in known:
        assert token.logprob is not None and token.logprob <= 0 and len(token.top) == 3
        assert token.top[0] == (token.id, token.logprob)
    assert Asked(engine, prompt, 6, logprobs=0).wait() == ids
    stopped = Asked(engine, prompt, 6, stop_ids=(ids[0],))
    assert stopped.wait() == ids[:1] and stopped.end == "stop"
    long = Asked(engine, prompt, 100_000)
    wait_for(lambda: engine.running)
    long.request.cancel()
    wait_for(lambda: engine.running == 0)
    assert long.end is None


def test_a_long_queue_is_refused_and_too_long_prompts_get_an_error(engine: LlamaEngine) -> None:
    blocking = [Asked(engine, [5, 9, 11], 100_000) for _ in range(4)]
    wait_for(lambda: engine.waiting == 0)
    waiting = [Asked(engine, [5, 9], 4) for _ in range(8)]
    with pytest.raises(QueueFull):
        Asked(engine, [5, 9], 4)
    for a in (*blocking, *waiting):
        a.request.cancel()
    wait_for(lambda: engine.running == 0 and engine.waiting == 0)
    with pytest.raises(UserError, match="reads at most"):
        Asked(engine, [5] * 5000, 4).wait()


def test_openais_api_is_the_same(run: Path) -> None:
    model, served = open_models(resolve_models([run]), parallel=4)
    own = library.chat(run)
    with serving(LlamaEngine(model, 4), served) as server, server.openai() as client:
        question: Any = [{"role": "user", "content": "Who are you?"}]
        reply = client.chat.completions.create(model="marlow", messages=question, max_tokens=12, logprobs=True)
        assert alike(reply.choices[0].message.content or "", own.send("Who are you?", Sampling(12)).text)
        assert reply.usage and reply.usage.completion_tokens == 12
        assert reply.choices[0].logprobs and reply.choices[0].logprobs.content
        stream = client.chat.completions.create(model="marlow", messages=question, max_tokens=12, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == reply.choices[0].message.content
        with server.http() as plain:
            metrics = plain.get("/metrics").text
        assert "luthier_reply_tokens_total 24" in metrics
        extra = {"no_repeat_ngram_size": 2}
        with pytest.raises(openai.BadRequestError, match="no_repeat_ngram_size: llama.cpp has no such setting"):
            client.chat.completions.create(model="marlow", messages=question, extra_body=extra)


def test_the_death_of_llama_cpp_fails_requests_with_an_error(run: Path) -> None:
    model, _ = open_models(resolve_models([run]), parallel=2)
    engine = LlamaEngine(model, 2)
    engine.start()
    asked = Asked(engine, [5, 9, 11], 100_000)
    wait_for(lambda: asked.tokens)
    os.kill(model.server.process_id, signal.SIGKILL)
    with pytest.raises(ModelError, match="llama.cpp has ended"):
        asked.wait()
    other = engine.llama.server.process_id  # it was started again
    assert other != model.server.process_id
    assert len(Asked(engine, [5, 9, 11], 4).wait()) > 0
    engine.close()


def test_a_reply_without_an_end_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = open_models(resolve_models([run]))
    monkeypatch.setattr(LlamaServer, "stream", lambda *_: (event for event in ()))
    with pytest.raises(ModelError, match="llama.cpp did not finish its response"):
        list(model.tokens_of([5, 9], Sampling(4), 4, None))


def test_a_request_reserves_no_more_than_the_models_context(run: Path) -> None:
    """Otherwise one request for very many tokens would keep all others waiting."""
    model, _ = open_models(resolve_models([run]), parallel=4)
    engine = LlamaEngine(model, 4)
    assert engine.limit and model.context > engine.limit
    assert engine._most(Request([1, 2], (), Sampling(10**6))) == engine.limit
    assert engine._most(Request([1, 2], (), Sampling(7))) == 9
    engine.close()


def test_cancelled_requests_do_not_fill_the_queue(run: Path) -> None:
    model, _ = open_models(resolve_models([run]))
    engine = LlamaEngine(model, 1, max_queue=2)  # not started
    waiting = [Asked(engine, [5], 4) for _ in range(2)]
    with pytest.raises(QueueFull):
        Asked(engine, [5], 4)
    waiting[0].request.cancel()
    Asked(engine, [5], 4)
    engine.close()


def test_a_refused_request_names_the_reason(run: Path, tmp_path: Path) -> None:
    model, _ = open_models(resolve_models([run]))
    with pytest.raises(ModelError, match="llama.cpp refused the request: .*n_predict"):
        model.server.post("/completion", {"prompt": [1], "n_predict": "many"})
    model.server._key = "wrong"
    with pytest.raises(ModelError, match="refused the request: Invalid API Key"):
        model.server.post("/completion", {"prompt": [1]})
    (tmp_path / "no.gguf").write_bytes(b"no")
    with pytest.raises(ModelError, match="no.gguf: llama.cpp cannot load this file"):
        LlamaServer(ServerOptions(str(tmp_path / "no.gguf")))
