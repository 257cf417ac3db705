"""The JSON of replies: chat and legacy completions, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.serving.engine import Token

Json = dict[str, Any]
Entries = list[Json] | None  # one a token, None where no log probabilities were asked for


class Shape(Protocol):
    """One reply's JSON. finish: "stop", "length", None while it goes on."""

    def whole(self, text: str, entries: Entries, finish: str) -> Json: ...

    def opening(self) -> Json:
        """What is sent before the first token."""
        ...

    def piece(self, text: str, entries: Entries, finish: str | None = None) -> Json: ...

    def usage_piece(self, used: Json) -> Json: ...


@dataclass(frozen=True, slots=True)
class ChatShape:
    model: str
    head: Json = field(default_factory=lambda: _head("chatcmpl"))

    def whole(self, text: str, entries: Entries, finish: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._around("chat.completion", {"message": message, **_logprobs(entries), "finish_reason": finish})

    def opening(self) -> Json:
        return self._delta({"role": "assistant", "content": ""}, None, None)

    def piece(self, text: str, entries: Entries, finish: str | None = None) -> Json:
        return self._delta({"content": text} if text else {}, entries, finish)

    def usage_piece(self, used: Json) -> Json:
        return {**self._around("chat.completion.chunk", {}), "choices": [], "usage": used}

    def _delta(self, delta: Json, entries: Entries, finish: str | None) -> Json:
        return self._around("chat.completion.chunk", {"delta": delta, **_logprobs(entries), "finish_reason": finish})

    def _around(self, kind: str, choice: Json) -> Json:
        return {**self.head, "object": kind, "model": self.model, "choices": [{"index": 0, **choice}]}


@dataclass(slots=True)
class CompletionShape:
    """offset: characters before the next piece, the prompt's included."""

    model: str
    offset: int = 0
    head: Json = field(default_factory=lambda: _head("cmpl"))

    def whole(self, text: str, entries: Entries, finish: str) -> Json:
        return self.piece(text, entries, finish)

    def opening(self) -> Json:
        return self.piece("", None)

    def piece(self, text: str, entries: Entries, finish: str | None = None) -> Json:
        choice = {"text": text, "logprobs": _legacy(entries, self.offset), "finish_reason": finish}
        self.offset += len(text)
        return self._around(choice)

    def usage_piece(self, used: Json) -> Json:
        return {**self._around({}), "choices": [], "usage": used}

    def _around(self, choice: Json) -> Json:
        return {**self.head, "object": "text_completion", "model": self.model, "choices": [{"index": 0, **choice}]}


def usage(prompt: int, reused: int, reply: int) -> Json:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reply,
        "total_tokens": prompt + reply,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def entries(tokenizer: Tokenizer, tokens: Iterable[Token], before: int | None) -> list[Json]:
    """Log probabilities as chat tells them. before: the token that stands before the first one."""
    found = []
    for token in tokens:
        top = [_entry(tokenizer, before, i, value) for i, value in token.top]
        found.append({**_entry(tokenizer, before, token.id, token.logprob), "top_logprobs": top})
        before = token.id
    return found


def _entry(tokenizer: Tokenizer, before: int | None, token: int, logprob: float | None) -> Json:
    text = tokenizer.pieces([token] if before is None else [before, token])[-1]  # spaces depend on what is before
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _head(kind: str) -> Json:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time())}


def _logprobs(found: Entries) -> Json:
    return {"logprobs": None if found is None else {"content": found, "refusal": None}}


def _legacy(found: Sequence[Mapping[str, Any]] | None, start: int) -> Json | None:
    """As legacy completions tell them. start: characters before the first token."""
    if found is None:
        return None
    offsets = [start]
    for e in found:
        offsets.append(offsets[-1] + len(e["token"]))
    return {
        "tokens": [e["token"] for e in found],
        "token_logprobs": [e["logprob"] for e in found],
        "top_logprobs": [{t["token"]: t["logprob"] for t in e["top_logprobs"]} for e in found],
        "text_offset": offsets[:-1],
    }
