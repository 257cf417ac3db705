"""Generate replies: prompts from the training template, tokens up to a stop token.

With the compiled layers where they support the model (``inference.decoding``), else with transformers' ``generate``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation.streamers import BaseStreamer

from luthier.compiled import Unsuitable
from luthier.errors import UserError
from luthier.inference.decoding import CompiledDecoding, Reading, decode, not_compiled, verified_decoding
from luthier.inference.sampling import Sampler, Sampling
from luthier.lora.layers import LoraLinear, disable_adapter
from luthier.models.chat_format import ChatFormat
from luthier.models.directory import context_length, rotary_limit
from luthier.models.protocols import CausalLM
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.types import Log, Message, Tools

if TYPE_CHECKING:
    from jaxtyping import Int

_BATCH_TOKENS = 4096  # limit on the prompt and reply tokens of one batch
_ADAPTER = "adapter"


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
    """Generates replies with a model, in the chat format that it was trained with.

    compiled: decode with the compiled layers if they support the model; ``why_not`` is the reason if they do not.
    log:      gets a note if they do not.
    """

    def __init__(
        self, model: CausalLM, chat_format: ChatFormat, compiled: bool = True, log: Log = lambda _: None
    ) -> None:
        self.model = model
        self._log = log
        self.why_not = "" if compiled else "they are switched off"
        self._decoding: CompiledDecoding | None = None
        self._state: tuple[object, ...] = ()
        self._verified = set[str | None]()  # adapters that the compiled layers were verified with
        self.chat_format = chat_format
        self.tokenizer = chat_format.tokenizer
        self.stop_ids = list(dict.fromkeys(chat_format.stop_ids))
        model.generation_config = GenerationConfig()  # ``Sampling`` decides, not defaults hidden in the model's files

    def fits(self, messages: Sequence[Message], tools: Tools = ()) -> bool:
        """Whether the prompt and at least one reply token fit into the model's context."""
        return self.room(len(self.chat_format.prompt_ids(messages, tools)), 1) >= 1

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        base: bool = False,
    ) -> Reply:
        """Generate one reply. on_text: called with each new piece of text. base: with the adapter switched off.

        Raises UserError if the prompt is too long.
        """
        prefix = self.chat_format.template.reply_prefix
        streamer = _Stream(self.tokenizer, self.stop_ids, prefix, on_text) if on_text else None
        with disable_adapter(self._adapter_layers() if base else {}):
            return self._generate([self.chat_format.prompt_ids(messages)], sampling, streamer, keep=True)[0]

    def replies(
        self, prompts: Sequence[Sequence[Message]], sampling: Sampling, tools: Sequence[Tools] = ()
    ) -> list[Reply]:
        """Generate one reply for each prompt, in order. Greedy and in fp32, each equals what ``reply`` returns.

        Without the compiled layers, prompts of similar length are batched (padded on the left, with unchanged
        positions), up to ``_BATCH_TOKENS`` tokens per batch. With a repetition setting prompts then run one by one,
        since padding would count as prompt. tools: of each prompt; empty for none at all.
        """
        encoded = [
            self.chat_format.prompt_ids(m, t) for m, t in zip(prompts, tools or [()] * len(prompts), strict=True)
        ]
        return self._generate(encoded, sampling, None, keep=False)

    def reply_ids(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Generate one reply for each prompt, both as token ids, with the stop token if there is one.

        Raises Unsuitable if the compiled layers do not support the model.
        """
        with self._compiled(False) as decoding:
            if decoding is None:
                raise Unsuitable(self.why_not)
            return self._continued(decoding, prompts, sampling)

    def _generate(
        self, prompts: list[list[int]], sampling: Sampling, streamer: _Stream | None, keep: bool
    ) -> list[Reply]:
        """Generate one reply for each prompt, in order. keep: see ``_compiled``."""
        with self._compiled(keep) as decoding:
            if decoding:
                return self._decoded(decoding, prompts, sampling, streamer)
        end = None if sampling.max_seconds is None else time.monotonic() + sampling.max_seconds
        replies: dict[int, Reply] = {}
        for batch in self._batches([len(p) for p in prompts], sampling):
            left = None if end is None else max(0.0, end - time.monotonic())
            generated = self._by_transformers(
                [prompts[i] for i in batch], replace(sampling, max_seconds=left), streamer
            )
            replies.update(zip(batch, generated, strict=True))
        return [replies[i] for i in range(len(prompts))]

    def _batches(self, lengths: Sequence[int], s: Sampling) -> Iterator[list[int]]:
        """Yield the prompt indices of each batch, longest first; the replies of a batch share one length limit.

        Conversations that may exceed the model's ``rotary_limit`` run one by one: their length decides the rotation.
        """
        alone = s.repetition_penalty != 1 or s.no_repeat_ngram_size > 0
        limit = rotary_limit(self.model.config) or math.inf
        batch: list[int] = []
        longest = room = 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            own = self.room(lengths[i], s.max_new_tokens)
            one_by_one = alone or longest + room > limit
            if batch and (one_by_one or own != room or (len(batch) + 1) * (longest + room) > _BATCH_TOKENS):
                yield batch
                batch = []
            if not batch:
                longest, room = lengths[i], own
            batch.append(i)
        if batch:
            yield batch

    def room(self, prompt: int, wanted: int) -> int:
        """Return how many tokens may follow a prompt of this length; zero or negative if the prompt is too long."""
        limit = context_length(self.model.config)
        return min(wanted, limit - prompt) if limit else wanted

    def check_length(self, tokens: int) -> int | None:
        """Return the model's context length, None if unlimited. Raises UserError if the prompt leaves no room."""
        return check_length(self.model.config, tokens)

    @contextmanager
    def _compiled(self, keep: bool) -> Iterator[CompiledDecoding | None]:
        """Yield the compiled layers, None if they do not support the model.

        keep: also for the next reply, unless a weight changes before. They hold references to the weights and a copy
        of the adapter.
        """
        self.model.eval()
        if self.why_not:
            yield None
            return
        layers = self._adapter_layers()
        state = _state(self.model, layers)
        if state != self._state:
            self._decoding = None
        if self._decoding is None:
            adapters, active = {_ADAPTER: layers} if layers else None, _active(layers)
            try:
                if self._verified & {_ADAPTER, active}:  # with the adapter, or again without it
                    self._decoding = CompiledDecoding(self.model, adapters)
                else:
                    self._decoding = verified_decoding(self.model, adapters, active, log=self._log)
                    self._verified.add(active)
            except Unsuitable as e:
                self.why_not = str(e)
                self._log(not_compiled(self.model, self.why_not))
        try:
            yield self._decoding
        finally:
            self._state = state
            if not keep:
                self._decoding = None

    def _decoded(
        self, decoding: CompiledDecoding, prompts: list[list[int]], s: Sampling, streamer: _Stream | None
    ) -> list[Reply]:
        """Generate replies with the compiled layers; several prompts are decoded together."""
        start = time.perf_counter()
        replies = self._continued(decoding, prompts, s, streamer.add if streamer else None)
        if streamer:
            streamer.end()
        seconds = time.perf_counter() - start
        return [self._reply(ids, len(p), seconds) for ids, p in zip(replies, prompts, strict=True)]

    @torch.inference_mode()
    def _continued(
        self,
        decoding: CompiledDecoding,
        prompts: Sequence[Sequence[int]],
        s: Sampling,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        adapter = _active(self._adapter_layers())
        readings = []
        for prompt in prompts:
            self.check_length(len(prompt))
            most = min(len(prompt) + self.room(len(prompt), s.max_new_tokens), decoding.capacity)
            readings.append(Reading(list(prompt), adapter, most))
        samplers = [Sampler(replace(s, seed=s.seed + i), self.model.device) for i in range(len(prompts))]
        decode(decoding, readings, samplers, self.stop_ids, s.max_seconds, on_token)
        return [r.ids[len(p) :] for r, p in zip(readings, prompts, strict=True)]

    def _adapter_layers(self) -> dict[str, LoraLinear]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, LoraLinear)}

    @torch.no_grad()
    def _by_transformers(self, prompts: list[list[int]], s: Sampling, streamer: _Stream | None) -> list[Reply]:
        """Generate the replies of one batch with transformers' ``generate``."""
        longest = max(map(len, prompts))
        self.check_length(longest)
        room = self.room(longest, s.max_new_tokens)
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


def check_length(config: PretrainedConfig, tokens: int) -> int | None:
    """Return a model's context length, None if unlimited. Raises UserError if a prompt leaves no room for a reply."""
    limit = context_length(config)
    if limit and tokens + 1 > limit:
        raise UserError(
            f"the prompt is {tokens} tokens long; the model reads at most {limit}", "shorten the conversation"
        )
    return limit


def _active(layers: Mapping[str, LoraLinear]) -> str | None:
    """Return the name of the attached adapter, None if there is none or it is switched off."""
    return _ADAPTER if any(layer.enabled for layer in layers.values()) else None


def _state(model: CausalLM, layers: Mapping[str, LoraLinear]) -> tuple[object, ...]:
    """Return what changes when any tensor of a model is replaced, or an adapter's values change."""
    places = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in model.state_dict().values())
    return *places, *(float(p.detach().sum()) for m in layers.values() for p in (m.lora_A, m.lora_B))


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
        for token in value.reshape(-1).tolist():
            self.add(token)

    def add(self, token: int) -> None:
        """Pass on one token of the reply."""
        self._ids += [token] if token not in self._stop else []
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
