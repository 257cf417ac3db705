"""A request for a reply, its tokens, and what the HTTP application needs of an engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from luthier.errors import UserError
from luthier.inference.sampling import Sampling


class QueueFull(UserError):
    """The maximum number of requests is already waiting."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a reply. logprob: its log probability if requested; top: the most likely tokens with theirs.

    count, text: how many tokens this is the last of, if the others are not known, and the text of all of them.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    count: int = 1
    text: str | None = None


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


@dataclass(slots=True)
class Counts:
    """Totals since the start of the engine."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    reply_tokens: int = 0
    steps: int = 0


class RequestQueue:
    """Waiting requests in the order of their arrival, without cancelled ones. Callers hold a lock.

    limit: how many may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._requests: deque[Request] = deque()

    def __len__(self) -> int:
        return sum(not request.cancelled for request in self._requests)

    def add(self, request: Request) -> None:
        """Add a request at the end. Raises QueueFull."""
        if len(self) >= self.limit:
            raise QueueFull(f"{len(self)} requests are already waiting", "try again in a moment")
        self._requests.append(request)

    def first(self) -> Request | None:
        """Return the request that has waited longest, and keep it; None if nobody waits."""
        while self._requests and self._requests[0].cancelled:
            self._requests.popleft()
        return self._requests[0] if self._requests else None

    def take(self) -> Request | None:
        """Remove and return the request that has waited longest."""
        return self._requests.popleft() if self.first() else None

    def put_back(self, request: Request) -> None:
        """Let a request that was taken wait again, before all others."""
        self._requests.appendleft(request)


class ReplyEngine(Protocol):
    """Generates replies to many requests. limit: tokens of the model's context, None if unlimited."""

    limit: int | None
    counts: Counts

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...

    def submit(self, request: Request) -> None:
        """Add a request to the queue, from any thread. Raises QueueFull."""
        ...

    def start(self) -> None: ...
    def close(self) -> None: ...
