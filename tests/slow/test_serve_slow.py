"""Serving the embedded model: no request is lost, replies equal sequential ones, and batching is fast."""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import luthier
from luthier import personas
from luthier.inference.decoding import Reading, verified_decoding
from luthier.inference.sampling import Sampling
from luthier.serving.engine import Engine
from luthier.serving.requests import Request
from luthier.types import Message
from tests.helpers.serving import generate, running

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]


def questions() -> list[str]:
    return [json.loads(line)["instruction"] for line in personas.TRAIN.read_text(encoding="utf-8").splitlines()]


def test_thirty_two_clients_get_the_same_replies_as_sequential_ones(smollm2: Path) -> None:
    asked = [questions()[i % 50] for i in range(200)]
    generator = luthier.chat(smollm2).generator
    sampling = Sampling(max_new_tokens=12)
    expected = {q: generator.reply([Message("user", q)], sampling).text for q in asked}
    with running([smollm2], max_batch=16) as server, ThreadPoolExecutor(32) as pool:
        client = server.openai(timeout=1800)

        def one(question: str) -> str:
            done = client.chat.completions.create(
                model=server.models[0].name,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=12,
            )
            return str(done.choices[0].message.content)

        got = list(pool.map(one, asked))
    assert got == [expected[q] for q in asked]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_takes_about_the_time_of_reading_the_weights(smollm2: Path, dtype: str) -> None:
    """At least 0.7 of the bandwidth of a plain read of the weights. Needs an idle machine."""
    model = luthier.chat(smollm2, dtype=dtype).generator.model
    decoding = verified_decoding(model)
    reading = Reading([5, 6, 7])
    decoding.join(reading)
    weights = {t.data_ptr(): t.reshape(-1).view(torch.int64) for t in model.state_dict().values() if t.numel() > 9}

    def step() -> None:
        reading.ids.append(9)
        decoding.step()

    def read() -> None:
        for t in weights.values():
            t.sum()

    times: dict[str, list[float]] = {"step": [], "read": []}
    for _ in range(30):  # in turn, since other tenants change the bandwidth
        for name, run in (("step", step), ("read", read)):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    ratio = statistics.median(times["read"]) / statistics.median(times["step"])
    print(f"{dtype}: {ratio:.2f} of the bandwidth of a plain read")
    assert ratio >= 0.7


def test_a_batch_of_eight_is_four_times_as_fast_as_single_requests(smollm2: Path) -> None:
    """Compared with transformers' generate in fp32, both with torch's default threads. Needs an idle machine."""
    tokens = 96
    generator = luthier.chat(smollm2).generator
    prompts = [generator.chat_format.prompt_ids([Message("user", q)]) for q in questions()[:8]]
    start = time.perf_counter()
    expected = []
    for ids in prompts:
        prompt = torch.tensor([ids])
        out = generator.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
        )
        expected.append(out[0, len(ids) :].tolist())
    single = time.perf_counter() - start
    engine = Engine(generator.model)
    start = time.perf_counter()
    replies = generate(engine, [Request(ids, [], Sampling(max_new_tokens=tokens)) for ids in prompts])
    batched = time.perf_counter() - start
    assert replies == expected
    print(f"{8 * tokens / single:.1f} tokens/s one by one, {8 * tokens / batched:.1f} in a batch")
    assert single / batched >= 4
