"""One request on its way: tokens from the engine's thread become text on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from luthier.inference.generation import Sampling
from luthier.serving.engine import Engine, Request, Token
from luthier.serving.models import Served
from luthier.serving.text import ReplyText

Piece = tuple[str, list[Token]]  # new text, and its tokens where log probabilities were asked for


class Session:
    """Made and read on an event loop. ``pieces`` ends with the reply, or raises what ended it.

    finish: "stop" or "length" then. reply_tokens: the stop token counts.
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
        """raw: nothing was rendered, so the template's ``reply_prefix`` is not expected either."""
        prefix = "" if raw else served.generator.chat_format.template.reply_prefix
        self.text = ReplyText(served.generator.tokenizer, prefix, stop)
        self.finish = ""
        self.reply_tokens = 0
        self.started = time.perf_counter()
        self.first_token_s: float | None = None
        self._stop_ids = frozenset(served.generator.stop_ids)
        self._logprobs = logprobs is not None
        self._open: list[tuple[int, Token]] = []  # where its text begins; not yet in a piece
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | str | Exception] = asyncio.Queue()
        self.request = Request(
            ids, self._stop_ids, sampling, served.adapter, logprobs, on_token=self._token, on_end=self._end
        )

    def submit(self, engine: Engine) -> None:
        """Raises QueueFull."""
        engine.submit(self.request)

    async def pieces(self) -> AsyncIterator[Piece]:
        while not isinstance(found := await self._pieces.get(), str):
            if isinstance(found, Exception):
                raise found
            yield found
        self.finish = found

    async def whole(self) -> Piece:
        tokens = [t async for _, part in self.pieces() for t in part]
        return self.text.text, tokens

    def cancel(self) -> None:
        self.request.cancel()

    def _token(self, token: Token) -> bool:
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.started
        self.reply_tokens += 1
        if token.id in self._stop_ids:
            return False
        begins = self.text.length
        new = self.text.push(token.id)
        if self._logprobs and not self.text.opening:
            self._open.append((begins, token))
        if new:
            self._put((new, self._covered(len(self.text.text))))
        return not self.text.ended

    def _end(self, how: str | Exception) -> None:
        if isinstance(how, str):
            ended = self.text.ended
            rest = self.text.end()
            if self.text.ended:  # also where the end made a stop string certain
                how = "stop"
            covered = self._covered(len(self.text.text) if self.text.ended else None)
            if rest or (covered and not ended):
                self._put((rest, covered))
        self._put(how)

    def _covered(self, length: int | None) -> list[Token]:
        """Tokens whose text begins before ``length``; None: all."""
        here = [t for at, t in self._open if length is None or at < length]
        self._open = self._open[len(here) :]
        return here

    def _put(self, what: Piece | str | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, what)
        except RuntimeError:  # the server has stopped meanwhile
            self.cancel()
