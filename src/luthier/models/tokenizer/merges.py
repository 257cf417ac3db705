"""Build merges from a ranking and add tokens at fixed ids, for both kinds of vocabulary file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from luthier.errors import ModelError


def merges_of(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """List every way to join two of ``pieces`` into a third, best result first.

    pieces: best first (SentencePiece: highest score; tiktoken: lowest rank).

    Both libraries join the neighbours whose result is best, and the leftmost pair of equals; ``tokenizers`` joins the
    pair that is first in its list, and the leftmost of equals. Both give the same ids: until a piece is formed, its
    characters are joined only with each other, by the same steps at every position, so that only one of the ways to
    form it is ever used. The other ways have no effect.
    """
    known = set(pieces)
    return [
        (left, right)
        for piece in pieces
        for split in range(len(piece) - 1, 0, -1)
        if (left := piece[:split]) in known and (right := piece[split:]) in known
    ]


def add_tokens(tokenizer: FastTokenizer, added: Mapping[int, AddedToken], source: object) -> None:
    """Add tokens at their ids; new ids must follow the vocabulary without a gap, otherwise raises ModelError.

    source: the file that the error names.
    """
    ordered = [added[i] for i in sorted(added)]
    tokenizer.add_tokens(ordered)
    wrong = [
        f"{t.content} is {tokenizer.token_to_id(t.content)}, not {i}"
        for i, t in sorted(added.items())
        if tokenizer.token_to_id(t.content) != i
    ]
    if wrong:
        raise ModelError(
            f"{source}: added tokens do not follow its vocabulary ({wrong[0]})", "download the model again"
        )
