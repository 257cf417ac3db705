"""Replies: prompts through the training renderer, tokens by transformers' ``generate``, ended by the stop ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from luthier.control import ControlTokens
from luthier.errors import DataError, UserError
from luthier.models.tokenizer import Tokenizer
from luthier.types import Message, Template


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. temperature 0: always the likeliest token (reproducible).

    max_seconds: after it replies are cut where they are.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """text without the stop token; stopped: it ended by a stop token, not by ``max_new_tokens``."""

    text: str
    stopped: bool
    prompt_tokens: int
    reply_tokens: int
    seconds: float


class Generator:
    """A model that answers. The template and stop ids are those of its training."""

    def __init__(self, model: Any, tokenizer: Tokenizer, template: Template, stop_ids: Sequence[int]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.stop_ids = list(dict.fromkeys(stop_ids))
        model.generation_config = GenerationConfig()  # what is sampled is in ``Sampling``, never hidden defaults

    def check(self, text: str, what: str) -> None:
        """Raise DataError where a text is no text, or would be read as one of the model's control tokens."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{what} holds bytes that are not text", "type it in UTF-8") from None
        control = ControlTokens.of([*self.tokenizer.control_tokens, *self.template.stop], "refuse")
        if control:
            control.check(text, what)

    def reply(
        self, messages: Sequence[Message], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """One reply; ``on_text`` gets the text as it is written."""
        streamer = _Stream(self.tokenizer, self.stop_ids, on_text) if on_text else None
        return self._generate([self._prompt(messages)], sampling, streamer)[0]

    def replies(self, prompts: Sequence[Sequence[Message]], sampling: Sampling) -> list[Reply]:
        """One reply to each, generated together (padded on the left, positions kept)."""
        return self._generate([self._prompt(m) for m in prompts], sampling, None)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return list(self.tokenizer.encode_batch([self.template.prompt(messages)])[0].ids)

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], s: Sampling, streamer: _Stream | None) -> list[Reply]:
        self.model.eval()
        longest = max(map(len, prompts))
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and longest + 1 > limit:
            raise UserError(
                f"the prompt is {longest} tokens long; the model reads at most {limit}", "shorten the conversation"
            )
        pad = self.stop_ids[0]
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        sampled = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k} if s.temperature > 0 else {}
        config = GenerationConfig(
            max_new_tokens=min(s.max_new_tokens, limit - longest) if limit else s.max_new_tokens,
            do_sample=s.temperature > 0,
            eos_token_id=self.stop_ids,
            pad_token_id=pad,
            max_time=s.max_seconds,
            **sampled,
        )
        if s.temperature > 0:
            torch.manual_seed(s.seed % 2**63)
        start = time.perf_counter()
        out = self.model.generate(ids, attention_mask=mask, generation_config=config, streamer=streamer)
        seconds = time.perf_counter() - start
        return [
            self._reply(row[longest:].tolist(), len(prompt), seconds) for row, prompt in zip(out, prompts, strict=True)
        ]

    def _reply(self, ids: list[int], prompt_tokens: int, seconds: float) -> Reply:
        end = next((i for i, t in enumerate(ids) if t in self.stop_ids), None)
        kept = ids if end is None else ids[:end]
        return Reply(
            text=self.tokenizer.decode(kept),
            stopped=end is not None,
            prompt_tokens=prompt_tokens,
            reply_tokens=len(kept) + (end is not None),
            seconds=seconds,
        )


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Hands on text as soon as its bytes are whole characters."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._stop = set(stop_ids)
        self._on_text = on_text
        self._ids: list[int] = []
        self._shown = ""
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._ids += [t for t in value.reshape(-1).tolist() if t not in self._stop]
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            self._emit(text)

    def end(self) -> None:
        self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> None:
        if len(text) > len(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
