"""Turn the tokens of one request, which arrive from the engine's thread, into text on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from luthier.inference.sampling import Sampling
from luthier.serving.models import Served
from luthier.serving.requests import ReplyEngine, Request, Token
from luthier.serving.text import ReplyText

Piece = tuple[str, list[Token]]  # new text, and its tokens if log probabilities were requested


class ReplySession:
    """One request and its reply. Create and read it on an event loop.

    ``pieces`` ends when the reply does, or raises the error that ended it.

    finish:        "stop" or "length" once the reply has ended.
    reply_tokens:  tokens generated so far, including the stop token.
    first_token_s: seconds from the request to its first token.
    """

    def __init__(
        self,
        served: Served,
        ids: list[int],
        sampling: Sampling,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        raw: bool = False,
    ) -> None:
        """raw: the prompt was not rendered with a template, so no ``reply_prefix`` is expected in the reply."""
        prefix = "" if raw else served.chat_format.template.reply_prefix
        self.text = ReplyText(served.chat_format.tokenizer, prefix, stop)
        self.finish = ""
        self.reply_tokens = 0
        self.started = time.perf_counter()
        self.first_token_s: float | None = None
        self._stop_ids = frozenset(served.chat_format.stop_ids)
        self._logprobs = logprobs is not None
        self._open: list[tuple[int, Token]] = []  # (start of its text, token) of tokens not yet in a piece
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | str | Exception] = asyncio.Queue()
        self.request = Request(
            ids, self._stop_ids, sampling, served.adapter, logprobs, on_token=self._token, on_end=self._end
        )

    def submit(self, engine: ReplyEngine) -> None:
        """Add the request to the engine's queue. Raises QueueFull."""
        engine.submit(self.request)

    async def pieces(self) -> AsyncIterator[Piece]:
        while not isinstance(event := await self._pieces.get(), str):
            if isinstance(event, Exception):
                raise event
            yield event
        self.finish = event

    async def whole(self) -> Piece:
        tokens = [t async for _, part in self.pieces() for t in part]
        return self.text.text, tokens

    def cancel(self) -> None:
        self.request.cancel()

    def _token(self, token: Token) -> bool:
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.started
        self.reply_tokens += token.count
        if token.id in self._stop_ids:
            return False
        start = self.text.length
        new = self.text.push(token.id) if token.text is None else self.text.push_text(token.text, token.id)
        if self._logprobs and token.text is None and not self.text.in_prefix:
            self._open.append((start, token))
        if new:
            self._put((new, self._covered(len(self.text.text))))
        return not self.text.ended

    def _end(self, finish: str | Exception) -> None:
        if isinstance(finish, str):
            ended = self.text.ended
            rest = self.text.end()
            if self.text.ended:  # a stop string may be complete only now
                finish = "stop"
            covered = self._covered(len(self.text.text) if self.text.ended else None)
            if rest or (covered and not ended):
                self._put((rest, covered))
        self._put(finish)

    def _covered(self, length: int | None) -> list[Token]:
        """Remove and return the open tokens whose text starts before ``length``; None: all of them."""
        covered = [token for start, token in self._open if length is None or start < length]
        self._open = self._open[len(covered) :]
        return covered

    def _put(self, event: Piece | str | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, event)
        except RuntimeError:  # the event loop has been closed
            self.cancel()
