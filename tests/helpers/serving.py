"""Run a server of tiny runs over one base model in this process, for tests that connect to it over a socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn

import luthier
from luthier import personas
from luthier.serving import app as http
from luthier.serving.engine import Engine
from luthier.serving.models import Served, open_models, resolve_models
from luthier.serving.requests import ReplyEngine, Request
from luthier.serving.server import listen

KEY = "a key for tests"


@dataclass
class Running:
    url: httpx2.URL
    engine: Any
    models: list[Served]

    def openai(self, key: str = KEY, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url.join("/v1"), api_key=key, **{"max_retries": 0, "timeout": 60, **options})

    def http(self, key: str | None = KEY) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)


@contextmanager
def running(paths: list[Path], start: bool = True, **options: Any) -> Iterator[Running]:
    """Serve runs within the block. start: false to leave the engine stopped, so that requests wait."""
    model, routes, models = open_models(resolve_models(paths))
    with serving(Engine(model, routes, **options), models, start) as server:
        yield server


@contextmanager
def serving(engine: ReplyEngine, models: list[Served], start: bool = True) -> Iterator[Running]:
    """Serve models with an engine within the block, and close it."""
    with listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(http.create(models, engine, KEY), log_level="critical", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        if start:
            engine.start()
        try:
            wait_for(lambda: server.started)
            host, port = listener.getsockname()[:2]
            yield Running(httpx2.URL(scheme="http", host=host, port=port), engine, models)
        finally:
            server.should_exit = True
            thread.join()
            engine.close()


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition was not met within {seconds} s"
        time.sleep(0.01)


def train(base: Path, output_dir: Path, system: str, seed: int = 0, **settings: Any) -> Path:
    """Train a short run that changes every reply."""
    luthier.train(
        luthier.build(
            {
                "model": {"path": str(base)},
                "data": {"train": [str(personas.TRAIN)], "max_length": 512, "system": system},
                "train": {
                    "max_steps": 6,
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 1,
                    "learning_rate": 0.02,
                    "seed": seed,
                    "eval_time_ratio": 0,
                },
                "output_dir": str(output_dir),
                **settings,
            }
        )
    )
    return output_dir


def generate(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Submit requests and step until all have ended, without a thread; return the tokens of each."""
    tokens: list[list[int]] = [[] for _ in requests]
    for request, mine in zip(requests, tokens, strict=True):
        request.on_token = lambda t, mine=mine: mine.append(t.id) or True  # type: ignore[misc]
        engine.submit(request)
    while engine.step():
        pass
    return tokens
