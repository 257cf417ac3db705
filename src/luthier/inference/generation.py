"""Replies: prompts through the training renderer, tokens by transformers' ``generate``, ended by the stop ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from luthier.config import GenerationSettings
from luthier.errors import ConfigError, UserError
from luthier.models.chat_format import ChatFormat
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.types import Message

_BATCH_TOKENS = 4096  # prompts and replies of one batch together
_DRAWN: dict[str, Any] = {"top_p": 1.0, "top_k": 0}  # where tokens are drawn; these values change nothing


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. temperature 0: always the likeliest token (reproducible).

    max_seconds: after it replies are cut where they are; several replies share it.
    repetition_penalty, no_repeat_ngram_size: as in transformers, over the tokens of prompt and reply; 1 and 0: off.
    Raises ConfigError where a setting would be ignored.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_seconds: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        likeliest = self.temperature == 0
        unused = [k for k, neutral in _DRAWN.items() if getattr(self, k) != neutral]
        if likeliest and unused:
            raise ConfigError(
                f"{' and '.join(unused)} would be ignored: at temperature 0 the likeliest token is always taken",
                "give a temperature too (--temperature 0.7), or leave it out",
            )
        if not likeliest and self.top_k == 1:
            raise ConfigError(
                "the temperature would be ignored: top_k 1 leaves only the likeliest token to draw",
                "use temperature 0 (--temperature 0), which takes the likeliest token, without top_k",
            )

    @classmethod
    def of(cls, chosen: GenerationSettings, seed: int = 0) -> Self:
        """A run's own settings."""
        drawn = {k: getattr(chosen, k) for k in _DRAWN} if chosen.do_sample else {}
        return cls(
            max_new_tokens=chosen.max_new_tokens,
            temperature=chosen.temperature if chosen.do_sample else 0.0,
            seed=seed,
            repetition_penalty=chosen.repetition_penalty,
            no_repeat_ngram_size=chosen.no_repeat_ngram_size,
            **drawn,
        )

    def changed(self, **given: float | None) -> Self:
        """With what is given (not None) in the place of its own; temperature 0 takes its top_p and top_k away."""
        chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if chosen.get("temperature") == 0:
            chosen = {**_DRAWN, **chosen}
        return replace(self, **chosen)


@dataclass(frozen=True, slots=True)
class Reply:
    """text without the stop token and the template's ``reply_prefix``.

    stopped: it ended by a stop token, not by ``max_new_tokens``.
    """

    text: str
    stopped: bool
    prompt_tokens: int
    reply_tokens: int
    seconds: float


class Generator:
    """A model that answers, in the chat format of its training."""

    def __init__(self, model: Any, chat_format: ChatFormat) -> None:
        self.model = model
        self.chat_format = chat_format
        self.tokenizer = chat_format.tokenizer
        self.stop_ids = list(dict.fromkeys(chat_format.stop_ids))
        model.generation_config = GenerationConfig()  # what is sampled is in ``Sampling``, never hidden defaults

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the model can read this prompt and write at least one token."""
        return self._room(len(self.chat_format.prompt_ids(messages)), 1) >= 1

    def reply(
        self, messages: Sequence[Message], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """One reply; ``on_text`` gets the text as it is written."""
        prefix = self.chat_format.template.reply_prefix
        streamer = _Stream(self.tokenizer, self.stop_ids, prefix, on_text) if on_text else None
        return self._generate([self.chat_format.prompt_ids(messages)], sampling, streamer)[0]

    def replies(self, prompts: Sequence[Sequence[Message]], sampling: Sampling) -> list[Reply]:
        """One reply to each, in the prompts' order; without sampling and in fp32 each is what ``reply`` gives.

        Prompts of like length are generated together (padded on the left, positions kept), ``_BATCH_TOKENS`` tokens
        at most. With a penalty one by one, since padding would count as prompt.
        """
        encoded = [self.chat_format.prompt_ids(m) for m in prompts]
        end = None if sampling.max_seconds is None else time.monotonic() + sampling.max_seconds
        found: dict[int, Reply] = {}
        for batch in self._batches([len(p) for p in encoded], sampling):
            left = None if end is None else max(0.0, end - time.monotonic())
            made = self._generate([encoded[i] for i in batch], replace(sampling, max_seconds=left), None)
            found.update(zip(batch, made, strict=True))
        return [found[i] for i in range(len(encoded))]

    def _batches(self, lengths: Sequence[int], s: Sampling) -> Iterator[list[int]]:
        """Indices of prompts to be generated together, longest first; all of a batch may grow by as many tokens."""
        alone = s.repetition_penalty != 1 or s.no_repeat_ngram_size > 0
        batch: list[int] = []
        longest = room = 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            own = self._room(lengths[i], s.max_new_tokens)
            if batch and (alone or own != room or (len(batch) + 1) * (longest + room) > _BATCH_TOKENS):
                yield batch
                batch = []
            if not batch:
                longest, room = lengths[i], own
            batch.append(i)
        if batch:
            yield batch

    def _room(self, prompt: int, wanted: int) -> int:
        """How many tokens may be written after a prompt of so many; none or fewer where it is too long."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(wanted, limit - prompt) if limit else wanted

    def check_length(self, tokens: int) -> int | None:
        """How many tokens the model reads in all. Raises UserError where a prompt leaves no room for a reply."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and tokens + 1 > limit:
            raise UserError(
                f"the prompt is {tokens} tokens long; the model reads at most {limit}", "shorten the conversation"
            )
        return limit

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], s: Sampling, streamer: _Stream | None) -> list[Reply]:
        self.model.eval()
        longest = max(map(len, prompts))
        self.check_length(longest)
        room = self._room(longest, s.max_new_tokens)
        pad = self.stop_ids[0]
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        sampled = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k} if s.temperature > 0 else {}
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=s.temperature > 0,
            eos_token_id=self.stop_ids,
            pad_token_id=pad,
            max_time=s.max_seconds,
            repetition_penalty=float(s.repetition_penalty),
            no_repeat_ngram_size=s.no_repeat_ngram_size,
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
            text=self.tokenizer.decode(kept).removeprefix(self.chat_format.template.reply_prefix),
            stopped=end is not None,
            prompt_tokens=prompt_tokens,
            reply_tokens=len(kept) + (end is not None),
            seconds=seconds,
        )


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Hands on text as soon as its bytes are whole characters."""

    def __init__(
        self, tokenizer: Tokenizer, stop_ids: Sequence[int], prefix: str, on_text: Callable[[str], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = set(stop_ids)
        self._prefix = prefix
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
        if not text.endswith("\ufffd") and not self._prefix.startswith(text):  # more of the prefix may come
            self._emit(text)

    def end(self) -> None:
        self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> None:
        text = text.removeprefix(self._prefix)
        if len(text) > len(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
