"""A reply's text while it is written: whole characters only, no ``reply_prefix``, ended before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.models.tokenizer.tokenizer import Tokenizer


class ReplyText:
    """push() every token that is no stop token, then end(). Both return the text that is certain and new.

    ended: a stop string was found; ``text`` ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, reply_prefix: str = "", stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.ended = False
        self._tokenizer = tokenizer
        self._prefix = reply_prefix
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._raw = ""
        self._from, self._to = 0, 0  # tokens whose text stands at the end of _raw: where decoding goes on from

    def push(self, token: int) -> str:
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._from : self._to])
        after = self._tokenizer.decode(self._ids[self._from :])
        if len(after) <= len(before) or after.endswith("\ufffd"):  # the character's other bytes are still to come
            return ""
        self._raw += after[len(before) :]
        self._from, self._to = self._to, len(self._ids)
        return self._shown(last=False)

    @property
    def length(self) -> int:
        """Characters that are known, those that are held back too."""
        return max(0, len(self._raw) - len(self._prefix)) if self._raw.startswith(self._prefix) else len(self._raw)

    @property
    def opening(self) -> bool:
        """All that was written so far is ``reply_prefix``, or may become it."""
        return bool(self._raw) and self._prefix.startswith(self._raw)

    def end(self) -> str:
        whole = self._tokenizer.decode(self._ids)
        if whole.startswith(self._raw):
            self._raw = whole
        return self._shown(last=True)

    def _shown(self, last: bool) -> str:
        if self.ended or (not last and self.opening):
            return ""
        text = self._raw.removeprefix(self._prefix)
        at = [i for s in self._stop if (i := text.find(s)) >= 0]
        if at:
            self.ended = True
            text = text[: min(at)]
        elif not last:
            text = text[: len(text) - self._held(text)]
        new = text[len(self.text) :]
        self.text = text
        return new

    def _held(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
