"""Continuous batching: decode concurrent requests together, one token per request and step.

    submit -> waiting -> prompt computed (after a cached prefix) -> running, one row of the batch -> done
                         `-- between two steps ---------------'     `-- joins and leaves at any step

Everything is computed by the model's own forward pass, with explicit positions, explicit masks and our own cache.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache

from luthier.errors import ModelError, UserError
from luthier.inference.generation import Sampling
from luthier.models.directory import attention_windows, context_length, rotary_limit
from luthier.models.native_model import first_layers
from luthier.models.protocols import CausalLM
from luthier.serving.adapters import Routes
from luthier.serving.cache import BatchCache, Prefixes, dynamic_cache, layers_in
from luthier.serving.head import slice_head
from luthier.serving.rotary import rotate_by_row
from luthier.serving.sampler import Sampler
from luthier.training.forward import relative_distance, rounding_bound

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from luthier.serving.cache import Layers

PROMPT_TOKENS_PER_STEP = 512  # limit on new prompt tokens between two decoding steps (at least one prompt is read)


class QueueFull(UserError):
    """The maximum number of requests is already waiting."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a reply. logprob: its log probability if requested; top: the most likely tokens with theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Request:
    """One request for a reply. Both callbacks are called from the engine's thread.

    ids:      the prompt. adapter: None for the base model.
    logprobs: how many of the most likely tokens to return with each token; None: no log probabilities at all.
    on_token: called with each token, including the stop token; returning false ends the reply.
    on_end:   called with "stop" or "length" when the reply ends, or with the error that ended it. Not if cancelled.
    """

    ids: list[int]
    stop_ids: Collection[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    logprobs: int | None = None
    on_token: Callable[[Token], bool] = lambda _: True
    on_end: Callable[[str | Exception], None] = lambda _: None
    reused: int = 0  # prompt tokens whose keys and values were cached
    cancelled: bool = False

    def cancel(self) -> None:
        """Stop generating before the next step; has no effect if the reply has ended."""
        self.cancelled = True


@dataclass(slots=True, eq=False)
class _BatchRow:
    request: Request
    sampler: Sampler
    room: int  # tokens that may still be generated
    ids: list[int]  # prompt and reply; the last one is not in the cache yet


@dataclass(slots=True)
class Counts:
    """Totals since the start of the engine."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    reply_tokens: int = 0
    steps: int = 0


class Engine:
    """Generates replies to many requests with one model.

    Call ``submit`` from any thread. Call ``step`` from a single thread, or ``start`` a thread that does.

    routes:       the routes of the model's ``BankLinear`` layers, if it has any.
    max_batch:    maximum number of requests decoded together.
    max_queue:    maximum number of waiting requests.
    prefix_bytes: memory limit for cached keys and values of earlier prompts.
    """

    def __init__(
        self,
        model: CausalLM,
        routes: Routes | None = None,
        max_batch: int = 16,
        max_queue: int = 64,
        prefix_bytes: int = 512 << 20,
    ) -> None:
        self.model = model.eval()
        self.limit = context_length(model.config)
        self.counts = Counts()
        self.max_batch, self.max_queue = max_batch, max_queue
        self._routes = routes or Routes()
        self._waiting: deque[Request] = deque()
        self._rows: list[_BatchRow] = []
        self._cache = BatchCache()
        self._prefixes = Prefixes(prefix_bytes)
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._windows = attention_windows(model.config)
        self._rotary = rotate_by_row(model)
        slice_head(model)

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Add a request to the queue. Raises QueueFull.

        The prompt must leave room for at least one token (see ``Generator.check_length``).
        """
        with self._wake:
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests are already waiting", "try again in a moment")
            self._waiting.append(request)
            self._wake.notify()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="luthier-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread after the current step."""
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
        """Process waiting prompts, then decode one token for every row. Returns false if no request is left."""
        for row in [r for r in self._rows if r.request.cancelled]:
            self._remove(row)
        self._admit()
        if self._rows:
            try:
                self._decode()
            except Exception as e:  # a failed step (out of memory, for example) fails its requests, not the server
                self._rows, failed = [], self._rows
                self._cache = BatchCache()
                for row in failed:
                    row.request.on_end(e)
        return bool(self._rows or self._waiting)

    def _admit(self) -> None:
        computed = 0
        while len(self._rows) < self.max_batch and computed < PROMPT_TOKENS_PER_STEP:
            with self._wake:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
            if request.cancelled:
                continue
            try:
                computed += self._join(request)
            except Exception as e:  # as above
                request.on_end(e)

    def _join(self, request: Request) -> int:
        """Process a prompt and generate the first token; returns how many prompt tokens were computed."""
        room = request.sampling.max_new_tokens
        if self.limit:
            room = min(room, self.limit - len(request.ids))
        device = self.model.device
        row = _BatchRow(request, Sampler(request.sampling, device), room, list(request.ids))
        logits, layers, request.reused = self._prefill(request.adapter, request.ids)
        self.counts.prompt_tokens += len(request.ids)
        self.counts.reused_tokens += request.reused
        self._prefixes.keep(self._owner(request.adapter, len(request.ids)), request.ids, layers)
        if self._next_tokens([row], logits):
            self._cache.add(layers)
            self._rows.append(row)
        return len(request.ids) - request.reused

    def _owner(self, adapter: str | None, length: int) -> Hashable:
        """Return what the keys and values of a row of ``length`` tokens depend on besides its tokens."""
        return adapter, self._rotary is not None and length > self._rotary.limit

    def _prefill(
        self, adapter: str | None, ids: Sequence[int], row_length: int | None = None
    ) -> tuple[Float[Tensor, "1 vocab"], Layers, int]:
        """Return a prompt's last logits [1, vocabulary], its keys and values, and how many tokens were cached.

        row_length: of the row that the prompt is the start of, if more tokens follow that are already known.
        """
        device, row_length = self.model.device, row_length or len(ids)
        prefix = self._prefixes.longest(self._owner(adapter, row_length), ids)
        start = reused = prefix[0][0].shape[2] if prefix else 0
        cache = dynamic_cache(prefix)
        self._routes.set([adapter], device)
        logits = torch.empty(0)
        while start < len(ids):
            part = ids[start : start + PROMPT_TOKENS_PER_STEP]
            end = start + len(part)
            positions = torch.arange(start, end, device=device)[None]
            row_lengths = torch.tensor([[row_length]], device=device)
            logits = self._forward(torch.tensor([part], device=device), positions, end, cache, row_lengths)
            start = end
        return logits, layers_in(cache), reused

    def _rotate_anew(self, row: _BatchRow) -> None:
        """Compute a row's keys and values again, as transformers' ``generate`` does at this length."""
        self._remove(row)
        _, layers, _ = self._prefill(row.request.adapter, row.ids[:-1], len(row.ids))
        self._cache.add(layers)
        self._rows.append(row)

    def _decode(self) -> None:
        device = self.model.device
        for row in [r for r in self._rows if self._rotary and len(r.ids) == self._rotary.limit + 1]:
            self._rotate_anew(row)
        positions = self._cache.begin(device)
        self._routes.set([r.request.adapter for r in self._rows], device)
        ids = torch.tensor([[r.ids[-1]] for r in self._rows], device=device)
        logits = self._forward(ids, positions, int(positions.max()) + 1, self._cache)
        self._cache.end()
        self.counts.steps += 1
        rows = list(self._rows)
        unfinished = self._next_tokens(rows, logits)
        for row in rows:
            if row not in unfinished:
                self._remove(row)

    def _forward(
        self,
        ids: Int[Tensor, "rows tokens"],
        positions: Int[Tensor, "rows tokens"],
        length: int,
        cache: Cache,
        row_lengths: Int[Tensor, "rows 1"] | None = None,
    ) -> Float[Tensor, "rows vocab"]:
        """Run the model on ids and positions [rows, tokens]; returns the last tokens' logits [rows, vocabulary].

        length: number of keys, cached ones included. row_lengths: default: up to the one token of each row.
        """
        lengths = positions + 1 if row_lengths is None else row_lengths
        with self._rotary.rows_of(lengths) if self._rotary else nullcontext():
            out = self.model(
                input_ids=ids,
                attention_mask=self._mask(positions, length),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1].float()

    def _mask(
        self, positions: Int[Tensor, "rows tokens"], length: int
    ) -> Float[Tensor, "rows 1 tokens keys"] | dict[str, Float[Tensor, "rows 1 tokens keys"]]:
        """Return the mask [rows, 1, tokens, length]: 0 for visible keys, -inf elsewhere.

        If the model's layers differ, one mask per type of layer.
        """
        age = positions[:, None, :, None] - torch.arange(length, device=positions.device)

        def within(window: int | None) -> Tensor:
            visible = age >= 0 if window is None else (age >= 0) & (age < window)
            mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=visible.device)
            return mask.masked_fill_(~visible, float("-inf"))

        if isinstance(self._windows, dict):
            return {kind: within(window) for kind, window in self._windows.items()}
        return within(self._windows)

    def _next_tokens(self, rows: list[_BatchRow], logits: Float[Tensor, "rows vocab"]) -> list[_BatchRow]:
        """Choose each row's next token and pass it to ``on_token``; returns the rows that are not finished."""
        best, ids = logits.max(-1)
        most_likely, is_nan = ids.tolist(), best.isnan().tolist()
        unfinished = []
        for i, row in enumerate(rows):
            request = row.request
            if is_nan[i]:
                request.on_end(ModelError("the model's output contains NaN", "use float32: --dtype float32"))
                continue
            one = logits[i : i + 1]
            token = most_likely[i] if row.sampler.greedy else row.sampler.next(one, row.ids)
            row.ids.append(token)
            row.room -= 1
            self.counts.reply_tokens += 1
            try:
                more = request.on_token(_with_logprobs(token, one[0], request.logprobs))
            except Exception as e:  # a failing callback must not affect the other rows
                request.on_end(e)
                continue
            if not more or token in request.stop_ids:
                request.on_end("stop")
            elif row.room <= 0:
                request.on_end("length")
            else:
                unfinished.append(row)
        return unfinished

    def _remove(self, row: _BatchRow) -> None:
        """Remove a row from the batch and cache its prompt and reply, which the next prompt may start with."""
        i = self._rows.index(row)
        ids = row.ids[: self._cache.lengths[i]]
        self._prefixes.keep(self._owner(row.request.adapter, len(ids)), ids, self._cache.layers_of(i))
        self._cache.remove(i)
        self._rows[i] = self._rows[-1]
        self._rows.pop()


def verify_batching(engine: Engine, adapter: str | None = None, tokens: int = 24) -> None:
    """Verify that decoding token by token in a batch gives the same logits as one forward pass. Raises ModelError.

    It does not for models that carry state from token to token (convolutions, recurrences).
    """
    vocabulary = engine.model.config.get_text_config().vocab_size
    tokens = min(tokens, rotary_limit(engine.model.config) or tokens)
    ids = [(7 + 13 * i) % vocabulary for i in range(tokens)]
    half = tokens // 2
    try:
        with torch.inference_mode(), first_layers(engine.model) as depth:
            whole, _, _ = engine._prefill(adapter, ids)
            engine._cache.add(engine._prefill(adapter, ids[:half])[1])
            engine._cache.add(engine._prefill(adapter, ids[: half - 3])[1])
            for at in range(half, tokens):
                positions = engine._cache.begin(engine.model.device)
                engine._routes.set([adapter, adapter], engine.model.device)
                pair = torch.tensor([[ids[at]], [ids[at - 3]]], device=engine.model.device)
                stepped = engine._forward(pair, positions, at + 1, engine._cache)
                engine._cache.end()
            prompt = torch.tensor([ids], device=engine.model.device)
            expected = engine.model(input_ids=prompt, use_cache=False).logits[0, -1:]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as e:
        raise _cannot(engine.model, f"decoding a batch fails ({' '.join(str(e).split())[:120]})") from None
    finally:
        engine._cache = BatchCache()
    distance = max(relative_distance(logits, expected.float()) for logits in (whole, stepped[:1]))
    if distance > rounding_bound(engine.model.dtype, depth):
        raise _cannot(engine.model, "decoding token by token gives other results than one forward pass")


def _cannot(model: CausalLM, why: str) -> ModelError:
    return ModelError(f"models of type {model.config.model_type} cannot be served: {why}", "use luthier chat instead")


def _with_logprobs(token: int, logits: Float[Tensor, " vocab"], count: int | None) -> Token:
    if count is None:
        return Token(token)
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(count)
    return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
