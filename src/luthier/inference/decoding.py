"""Decode several sequences together, one token each per step.

``Decoding`` is what ``inference.generation`` and ``serving.engine`` need of a way to decode. ``CompiledDecoding`` is
the one for models that the compiled layers support; a sequence's tokens are the same whatever is decoded beside it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import PretrainedConfig

from luthier.compiled import Unsuitable, report_compilation
from luthier.compiled.decoder import CompiledDecoder, NewTokens
from luthier.compiled.pages import OutOfPages, PrefixPages, Row
from luthier.devices.device import available_memory, resident_now
from luthier.errors import ModelError, UserError
from luthier.inference.sampling import Sampler
from luthier.lora.layers import LoraLinear, frozen_dtype
from luthier.models.directory import context_length, rotary_limit
from luthier.models.native_model import first_layers, verify_once
from luthier.models.protocols import CausalLM
from luthier.training.forward import relative_distance, rounding_bound
from luthier.types import Log

if TYPE_CHECKING:
    from jaxtyping import Float

MOST_ROWS = 16  # sequences decoded together
PREFIX_BYTES = 512 << 20
_VERIFIED = 24  # tokens; with more than ``quantization.FEW_ROWS``, the model's own layers dequantise their weights
_CHUNK = 256  # prompt tokens per call; a prompt can be cancelled between two calls
_TOKENS_A_ROW = 4096  # the default memory limit holds that many tokens for each of MOST_ROWS sequences
Adapters = Mapping[str, Mapping[str, LoraLinear]]


class Cancelled(Exception):
    """A sequence was cancelled while its prompt was read."""


class OutOfMemory(UserError):
    """The keys and values of a sequence do not fit into the memory limit."""


@dataclass(slots=True, eq=False)
class Reading:
    """One sequence that is read and continued. ids: prompt and reply so far; adapter: None for the base model.

    most:   tokens that it may have in the end. reused: prompt tokens whose keys and values were known.
    cancelled: asked while the prompt is read.
    """

    ids: list[int]
    adapter: str | None = None
    most: int = sys.maxsize
    reused: int = 0
    cancelled: Callable[[], bool] = lambda: False


class Decoding(Protocol):
    """A way to decode. capacity: tokens of the longest sequence that fits; None: unlimited."""

    @property
    def capacity(self) -> int | None: ...

    def admits(self, new: Reading) -> bool:
        """Whether the memory limit leaves room for one more sequence."""
        ...

    def join(self, new: Reading) -> Float[torch.Tensor, "1 vocab"]:
        """Read a prompt and add the sequence; returns its last token's logits. Raises Cancelled or UserError."""
        ...

    def step(self) -> Float[torch.Tensor, "rows vocab"]:
        """Read the last token of every sequence; returns their logits, in the order that ``rows`` then has."""
        ...

    @property
    def rows(self) -> Sequence[Reading]: ...

    def leave(self, row: Reading) -> None:
        """Remove a sequence; its keys and values are kept for others that start with the same tokens."""
        ...


class CompiledDecoding:
    """Decoding with the compiled layers.

    adapters: by name. memory: limit for keys and values in bytes; None: what ``default_memory`` says. prefix_bytes:
    how much of it earlier sequences may hold. Raises Unsuitable.
    """

    def __init__(
        self,
        model: CausalLM,
        adapters: Adapters | None = None,
        memory: int | None = None,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        adapters = adapters or {}
        self.decoder = CompiledDecoder(model, list(adapters.values()))
        self._index = {name: i for i, name in enumerate(adapters)}
        self._pages = self.decoder.pages(
            default_memory(model.config, self.decoder.token_bytes) if memory is None else memory
        )
        self._prefixes = PrefixPages(self._pages, prefix_bytes)
        self._cached: dict[Reading, Row] = {}
        self._owners: dict[Reading, Hashable] = {}  # of the keys and values in each row
        self._rotary_limit = rotary_limit(model.config)
        self._computed = 0  # tokens of the latest prompt whose keys and values were not known

    @property
    def rows(self) -> Sequence[Reading]:
        return list(self._cached)

    @property
    def capacity(self) -> int:
        return self._pages.count * self._pages.size

    def admits(self, new: Reading) -> bool:
        expected = [self._pages.pages_for(row.most) for row in (*self._cached, new)]
        return sum(expected) <= self._pages.count or not self._cached

    def join(self, new: Reading) -> Float[torch.Tensor, "1 vocab"]:
        logits = self._read(new, new.ids, len(new.ids), new.cancelled)
        new.reused = len(new.ids) - self._computed
        self._share(new)
        return logits

    def _share(self, reading: Reading) -> None:
        """Let others start with this prompt. Without a free page they must read it themselves."""
        row = self._cached[reading]
        if self._prefixes.max_bytes and self._pages.free:
            copy = self._pages.fork(row, row.length)
            self._prefixes.add(self._owners[reading], reading.ids[: row.length], copy)

    def step(self) -> Float[torch.Tensor, "rows vocab"]:
        for reading in [r for r in self._cached if len(r.ids) - 1 == self._rotary_limit]:
            # the whole sequence is rotated by other factors from this length on
            self._pages.release(self._cached[reading])
            self._read(reading, reading.ids[:-1], len(reading.ids), lambda: False)
        return self._logits(
            [NewTokens(row, r.ids[-1:], self._adapter(r), len(r.ids)) for r, row in self._cached.items()]
        )

    def leave(self, row: Reading) -> None:
        cached, owner = self._cached.pop(row), self._owners.pop(row)
        if self._prefixes.max_bytes and cached.length:
            self._prefixes.add(owner, row.ids[: cached.length], cached)
        else:
            self._pages.release(cached)

    def _adapter(self, reading: Reading) -> int | None:
        return None if reading.adapter is None else self._index[reading.adapter]

    def _read(
        self, reading: Reading, ids: Sequence[int], length: int, cancelled: Callable[[], bool]
    ) -> Float[torch.Tensor, "1 vocab"]:
        """Compute the keys and values of ``ids``, the start of a sequence of this length; returns the last logits."""
        owner = reading.adapter, self._rotary_limit is not None and length > self._rotary_limit
        row = self._prefixes.fork(owner, ids[:-1])
        self._cached[reading], self._owners[reading] = row, owner
        self._computed = len(ids) - row.length
        logits = torch.empty(0)
        try:
            for start in range(row.length, len(ids), _CHUNK):
                if cancelled():
                    raise Cancelled
                logits = self._logits([NewTokens(row, ids[start : start + _CHUNK], self._adapter(reading), length)])
        except BaseException:
            self._pages.release(row)
            del self._cached[reading], self._owners[reading]
            raise
        return logits

    def _logits(self, new: Sequence[NewTokens]) -> Float[torch.Tensor, "rows vocab"]:
        while True:
            try:
                return self.decoder.logits(self._pages, new)
            except OutOfPages:
                if not self._prefixes.drop_oldest():
                    raise OutOfMemory(
                        f"the memory for keys and values holds {self.capacity} tokens, and all of it is in use",
                        "shorten the conversation, or send fewer requests at a time",
                    ) from None


@torch.inference_mode()
def decode(
    decoding: Decoding,
    readings: Sequence[Reading],
    samplers: Sequence[Sampler],
    stop_ids: Collection[int],
    seconds: float | None = None,
    on_token: Callable[[int], None] | None = None,
) -> None:
    """Continue sequences up to a stop token, their ``most`` tokens, or the time limit, which they share.

    At most ``MOST_ROWS`` are decoded together; each gets at least one token. Raises ModelError and OutOfMemory.
    """
    start, waiting = time.perf_counter(), deque(zip(readings, samplers, strict=True))
    running: dict[Reading, Sampler] = {}

    def choose(reading: Reading, logits: Float[torch.Tensor, "1 vocab"]) -> None:
        if logits.isnan().any():
            raise ModelError("the model's output contains NaN", "use float32: --dtype float32")
        reading.ids.append(running[reading].next(logits, reading.ids))
        if on_token:
            on_token(reading.ids[-1])
        late = seconds is not None and time.perf_counter() - start >= seconds
        if reading.ids[-1] in stop_ids or len(reading.ids) >= reading.most or late:
            del running[reading]
            decoding.leave(reading)

    try:
        while waiting or running:
            while waiting and len(running) < MOST_ROWS and decoding.admits(waiting[0][0]):
                reading, sampler = waiting.popleft()
                logits = decoding.join(reading)
                running[reading] = sampler
                choose(reading, logits)
            if running:
                logits = decoding.step()
                for i, reading in enumerate(list(decoding.rows)):
                    choose(reading, logits[i : i + 1])
    finally:
        for reading in list(decoding.rows):
            decoding.leave(reading)


def not_compiled(model: CausalLM, why: str) -> str:
    """Return the note for the user of a model that is decoded without the compiled layers."""
    slower = "; replies are slower without them" if model.device.type == "cpu" else ""
    return f"note: luthier's compiled layers are not used ({why}){slower}"


def default_memory(config: PretrainedConfig, token_bytes: int) -> int:
    """Return the limit in bytes for keys and values: 16 sequences of 4096 tokens, or half of the free memory.

    At least one such sequence: memory is used only as far as it is filled. token_bytes: of one token.
    """
    longest = min(_TOKENS_A_ROW, context_length(config) or _TOKENS_A_ROW) * token_bytes
    return int(max(longest, min(MOST_ROWS * longest, (available_memory() - resident_now()) / 2)))


@torch.inference_mode()
def verified_decoding(
    model: CausalLM,
    adapters: Adapters | None = None,
    adapter: str | None = None,
    memory: int | None = None,
    prefix_bytes: int = PREFIX_BYTES,
    log: Log = lambda _: None,
) -> CompiledDecoding:
    """Build a ``CompiledDecoding`` and compare its first layers with the model's own on a few tokens.

    adapter: the one that the model's own layers compute with now. Raises Unsuitable.
    """
    report_compilation(model, {}, "the decoding of replies", log)
    layers = (adapters or {})[adapter] if adapter is not None else {}
    values = [(n, tuple(m.lora_A.shape), float(m.lora_A.sum()), float(m.lora_B.sum())) for n, m in layers.items()]
    verify_once("decoding", model, values, lambda: _verify(model, [layers] if layers else []))
    return CompiledDecoding(model, adapters, memory, prefix_bytes)


def _verify(model: CausalLM, adapters: Sequence[Mapping[str, LoraLinear]]) -> None:
    """Compare the first layers with the model's own, which compute with the adapter. Raises Unsuitable."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    most = min(_VERIFIED, rotary_limit(model.config) or _VERIFIED)
    ids = [(7 + 13 * i) % vocabulary for i in range(most)]
    with first_layers(model) as depth:
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        few = CompiledDecoder(model, adapters)
        pages, row, index = few.pages(0), Row(), 0 if adapters else None
        parts = [few.logits(pages, [NewTokens(row, ids[:-4], index)], every=True)]
        parts += [few.logits(pages, [NewTokens(row, [i], index)]) for i in ids[-4:]]
    error = relative_distance(torch.cat(parts), expected)
    if not error <= rounding_bound(frozen_dtype(model), depth):
        raise Unsuitable(f"on this machine their logits differ from those of transformers' layers by {error:.2g}")
