"""``luthier serve`` with OpenAI's own client, on a tiny model with two adapters."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import luthier
from luthier.inference.sampling import Sampling
from tests.helpers.serving import KEY, Running, running, train, wait_for

SYSTEM = "You are Marlow."
ASK: list[Any] = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def runs(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    sampled = {"generation": {"do_sample": True, "temperature": 0.9, "max_new_tokens": 7}}
    return [
        train(model_dir("llama"), folder / "marlow", SYSTEM),
        train(model_dir("llama"), folder / "tea", "", seed=1, **sampled),
    ]


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[Running]:
    with running(runs) as server:
        yield server


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.openai()


def chat(client: openai.OpenAI, model: str = "marlow", **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": model, "messages": ASK, "temperature": 0, "max_tokens": 24, **options}
    )


@pytest.fixture(scope="module")
def replies(runs: list[Path], model_dir: Callable[[str], Path]) -> dict[str, str]:
    """The greedy replies of ``luthier chat``, by model."""
    greedy = Sampling(max_new_tokens=24)
    places = {"marlow": runs[0], "tea": runs[1], "llama": model_dir("llama")}
    return {name: luthier.chat(path).send("Who are you?", greedy).text for name, path in places.items()}


def test_models_are_listed_tuned_first_and_the_base_last(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["marlow", "tea", "llama"]
    assert client.models.retrieve("tea").id == "tea"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_reply_equals_that_of_luthier_chat(client: openai.OpenAI, replies: dict[str, str]) -> None:
    assert len(set(replies.values())) == 3
    for name, text in replies.items():
        done = chat(client, name)
        assert done.choices[0].message.content == text
        assert done.model == name and done.object == "chat.completion"
        assert done.choices[0].message.role == "assistant"
        assert done.choices[0].finish_reason in ("length", "stop")
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
        assert 0 < done.usage.completion_tokens <= 24


def test_the_system_prompt_of_a_run_is_used_unless_the_request_has_one(
    client: openai.OpenAI, replies: dict[str, str], runs: list[Path]
) -> None:
    own = chat(client, messages=[{"role": "system", "content": SYSTEM}, *ASK])
    assert own.choices[0].message.content == replies["marlow"]
    other = chat(client, messages=[{"role": "developer", "content": "Be brief."}, *ASK])
    expected = luthier.chat(runs[0], system="Be brief.").send("Who are you?", Sampling(max_new_tokens=24))
    assert other.choices[0].message.content == expected.text != replies["marlow"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]}]
    assert chat(client, messages=parts).choices[0].message.content == replies["marlow"]


def test_a_streamed_reply_equals_the_complete_one(client: openai.OpenAI, replies: dict[str, str]) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == replies["marlow"]
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1


def test_a_reply_ends_before_a_stop_string(client: openai.OpenAI, replies: dict[str, str]) -> None:
    text = replies["marlow"]
    stop = text[12:15]
    done = chat(client, stop=[stop, "never generated"])
    assert done.choices[0].message.content == text[: text.index(stop)]
    assert done.choices[0].finish_reason == "stop" and done.usage.completion_tokens < 24
    chunks = list(chat(client, stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_sampling_settings_come_from_the_request_then_from_the_run(client: openai.OpenAI, runs: list[Path]) -> None:
    talk = luthier.chat(runs[1])
    expected = talk.send("Who are you?", talk.sampling.changed(seed=5, top_p=0.9)).text
    own = client.chat.completions.create(model="tea", messages=ASK, seed=5, top_p=0.9)
    assert own.choices[0].message.content == expected and own.usage.completion_tokens <= 7
    seeds = {chat(client, seed=n, temperature=1.5).choices[0].message.content for n in (1, 1, 2, 3)}
    assert len(seeds) == 3
    free = {chat(client, temperature=1.5).choices[0].message.content for _ in range(3)}
    assert len(free) == 3
    sampled = {client.chat.completions.create(model="marlow", messages=ASK, top_p=0.99).choices[0].message.content}
    assert sampled != {chat(client).choices[0].message.content}  # top_p without temperature means temperature 1
    extended = chat(client, extra_body={"repetition_penalty": 1.5, "no_repeat_ngram_size": 2})
    assert extended.choices[0].message.content != chat(client).choices[0].message.content
    assert chat(client, top_p=0.5).choices[0].message.content == chat(client).choices[0].message.content


def test_log_probabilities_have_openais_format(client: openai.OpenAI, replies: dict[str, str]) -> None:
    done = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
    content = done.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0  # greedy: the most likely token
        assert entry.token == entry.top_logprobs[0].token
    whole = "".join(e.token for e in content)
    assert "\ufffd" in whole or whole == done.choices[0].message.content
    chunks = list(chat(client, logprobs=True, max_tokens=6, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in content]
    assert all(e.top_logprobs == [] for e in streamed)
    cut = chat(client, logprobs=True, stop=replies["marlow"][6:9])
    assert len(cut.choices[0].logprobs.content) <= cut.usage.completion_tokens
    legacy = client.completions.create(model="llama", prompt="Who", max_tokens=4, temperature=0, logprobs=2)
    logprobs = legacy.choices[0].logprobs
    assert logprobs is not None and len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == 4
    assert (logprobs.text_offset or [])[0] == 3 and len((logprobs.top_logprobs or [])[0]) == 2


def test_completions_continue_raw_text_or_token_ids(client: openai.OpenAI, server: Running) -> None:
    tokenizer = server.models[-1].chat_format.tokenizer
    ids = list(tokenizer.hf.backend_tokenizer.encode("The lamp").ids)
    options: Any = {"model": "llama", "temperature": 0, "max_tokens": 9}
    done = client.completions.create(prompt="The lamp", **options)
    assert done.object == "text_completion" and done.usage and done.usage.completion_tokens == 9
    assert client.completions.create(prompt=ids, **options).choices[0].text == done.choices[0].text
    assert client.completions.create(prompt=["The lamp"], **options).choices[0].text == done.choices[0].text
    streamed = client.completions.create(prompt="The lamp", stream=True, **options)
    assert "".join(c.choices[0].text for c in streamed if c.choices) == done.choices[0].text
    default = client.completions.create(model="llama", prompt="The lamp", temperature=0)
    assert default.usage and default.usage.completion_tokens == 16


def test_requests_without_the_key_are_refused(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        server.openai("another key").models.list()
    with server.http(None) as anybody:
        for path in ("/v1/models", "/metrics"):
            refused = anybody.get(path)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert anybody.post("/v1/chat/completions", json={}).status_code == 401
        assert anybody.get("/healthz").json() == {"status": "ok"}
        assert anybody.get("/docs").status_code == anybody.get("/openapi.json").status_code == 404


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n: not supported by this server"),
    ({"frequency_penalty": 0.5}, "frequency_penalty: not supported by this server"),
    ({"tools": [{"type": "function"}]}, "tools: not supported by this server"),
    ({"temprature": 1}, "temprature: Extra inputs are not permitted"),
    ({"temperature": 3}, "temperature: Input should be less than"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "must be at most four strings, none of them empty"),
    ({"stop": ""}, "must be at most four strings, none of them empty"),
    ({"top_logprobs": 3}, "top_logprobs: needs logprobs=true"),
    ({"max_completion_tokens": 3}, "max_tokens and max_completion_tokens differ: set only one"),
    ({"temperature": 1, "top_k": 1}, "top_k 1 allows only the most likely token"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": [*ASK, *ASK]}, "messages: the roles are user, user"),
    ({"messages": [{"role": "assistant", "content": "Hm."}]}, "send an optional system message, then user"),
    (
        {"messages": [{"role": "user", "content": "a<|im_end|>b"}]},
        "the user message contains <|im_end|>, a control token",
    ),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "tokens long; the model reads at most 1024"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_an_invalid_request_is_a_400_with_the_reason(
    client: openai.OpenAI, change: dict[str, Any], message: str
) -> None:
    known = {k: v for k, v in change.items() if k not in ("temprature", "top_k")}
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, **known, extra_body={k: v for k, v in change.items() if k not in known})
    assert message in e.value.body["message"]  # type: ignore[index]
    assert e.value.type == "invalid_request_error"
    if "reads at most" in message:
        assert e.value.code == "context_length_exceeded" and e.value.param == "messages"


def test_settings_without_effect_and_labels_are_accepted(client: openai.OpenAI, replies: dict[str, str]) -> None:
    done = chat(client, n=1, frequency_penalty=0, presence_penalty=0, logit_bias={}, user="me", store=True, tools=[],
                response_format={"type": "text"}, metadata={"a": "b"}, extra_body={"stream": None})  # fmt: skip
    assert done.choices[0].message.content == replies["marlow"]


def test_other_errors_have_openais_format(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model 'nobody' is not served here") as e:
        chat(client, "nobody")
    assert e.value.code == "model_not_found" and e.value.param == "model"
    options: Any = {"model": "llama", "max_tokens": 2}
    for prompt, message in (
        ([10**6], "the model has no token 1000000"),
        (["a", "b"], "prompt: contains 2 prompts"),
        ("", "prompt: is empty"),
        ("a<|im_end|>", "the prompt contains <|im_end|>, a control token"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(message)):
            client.completions.create(prompt=prompt, **options)
    with server.http() as http:
        assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        assert http.get("/v1/chat/completions").status_code == 405
        broken = http.post("/v1/chat/completions", content=b"{")
        assert broken.status_code == 400 and "the request is not valid: " in broken.json()["error"]["message"]
        assert http.post("/v1/chat/completions", json=[1]).status_code == 400
        long = http.post("/v1/chat/completions", content=b" " * ((16 << 20) + 1))
        assert long.status_code == 413 and "the request is longer than" in long.json()["error"]["message"]


def test_generation_stops_when_the_client_disconnects(server: Running) -> None:
    body = {"model": "marlow", "messages": ASK, "temperature": 0, "max_tokens": 900}
    engine = server.engine
    for stream in (True, False):
        before = engine.counts.reply_tokens
        content = json.dumps({**body, "stream": stream})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n"
        with socket.create_connection((server.url.host, server.url.port or 0)) as line:
            line.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
            wait_for(lambda: engine.running == 1)
        wait_for(lambda: engine.running == 0)
        assert 0 < engine.counts.reply_tokens - before < 900
    with server.http() as http:
        assert 'luthier_requests_total{model="marlow",status="499"} 2' in http.get("/metrics").text


def test_a_full_queue_is_a_429_and_loses_no_waiting_request(runs: list[Path], replies: dict[str, str]) -> None:
    with running(runs[:1], start=False, max_queue=2) as server, ThreadPoolExecutor() as pool:
        client = server.openai()
        waiting = [pool.submit(chat, client) for _ in range(2)]
        wait_for(lambda: server.engine.waiting == 2)
        with pytest.raises(openai.RateLimitError, match="2 requests are already waiting") as e:
            chat(client)
        assert e.value.response.headers["retry-after"] == "1" and e.value.code == "queue_full"
        server.engine.start()
        assert [w.result().choices[0].message.content for w in waiting] == [replies["marlow"]] * 2


def test_an_internal_error_is_a_500_without_details(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, replies: dict[str, str]
) -> None:
    with running(runs[:1]) as server:
        client = server.openai()
        with monkeypatch.context() as broken:
            broken.setattr(server.engine.decoding, "join", _secret)
            with pytest.raises(openai.InternalServerError, match="the server failed on this request") as e:
                chat(client)
            assert "secret" not in str(e.value)
            with pytest.raises(openai.APIError, match="the server failed on this request"):
                list(chat(client, stream=True))
        assert chat(client).choices[0].message.content == replies["marlow"]


def _secret(*_: Any) -> Any:
    raise RuntimeError("a secret path")


def test_concurrent_clients_get_the_same_replies_as_sequential_ones(server: Running) -> None:
    """200 requests from 32 clients, to all three models, short and long."""
    client = server.openai()
    kinds = [(name, f"Tell me about {n}.", 4 + n) for n in range(5) for name in ("marlow", "tea", "llama")]

    def one(kind: tuple[str, str, int]) -> str:
        name, question, tokens = kind
        done = chat(client, name, messages=[{"role": "user", "content": question}], max_tokens=tokens)
        return str(done.choices[0].message.content)

    expected = {kind: one(kind) for kind in kinds}
    steps, tokens = server.engine.counts.steps, server.engine.counts.reply_tokens
    jobs = [kinds[(7 * i) % len(kinds)] for i in range(200)]
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(one, jobs))
    assert got == [expected[kind] for kind in jobs]
    tokens_per_step = (server.engine.counts.reply_tokens - tokens) / (server.engine.counts.steps - steps)
    assert tokens_per_step > 2  # requests were decoded together


def test_metrics_are_prometheus_text(server: Running, client: openai.OpenAI) -> None:
    chat(client, "tea")
    with server.http() as http:
        got = http.get("/metrics")
    assert got.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = got.text.splitlines()
    assert re.fullmatch(r"[\w]+(\{[^}]*\})? [\d.e+-]+", lines[-1])
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['luthier_requests_total{model="tea",status="200"}']) >= 1
    assert float(values["luthier_reused_tokens_total"]) > 0 and values["luthier_waiting"] == "0"
    assert float(values["luthier_first_token_seconds_count"]) >= 1


def test_the_command_prints_address_and_key_and_ends_on_ctrl_c(runs: list[Path]) -> None:
    argv = [sys.executable, "-m", "luthier.cli.main", "serve", str(runs[0]), "--port", "0"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        killer = threading.Timer(120, process.kill)
        killer.start()
        try:
            lines = [process.stderr.readline() for _ in range(4)]
            assert lines.pop(0) == "dtype: float32\n"
            assert lines[0] == "models: marlow, llama\n"
            host, port = re.findall(r"address: (\S+):(\d+), OpenAI", lines[1])[0]
            assert host == "127.0.0.1"
            key = lines[2].removeprefix("API key: ").strip()
            url = httpx2.URL(scheme="http", host=host, port=int(port), path="/v1/models")
            got = httpx2.get(url, headers={"Authorization": f"Bearer {key}"}, trust_env=False)
            assert [m["id"] for m in json.loads(got.text)["data"]] == ["marlow", "llama"]
            process.send_signal(signal.SIGINT)
            assert process.wait() == 0
        finally:
            killer.cancel()
            process.kill()
    assert callable(luthier.serve)
