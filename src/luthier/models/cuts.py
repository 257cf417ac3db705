"""Ids of many texts that share most of their parts: each distinct part is tokenised once.

    <|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nAye
    `---------------------------'`----------'`---------------------'`----------'`-----------------------'

A fast tokenizer first cuts a text at the added tokens that are matched before normalisation, leftmost first, and then
treats what lies between them on its own. So a text's ids are the ids of its parts, one after another, where each part
but the first begins with such a token, if no other added token can reach over the cut. ``_is_cut`` says which tokens
do; where none does, a text is one part. The definition is ``encode_batch`` on the whole text.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

_CHARACTERS = 1 << 22  # of remembered parts: at most about 64 MB with their ids


class Cuts:
    """``fast``: a tokenizers.Tokenizer without padding and truncation, whose added tokens do not change any more."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        first = _taken_first(fast)
        cut = [t.content for t in first if _is_cut(t, first)] if not fast.encode_special_tokens else []
        self.tokens = frozenset(cut)
        longest = sorted(cut, key=len, reverse=True)
        self._split = re.compile(f"(?={'|'.join(map(re.escape, longest))})").split if cut else lambda text: [text]
        self._known: dict[str, bytes] = {"": b""}
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text as int32, 4 bytes a token; no special tokens are added."""
        parted = [self._split(text) for text in texts]
        if self._characters > _CHARACTERS:
            self._known, self._characters = {"": b""}, 0
        known = self._known
        new = list({part: None for parts in parted for part in parts if part not in known})
        for part, encoding in zip(new, self._fast.encode_batch_fast(new, add_special_tokens=False), strict=True):
            known[part] = array("i", encoding.ids).tobytes()
            self._characters += len(part)
        return [b"".join([known[part] for part in parts]) for parts in parted]


def _taken_first(fast: Any) -> list[AddedToken]:
    """The added tokens that are matched in the text as it is: all of them where nothing is normalised."""
    added = fast.get_added_tokens_decoder().values()
    kind = json.loads(fast.normalizer.__getstate__()) if fast.normalizer else {}
    as_it_is = not kind or kind.get("normalizers") == []
    return [t for t in added if as_it_is or not t.normalized]


def _is_cut(token: AddedToken, others: Sequence[AddedToken]) -> bool:
    """Whether ``token`` is matched wherever its text stands, and what is before it cannot tell that it follows."""
    text = token.content
    if not text or token.lstrip or any(t.single_word for t in others):
        return False
    return not any(_overlap(text, t.content) for t in others)


def _overlap(a: str, b: str) -> bool:
    """Whether two tokens, or a token and itself one place further, can claim the same characters."""
    inside = a != b and (a in b or b in a)
    return inside or any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b))))
