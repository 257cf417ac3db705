"""Server metrics in Prometheus' text format (version 0.0.4 of its exposition formats)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from luthier.serving.requests import ReplyEngine

TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts requests by model and status; the engine itself counts tokens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._first_tokens = 0
        self._first_token_s = 0.0

    def request(self, model: str, status: int, first_token_s: float | None = None) -> None:
        """Count a finished request.

        model: "" if the request names no served model. status: the HTTP status, 499 if the client disconnected.
        first_token_s: seconds from the request to its first token, if there was one.
        """
        with self._lock:
            self._requests[model, status] += 1
            if first_token_s is not None:
                self._first_tokens += 1
                self._first_token_s += first_token_s

    def text(self, engine: ReplyEngine) -> str:
        """Return the body of ``GET /metrics``."""
        c = engine.counts
        with self._lock:
            requests = {f'{{model="{_quoted(m)}",status="{s}"}}': n for (m, s), n in self._requests.items()}
            first = {"_count": self._first_tokens, "_sum": round(self._first_token_s, 6)}
        return "".join(
            (
                _family("requests_total", "counter", "Finished requests by model and HTTP status.", requests),
                _family(
                    "prompt_tokens_total", "counter", "Prompt tokens, cached ones included.", {"": c.prompt_tokens}
                ),
                _family(
                    "reused_tokens_total", "counter", "Prompt tokens served from the cache.", {"": c.reused_tokens}
                ),
                _family("reply_tokens_total", "counter", "Generated tokens.", {"": c.reply_tokens}),
                _family("steps_total", "counter", "Decoding steps, one token per running request.", {"": c.steps}),
                _family("running", "gauge", "Requests being decoded.", {"": engine.running}),
                _family("waiting", "gauge", "Requests waiting in the queue.", {"": engine.waiting}),
                _family("first_token_seconds", "summary", "Time from request to first token.", first),
            )
        )


def _family(name: str, kind: str, description: str, samples: Mapping[str, float]) -> str:
    name = f"luthier_{name}"
    lines = [f"# HELP {name} {description}", f"# TYPE {name} {kind}", *(f"{name}{s} {v}" for s, v in samples.items())]
    return "\n".join(lines) + "\n"


def _quoted(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
