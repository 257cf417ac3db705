"""Generate replies: prompts from the training template, tokens from transformers' ``generate``, up to a stop token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from luthier.config import GenerationSettings
from luthier.errors import ConfigError, UserError
from luthier.models.chat_format import ChatFormat
from luthier.models.directory import context_length, rotary_limit
from luthier.models.protocols import CausalLM
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.types import Message

if TYPE_CHECKING:
    from jaxtyping import Int

_BATCH_TOKENS = 4096  # limit on the prompt and reply tokens of one batch
_NEUTRAL: dict[str, float] = {"top_p": 1.0, "top_k": 0}  # used only when sampling; these values have no effect


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are sampled. temperature 0: always the most likely token (reproducible).

    max_seconds: time limit; unfinished replies are cut off. Several replies share it.
    repetition_penalty, no_repeat_ngram_size: as in transformers, over the tokens of prompt and reply; 1 and 0: off.
    Raises ConfigError if a setting would be ignored.
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
        greedy = self.temperature == 0
        unused = [k for k, neutral in _NEUTRAL.items() if getattr(self, k) != neutral]
        if greedy and unused:
            raise ConfigError(
                f"{' and '.join(unused)} would be ignored: temperature 0 always picks the most likely token",
                f"set a temperature too (--temperature 0.7), or leave {' and '.join(unused)} out",
            )
        if not greedy and self.top_k == 1:
            raise ConfigError(
                "the temperature would be ignored: top_k 1 allows only the most likely token",
                "use temperature 0 (--temperature 0), which picks the most likely token, without top_k",
            )

    @classmethod
    def of(cls, chosen: GenerationSettings, seed: int = 0) -> Self:
        """Convert the generation settings of a run."""
        sampled = {k: getattr(chosen, k) for k in _NEUTRAL} if chosen.do_sample else {}
        return cls(
            max_new_tokens=chosen.max_new_tokens,
            temperature=chosen.temperature if chosen.do_sample else 0.0,
            seed=seed,
            repetition_penalty=chosen.repetition_penalty,
            no_repeat_ngram_size=chosen.no_repeat_ngram_size,
            **sampled,
        )

    def changed(self, **changes: float | None) -> Self:
        """Return a copy with these fields replaced; None keeps a field. Temperature 0 resets top_p and top_k.

        Raises ConfigError if a setting would be ignored.
        """
        values = asdict(self)
        if changes.get("temperature") == 0:
            values.update(_NEUTRAL)
        values.update({k: v for k, v in changes.items() if v is not None})
        return type(self)(**values)


@dataclass(frozen=True, slots=True)
class Reply:
    """A generated reply.

    text:         without the stop token and the template's ``reply_prefix``.
    stopped:      it ended with a stop token, and was not cut off by ``max_new_tokens`` or ``max_seconds``.
    reply_tokens: includes the stop token. seconds: time for the whole batch that the reply was generated in.
    """

    text: str
    stopped: bool
    prompt_tokens: int
    reply_tokens: int
    seconds: float


class Generator:
    """Generates replies with a model, in the chat format that it was trained with."""

    def __init__(self, model: CausalLM, chat_format: ChatFormat) -> None:
        self.model = model
        self.chat_format = chat_format
        self.tokenizer = chat_format.tokenizer
        self.stop_ids = list(dict.fromkeys(chat_format.stop_ids))
        model.generation_config = GenerationConfig()  # ``Sampling`` decides, not defaults hidden in the model's files

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the prompt and at least one reply token fit into the model's context."""
        return self._room(len(self.chat_format.prompt_ids(messages)), 1) >= 1

    def reply(
        self, messages: Sequence[Message], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """Generate one reply. on_text: called with each new piece of text.

        Raises UserError if the prompt is too long.
        """
        prefix = self.chat_format.template.reply_prefix
        streamer = _Stream(self.tokenizer, self.stop_ids, prefix, on_text) if on_text else None
        return self._generate([self.chat_format.prompt_ids(messages)], sampling, streamer)[0]

    def replies(self, prompts: Sequence[Sequence[Message]], sampling: Sampling) -> list[Reply]:
        """Generate one reply for each prompt, in order. Greedy and in fp32, each equals what ``reply`` returns.

        Prompts of similar length are batched (padded on the left, with unchanged positions), up to ``_BATCH_TOKENS``
        tokens per batch. With a repetition setting prompts run one by one, since padding would count as prompt.
        """
        encoded = [self.chat_format.prompt_ids(m) for m in prompts]
        end = None if sampling.max_seconds is None else time.monotonic() + sampling.max_seconds
        replies: dict[int, Reply] = {}
        for batch in self._batches([len(p) for p in encoded], sampling):
            left = None if end is None else max(0.0, end - time.monotonic())
            generated = self._generate([encoded[i] for i in batch], replace(sampling, max_seconds=left), None)
            replies.update(zip(batch, generated, strict=True))
        return [replies[i] for i in range(len(encoded))]

    def _batches(self, lengths: Sequence[int], s: Sampling) -> Iterator[list[int]]:
        """Yield the prompt indices of each batch, longest first; the replies of a batch share one length limit.

        Conversations that may exceed the model's ``rotary_limit`` run one by one: their length decides the rotation.
        """
        alone = s.repetition_penalty != 1 or s.no_repeat_ngram_size > 0
        limit = rotary_limit(self.model.config) or math.inf
        batch: list[int] = []
        longest = room = 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            own = self._room(lengths[i], s.max_new_tokens)
            one_by_one = alone or longest + room > limit
            if batch and (one_by_one or own != room or (len(batch) + 1) * (longest + room) > _BATCH_TOKENS):
                yield batch
                batch = []
            if not batch:
                longest, room = lengths[i], own
            batch.append(i)
        if batch:
            yield batch

    def _room(self, prompt: int, wanted: int) -> int:
        """Return how many tokens may follow a prompt of this length; zero or negative if the prompt is too long."""
        limit = context_length(self.model.config)
        return min(wanted, limit - prompt) if limit else wanted

    def check_length(self, tokens: int) -> int | None:
        """Return the model's context length, None if unlimited. Raises UserError if the prompt leaves no room."""
        limit = context_length(self.model.config)
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
        reply_ids = ids if end is None else ids[:end]
        return Reply(
            text=self.tokenizer.decode(reply_ids).removeprefix(self.chat_format.template.reply_prefix),
            stopped=end is not None,
            prompt_tokens=prompt_tokens,
            reply_tokens=len(reply_ids) + (end is not None),
            seconds=seconds,
        )


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Passes on text as soon as its bytes form complete characters."""

    def __init__(
        self, tokenizer: Tokenizer, stop_ids: Sequence[int], prefix: str, on_text: Callable[[str], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = set(stop_ids)
        self._prefix = prefix
        self._on_text = on_text
        self._ids: list[int] = []
        self._emitted = ""
        self._prompt = True

    def put(self, value: Int[torch.Tensor, " ..."]) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._ids += [t for t in value.reshape(-1).tolist() if t not in self._stop]
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd") and not self._prefix.startswith(text):  # the prefix may be incomplete
            self._emit(text)

    def end(self) -> None:
        self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> None:
        text = text.removeprefix(self._prefix)
        if len(text) > len(self._emitted):
            self._on_text(text[len(self._emitted) :])
            self._emitted = text
