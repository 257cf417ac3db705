"""Continuous batching: decode concurrent requests together, one token per request and step.

    submit -> waiting -> prompt computed (after a cached prefix) -> running, one row of the batch -> done
                         `-- between two steps ---------------'     `-- joins and leaves at any step

The compiled layers compute the tokens, or the model's own forward pass if they do not support the model.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.compiled import Unsuitable
from luthier.errors import ModelError
from luthier.inference.decoding import (
    MOST_ROWS,
    PREFIX_BYTES,
    Cancelled,
    Decoding,
    OutOfMemory,
    Reading,
    not_compiled,
    verified_decoding,
)
from luthier.inference.sampling import Sampler
from luthier.models.directory import context_length
from luthier.models.protocols import CausalLM
from luthier.serving.adapters import Routes
from luthier.serving.general import GeneralDecoding
from luthier.serving.requests import Counts, Request, RequestQueue, Token
from luthier.types import Log

if TYPE_CHECKING:
    from jaxtyping import Float

PROMPT_TOKENS_PER_STEP = 512  # limit on new prompt tokens between two decoding steps (at least one prompt is read)


@dataclass(slots=True, eq=False)
class _BatchRow:
    request: Request
    sampler: Sampler
    reading: Reading


class Engine:
    """Generates replies to many requests with one model.

    Call ``submit`` from any thread. Call ``step`` from a single thread, or ``start`` a thread that does.

    routes:       the routes of the model's ``BankLinear`` layers, if it has any.
    max_batch:    maximum number of requests decoded together.
    max_queue:    maximum number of waiting requests.
    memory:       limit for keys and values in bytes; None: ``inference.decoding.default_memory``.
    prefix_bytes: how much of it those of earlier prompts may take.
    compiled:     decode with the compiled layers if they support the model; ``why_not`` is the reason if they do not.
    log:          gets a note if they do not.
    """

    def __init__(
        self,
        model: CausalLM,
        routes: Routes | None = None,
        max_batch: int = MOST_ROWS,
        max_queue: int = 64,
        memory: int | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        compiled: bool = True,
        log: Log = lambda _: None,
    ) -> None:
        self.model = model.eval()
        self.limit = context_length(model.config)
        self.counts = Counts()
        self.max_batch = max_batch
        self.why_not = "" if compiled else "they are switched off"
        self._log = log
        self._routes = routes or Routes()
        self._memory, self._prefix_bytes = memory, prefix_bytes
        self._waiting = RequestQueue(max_queue)
        self._rows: dict[Reading, _BatchRow] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.decoding = self._open()

    def _open(self) -> Decoding:
        """Return an empty batch: with the compiled layers, or with the model's own."""
        if not self.why_not:
            try:
                adapters, memory = self._routes.adapters, self._memory
                first = next(iter(adapters), None)  # verified together with the base model's layers
                self._routes.set([first], self.model.device)
                return verified_decoding(self.model, adapters, first, memory, self._prefix_bytes, self._log)
            except Unsuitable as e:
                self.why_not = str(e)
                self._log(not_compiled(self.model, self.why_not))
        return GeneralDecoding(self.model, self._routes, self._memory, self._prefix_bytes)

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
            self._waiting.add(request)
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
        try:
            for row in [r for r in self._rows.values() if r.request.cancelled]:
                self._remove(row)
            self._admit()
            if self._rows:
                self._decode()
        except Exception as e:  # a failed step (out of memory, for example) fails its requests, not the server
            failed, self._rows = list(self._rows.values()), {}
            for row in failed:
                row.request.on_end(e)
            try:
                for reading in self.decoding.rows:
                    self.decoding.leave(reading)
            except Exception:
                self.decoding = self._open()
        return bool(self._rows or self._waiting)

    def _admit(self) -> None:
        computed = 0
        while len(self._rows) < self.max_batch and computed < PROMPT_TOKENS_PER_STEP:
            with self._wake:
                request = self._waiting.take()
            if request is None:
                return
            try:
                row = self._new_row(request)
                if not self.decoding.admits(row.reading):
                    with self._wake:
                        self._waiting.put_back(request)
                    return
                computed += self._join(row)
            except Cancelled:
                continue
            except Exception as e:  # a failed prompt (out of memory, for example) fails its request, not the server
                request.on_end(e)

    def _new_row(self, request: Request) -> _BatchRow:
        wanted = len(request.ids) + request.sampling.max_new_tokens
        capacity = self.decoding.capacity
        if capacity is not None and len(request.ids) >= capacity:
            raise OutOfMemory(
                f"the prompt has {len(request.ids)} tokens; the memory for keys and values holds {capacity}",
                "start the server with a larger --memory, or shorten the conversation",
            )
        most = min(n for n in (wanted, self.limit, capacity) if n is not None)
        reading = Reading(list(request.ids), request.adapter, most, cancelled=lambda: request.cancelled)
        return _BatchRow(request, Sampler(request.sampling, self.model.device), reading)

    def _join(self, row: _BatchRow) -> int:
        """Read a prompt and generate the first token; returns how many prompt tokens were computed."""
        request, reading = row.request, row.reading
        logits = self.decoding.join(reading)
        self._rows[reading] = row
        request.reused = reading.reused
        self.counts.prompt_tokens += len(request.ids)
        self.counts.reused_tokens += reading.reused
        self._next_tokens([row], logits)
        return len(request.ids) - request.reused

    def _decode(self) -> None:
        logits = self.decoding.step()
        self.counts.steps += 1
        self._next_tokens([self._rows[reading] for reading in self.decoding.rows], logits)

    def _next_tokens(self, rows: list[_BatchRow], logits: Float[Tensor, "rows vocab"]) -> None:
        """Choose each row's next token and pass it to ``on_token``; remove the rows that are finished."""
        best, ids = logits.max(-1)
        most_likely, is_nan = ids.tolist(), best.isnan().tolist()
        for i, row in enumerate(rows):
            request, reading = row.request, row.reading
            if is_nan[i]:
                self._end(row, ModelError("the model's output contains NaN", "use float32: --dtype float32"))
                continue
            one = logits[i : i + 1]
            try:
                token = most_likely[i] if row.sampler.greedy else row.sampler.next(one, reading.ids)
                reading.ids.append(token)
                self.counts.reply_tokens += 1
                more = request.on_token(_with_logprobs(token, one[0], request.logprobs))
            except Exception as e:  # extreme settings or a failing callback must not affect the other rows
                self._end(row, e)
                continue
            if not more or token in request.stop_ids:
                self._end(row, "stop")
            elif len(reading.ids) >= reading.most:
                self._end(row, "length")

    def _end(self, row: _BatchRow, how: str | Exception) -> None:
        try:
            self._remove(row)
        finally:
            row.request.on_end(how)

    def _remove(self, row: _BatchRow) -> None:
        del self._rows[row.reading]
        self.decoding.leave(row.reading)


def _with_logprobs(token: int, logits: Float[Tensor, " vocab"], count: int | None) -> Token:
    if count is None:
        return Token(token)
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(count)
    return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
