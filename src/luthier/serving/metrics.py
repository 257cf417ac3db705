"""What the server did, in Prometheus' text format (version 0.0.4 of its exposition formats)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from luthier.serving.engine import Engine

TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of requests by model and status; the engine counts tokens itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._first_tokens = 0
        self._first_token_s = 0.0

    def request(self, model: str, status: int, first_token_s: float | None = None) -> None:
        """status: HTTP's; 499 for a client that hung up. model: "" where it is none of ours."""
        with self._lock:
            self._requests[model, status] += 1
            if first_token_s is not None:
                self._first_tokens += 1
                self._first_token_s += first_token_s

    def text(self, engine: Engine) -> str:
        c = engine.counts
        with self._lock:
            requests = {f'{{model="{_quoted(m)}",status="{s}"}}': n for (m, s), n in self._requests.items()}
            first = {"_count": self._first_tokens, "_sum": round(self._first_token_s, 6)}
        return "".join(
            (
                _family("requests_total", "counter", "Requests by model and HTTP status.", requests),
                _family("prompt_tokens_total", "counter", "Prompt tokens.", {"": c.prompt_tokens}),
                _family("reused_tokens_total", "counter", "Prompt tokens not computed again.", {"": c.reused_tokens}),
                _family("reply_tokens_total", "counter", "Tokens written.", {"": c.reply_tokens}),
                _family("steps_total", "counter", "Steps of the batch.", {"": c.steps}),
                _family("running", "gauge", "Requests in the batch.", {"": engine.running}),
                _family("waiting", "gauge", "Requests in the queue.", {"": engine.waiting}),
                _family("first_token_seconds", "summary", "From request to first token.", first),
            )
        )


def _family(name: str, kind: str, about: str, samples: Mapping[str, float]) -> str:
    name = f"luthier_{name}"
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *(f"{name}{s} {v}" for s, v in samples.items())]
    return "\n".join(lines) + "\n"


def _quoted(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
