"""Decode a reply token by token: complete characters only, without ``reply_prefix``, cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.models.tokenizer.tokenizer import Tokenizer


class ReplyText:
    """The text of a reply while it is generated.

    Call ``push`` with each token except stop tokens, then ``end``. Both return the new text that can no longer change.

    text:  all text returned so far. ended: a stop string occurred; ``text`` ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, reply_prefix: str = "", stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.ended = False
        self._tokenizer = tokenizer
        self._prefix = reply_prefix
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._raw = ""
        self._complete = True  # every token is known
        self._from, self._to = 0, 0  # the tokens at the end of _raw, as context for decoding the next ones

    def push(self, token: int) -> str:
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._from : self._to])
        after = self._tokenizer.decode(self._ids[self._from :])
        if len(after) <= len(before) or after.endswith("\ufffd"):  # the character is incomplete
            return ""
        self._raw += after[len(before) :]
        self._from, self._to = self._to, len(self._ids)
        return self._advance(last=False)

    def push_text(self, text: str, last: int) -> str:
        """Add the text of several tokens of which only the last one is known."""
        self._complete = False
        if not text:
            return ""
        self._raw += text
        self._ids.append(last)
        self._from, self._to = len(self._ids) - 1, len(self._ids)
        return self._advance(last=False)

    @property
    def length(self) -> int:
        """Number of decoded characters, including those that are held back."""
        return max(0, len(self._raw) - len(self._prefix)) if self._raw.startswith(self._prefix) else len(self._raw)

    @property
    def in_prefix(self) -> bool:
        """Whether all text so far is ``reply_prefix`` or a part of it."""
        return bool(self._raw) and self._prefix.startswith(self._raw)

    def end(self) -> str:
        full = self._tokenizer.decode(self._ids) if self._complete else ""
        if full.startswith(self._raw):
            self._raw = full
        return self._advance(last=True)

    def _advance(self, last: bool) -> str:
        if self.ended or (not last and self.in_prefix):
            return ""
        text = self._raw.removeprefix(self._prefix)
        stops = [i for s in self._stop if (i := text.find(s)) >= 0]
        if stops:
            self.ended = True
            text = text[: min(stops)]
        elif not last:
            text = text[: len(text) - self._held_back(text)]
        new = text[len(self.text) :]
        self.text = text
        return new

    def _held_back(self, text: str) -> int:
        """Return how many characters at the end may be the start of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
