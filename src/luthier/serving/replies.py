"""Build the JSON of replies: chat and legacy completions, complete or as streamed chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.serving.requests import Token

Json = dict[str, object]


class Candidate(TypedDict):
    """A token and its log probability. bytes: its UTF-8 bytes, None if it is only part of a character."""

    token: str
    logprob: float | None
    bytes: list[int] | None


class TokenLogprob(Candidate):
    """A token of the reply, and the most likely tokens at its position."""

    top_logprobs: list[Candidate]


TokenLogprobs = list[TokenLogprob] | None  # one per token; None if no log probabilities were requested


class ReplyBuilder(Protocol):
    """Builds the JSON of one reply. finish: "stop" or "length"; None while the reply is not finished."""

    def whole(self, text: str, logprobs: TokenLogprobs, finish: str) -> Json: ...

    def opening(self) -> Json:
        """Return the chunk that is sent before the first token."""
        ...

    def piece(self, text: str, logprobs: TokenLogprobs, finish: str | None = None) -> Json: ...

    def usage_piece(self, used: Json) -> Json: ...


@dataclass(frozen=True, slots=True)
class ChatReplyBuilder:
    """Builds the JSON of a chat completion."""

    model: str
    head: Json = field(default_factory=lambda: _head("chatcmpl"))

    def whole(self, text: str, logprobs: TokenLogprobs, finish: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._around("chat.completion", {"message": message, **_logprobs(logprobs), "finish_reason": finish})

    def opening(self) -> Json:
        return self._delta({"role": "assistant", "content": ""}, None, None)

    def piece(self, text: str, logprobs: TokenLogprobs, finish: str | None = None) -> Json:
        return self._delta({"content": text} if text else {}, logprobs, finish)

    def usage_piece(self, used: Json) -> Json:
        return {**self._around("chat.completion.chunk", {}), "choices": [], "usage": used}

    def _delta(self, delta: Json, logprobs: TokenLogprobs, finish: str | None) -> Json:
        return self._around("chat.completion.chunk", {"delta": delta, **_logprobs(logprobs), "finish_reason": finish})

    def _around(self, kind: str, choice: Json) -> Json:
        return {**self.head, "object": kind, "model": self.model, "choices": [{"index": 0, **choice}]}


@dataclass(slots=True)
class CompletionReplyBuilder:
    """Builds the JSON of a legacy completion. offset: characters before the next piece, including the prompt's."""

    model: str
    offset: int = 0
    head: Json = field(default_factory=lambda: _head("cmpl"))

    def whole(self, text: str, logprobs: TokenLogprobs, finish: str) -> Json:
        return self.piece(text, logprobs, finish)

    def opening(self) -> Json:
        return self.piece("", None)

    def piece(self, text: str, logprobs: TokenLogprobs, finish: str | None = None) -> Json:
        choice: Json = {"text": text, "logprobs": _legacy(logprobs, self.offset), "finish_reason": finish}
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


def token_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token], before: int | None) -> list[TokenLogprob]:
    """Convert log probabilities to the format of chat completions. before: the token before the first one."""
    logprobs: list[TokenLogprob] = []
    for token in tokens:
        top = [_candidate(tokenizer, before, i, value) for i, value in token.top]
        logprobs.append({**_candidate(tokenizer, before, token.id, token.logprob), "top_logprobs": top})
        before = token.id
    return logprobs


def _candidate(tokenizer: Tokenizer, before: int | None, token: int, logprob: float | None) -> Candidate:
    text = tokenizer.pieces([token] if before is None else [before, token])[-1]  # the token before decides on spaces
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _head(kind: str) -> Json:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time())}


def _logprobs(logprobs: TokenLogprobs) -> Json:
    return {"logprobs": None if logprobs is None else {"content": logprobs, "refusal": None}}


def _legacy(logprobs: Sequence[TokenLogprob] | None, start: int) -> Json | None:
    """Convert log probabilities to the format of legacy completions. start: characters before the first token."""
    if logprobs is None:
        return None
    offsets = [start]
    for e in logprobs:
        offsets.append(offsets[-1] + len(e["token"]))
    return {
        "tokens": [e["token"] for e in logprobs],
        "token_logprobs": [e["logprob"] for e in logprobs],
        "top_logprobs": [{t["token"]: t["logprob"] for t in e["top_logprobs"]} for e in logprobs],
        "text_offset": offsets[:-1],
    }
