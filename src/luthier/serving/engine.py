"""Continuous batching: requests that are there together are decoded together, one token each a step.

    submit -> waiting -> prompt read (from a kept prefix on) -> running, one row of the batch -> done
                         `-- between two steps -----------'     `-- joins and leaves at any step

The model's own forward pass computes it all, with explicit positions, explicit masks and a cache of our own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.errors import ModelError, UserError
from luthier.inference.generation import Sampling
from luthier.serving.adapters import Routes
from luthier.serving.cache import Layers, Prefixes, Rows, filled, layers_in
from luthier.serving.head import slice_head
from luthier.serving.sampler import Sampler

PROMPT_TOKENS_A_STEP = 512  # of new prompts, between two steps of those that run (at least one prompt)


class QueueFull(UserError):
    """As many requests wait as may."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a reply. logprob: its natural logarithm where asked for; top: the likeliest, with theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Request:
    """What one reply is to be, and who is told. Both functions are called from the engine's thread.

    ids:      the prompt. adapter: None for the base.
    logprobs: how many of the likeliest tokens to tell with every token; None: no log probabilities at all.
    on_token: told every token, the stop token too; false ends the reply.
    on_end:   told "stop" or "length" once it ended, or the error that ended it. Not called when cancelled.
    """

    ids: list[int]
    stop_ids: Collection[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    logprobs: int | None = None
    on_token: Callable[[Token], bool] = lambda _: True
    on_end: Callable[[str | Exception], None] = lambda _: None
    reused: int = 0  # prompt tokens whose keys and values were there already
    cancelled: bool = False

    def cancel(self) -> None:
        """Stop its work before the next step; harmless when it ended."""
        self.cancelled = True


@dataclass(slots=True, eq=False)
class _Row:
    request: Request
    sampler: Sampler
    room: int  # tokens that may still be written
    said: list[int]  # prompt and reply; the last one is not in the cache yet


@dataclass(slots=True)
class Counts:
    """Since the start."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    reply_tokens: int = 0
    steps: int = 0


class Engine:
    """Runs one model for many. ``submit`` from any thread; ``step`` from one, or ``start`` a thread that steps.

    routes:       of the model's ``BankLinear`` layers, where it has some.
    max_batch:    rows that run together. max_queue: requests that may wait for one.
    prefix_bytes: memory for keys and values of prompts that may come again.
    """

    def __init__(
        self,
        model: Any,
        routes: Routes | None = None,
        max_batch: int = 16,
        max_queue: int = 64,
        prefix_bytes: int = 512 << 20,
    ) -> None:
        self.model = model.eval()
        self.limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.counts = Counts()
        self.max_batch, self.max_queue = max_batch, max_queue
        self._routes = routes or Routes()
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        self._cache = Rows()
        self._prefixes = Prefixes(prefix_bytes)
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._windows = _windows(model.config.get_text_config())
        slice_head(model)

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Raises QueueFull. The prompt must leave room for a token (``Generator.check_length``)."""
        with self._wake:
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already", "try again in a moment")
            self._waiting.append(request)
            self._wake.notify()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="luthier-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the step in progress."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._waiting or self._rows):
                    self._wake.wait()
                if self._closed:
                    return
            self.step()

    @torch.inference_mode()
    def step(self) -> bool:
        """Read prompts that wait, then one token for every row. False when there is nothing left to do."""
        for row in [r for r in self._rows if r.request.cancelled]:
            self._leave(row)
        self._admit()
        if self._rows:
            try:
                self._decode()
            except Exception as e:  # what fails a step (no memory, say) fails those in it, not the server
                self._rows, failed = [], self._rows
                self._cache = Rows()
                for row in failed:
                    row.request.on_end(e)
        return bool(self._rows or self._waiting)

    def _admit(self) -> None:
        read = 0
        while len(self._rows) < self.max_batch and read < PROMPT_TOKENS_A_STEP:
            with self._wake:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
            if request.cancelled:
                continue
            try:
                read += self._join(request)
            except Exception as e:  # as above
                request.on_end(e)

    def _join(self, request: Request) -> int:
        """Read its prompt and write its first token; returns how many tokens were computed."""
        room = request.sampling.max_new_tokens
        if self.limit:
            room = min(room, self.limit - len(request.ids))
        device = self.model.device
        row = _Row(request, Sampler(request.sampling, device), room, list(request.ids))
        logits, layers, request.reused = self._read(request.adapter, request.ids)
        self.counts.prompt_tokens += len(request.ids)
        self.counts.reused_tokens += request.reused
        self._prefixes.keep(request.adapter, request.ids, layers)
        if self._write([row], logits):
            self._cache.add(layers)
            self._rows.append(row)
        return len(request.ids) - request.reused

    def _read(self, adapter: str | None, ids: Sequence[int]) -> tuple[Tensor, Layers, int]:
        """A prompt's last logits [1, vocabulary], its keys and values, and how many of them were kept ones."""
        device = self.model.device
        kept = self._prefixes.longest(adapter, ids)
        start = reused = kept[0][0].shape[2] if kept else 0
        cache = filled(kept)
        self._routes.set([adapter], device)
        logits = torch.empty(0)
        while start < len(ids):
            part = ids[start : start + PROMPT_TOKENS_A_STEP]
            end = start + len(part)
            positions = torch.arange(start, end, device=device)[None]
            logits = self._forward(torch.tensor([part], device=device), positions, end, cache)
            start = end
        return logits, layers_in(cache), reused

    def _decode(self) -> None:
        device = self.model.device
        positions = self._cache.begin(device)
        self._routes.set([r.request.adapter for r in self._rows], device)
        ids = torch.tensor([[r.said[-1]] for r in self._rows], device=device)
        logits = self._forward(ids, positions, int(positions.max()) + 1, self._cache)
        self._cache.end()
        self.counts.steps += 1
        rows = list(self._rows)
        going = self._write(rows, logits)
        for row in rows:
            if row not in going:
                self._leave(row)

    def _forward(self, ids: Tensor, positions: Tensor, length: int, cache: Any) -> Tensor:
        """ids, positions [rows, tokens]; length: of the keys. Returns the last tokens' logits [rows, vocabulary]."""
        out = self.model(
            input_ids=ids,
            attention_mask=self._mask(positions, length),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits.float()

    def _mask(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """[rows, 1, tokens, length]: 0 where visible, -inf elsewhere; by kind where a model's layers differ."""
        age = positions[:, None, :, None] - torch.arange(length, device=positions.device)

        def within(window: int | None) -> Tensor:
            seen = age >= 0 if window is None else (age >= 0) & (age < window)
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
            return mask.masked_fill_(~seen, float("-inf"))

        if isinstance(self._windows, dict):
            return {kind: within(window) for kind, window in self._windows.items()}
        return within(self._windows)

    def _write(self, rows: list[_Row], logits: Tensor) -> list[_Row]:
        """Choose each row's next token and tell it; returns the rows that go on."""
        best, ids = logits.max(-1)
        likeliest, broken = ids.tolist(), best.isnan().tolist()
        going = []
        for i, row in enumerate(rows):
            request = row.request
            if broken[i]:
                request.on_end(ModelError("the model's values are not numbers", "use float32: --dtype float32"))
                continue
            one = logits[i : i + 1]
            token = likeliest[i] if row.sampler.plain else row.sampler.next(one, row.said)
            row.said.append(token)
            row.room -= 1
            self.counts.reply_tokens += 1
            try:
                more = request.on_token(_told(token, one[0], request.logprobs))
            except Exception as e:  # its listener's fault, not its neighbours'
                request.on_end(e)
                continue
            if not more or token in request.stop_ids:
                request.on_end("stop")
            elif row.room <= 0:
                request.on_end("length")
            else:
                going.append(row)
        return going

    def _leave(self, row: _Row) -> None:
        """Take a row out of the batch; what it read and wrote may be the start of the next prompt."""
        i = self._rows.index(row)
        self._prefixes.keep(row.request.adapter, row.said[: self._cache.lengths[i]], self._cache.layers_of(i))
        self._cache.remove(i)
        self._rows[i] = self._rows[-1]
        self._rows.pop()


def prove(engine: Engine, adapter: str | None = None, tokens: int = 24) -> None:
    """Prove that this model computes the same token by token in a batch as at once. Raises ModelError.

    Models that carry state from token to token (convolutions, recurrences) would not.
    """
    vocabulary = engine.model.config.get_text_config().vocab_size
    ids = [(7 + 13 * i) % vocabulary for i in range(tokens)]
    half = tokens // 2
    try:
        with torch.inference_mode():
            whole, _, _ = engine._read(adapter, ids)
            engine._cache.add(engine._read(adapter, ids[:half])[1])
            engine._cache.add(engine._read(adapter, ids[: half - 3])[1])
            for at in range(half, tokens):
                positions = engine._cache.begin(engine.model.device)
                engine._routes.set([adapter, adapter], engine.model.device)
                pair = torch.tensor([[ids[at]], [ids[at - 3]]], device=engine.model.device)
                stepped = engine._forward(pair, positions, at + 1, engine._cache)
                engine._cache.end()
            everything = torch.tensor([ids], device=engine.model.device)
            plain = engine.model(input_ids=everything, use_cache=False).logits[0, -1:]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as e:
        raise _cannot(engine.model, f"a batch fails in it ({' '.join(str(e).split())[:120]})") from None
    finally:
        engine._cache = Rows()
    allowed = 1e-3 if engine.model.dtype is torch.float32 else 0.2
    if max(_apart(whole, plain), _apart(stepped[:1], plain)) > allowed:
        raise _cannot(engine.model, "token by token it computes something else than at once")


def _cannot(model: Any, why: str) -> ModelError:
    return ModelError(f"models of type {model.config.model_type} cannot be served: {why}", "use luthier chat instead")


def _apart(a: Tensor, b: Tensor) -> float:
    b = b.float()
    return float((a - b).norm() / (b - b.mean()).norm().clamp_min(1e-30))


def _windows(config: Any) -> int | dict[str, int | None] | None:
    """How far back layers see: all alike, or by the kind of layer as the configuration names them."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return window
    if "sliding_attention" not in kinds:
        return None
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _told(token: int, logits: Tensor, count: int | None) -> Token:
    if count is None:
        return Token(token)
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(count)
    return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
