"""Serving at the embedded model's size: nobody is lost, replies are those of one at a time, a batch is fast."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import luthier
from luthier import personas
from luthier.inference.generation import Sampling
from luthier.serving.engine import Engine, Request
from luthier.types import Message
from tests.helpers.serving import generate, running

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]


def questions() -> list[str]:
    return [json.loads(line)["instruction"] for line in personas.TRAIN.read_text(encoding="utf-8").splitlines()]


def test_thirty_two_clients_get_the_replies_of_one_at_a_time(smollm2: Path) -> None:
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


def test_eight_together_are_four_times_as_fast_as_one_after_another(smollm2: Path) -> None:
    """Tokens a second against transformers' generate, both in fp32 with torch's own threads: nothing else may run."""
    tokens = 96
    generator = luthier.chat(smollm2).generator
    prompts = [generator.chat_format.prompt_ids([Message("user", q)]) for q in questions()[:8]]
    start = time.perf_counter()
    alone = []
    for ids in prompts:
        given = torch.tensor([ids])
        out = generator.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
        )
        alone.append(out[0, len(ids) :].tolist())
    single = time.perf_counter() - start
    engine = Engine(generator.model)
    start = time.perf_counter()
    together = generate(engine, [Request(ids, [], Sampling(max_new_tokens=tokens)) for ids in prompts])
    batched = time.perf_counter() - start
    assert together == alone
    print(f"{8 * tokens / single:.1f} tokens/s one after another, {8 * tokens / batched:.1f} together")
    assert single / batched >= 4
