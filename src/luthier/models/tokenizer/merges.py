"""What the two kinds of vocabulary file have in common: merges from a ranking, added tokens at fixed ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer

from luthier.errors import ModelError


def merges_of(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to join two of ``pieces`` into a third, the best product first.

    pieces: best first (SentencePiece: highest score; tiktoken: lowest rank). Both join the neighbours whose product is
    best, the leftmost of equals; ``tokenizers`` joins the pair that stands first in its list, the leftmost of equals.
    That is the same, for only one of the ways to a product ever comes up: until a product is formed its characters have
    been joined with one another alone, so by the same steps wherever it stands. The other ways do no harm.
    """
    known = set(pieces)
    return [
        (left, right)
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if (left := piece[:cut]) in known and (right := piece[cut:]) in known
    ]


def add_tokens(tokenizer: Tokenizer, added: Mapping[int, AddedToken], where: object) -> None:
    """Add tokens at their ids; those after the vocabulary must follow it without a gap, else ModelError."""
    ordered = [added[i] for i in sorted(added)]
    tokenizer.add_tokens(ordered)
    wrong = [
        f"{t.content} is {tokenizer.token_to_id(t.content)}, not {i}"
        for i, t in sorted(added.items())
        if tokenizer.token_to_id(t.content) != i
    ]
    if wrong:
        raise ModelError(f"{where}: added tokens do not follow its vocabulary ({wrong[0]})", "download the model again")
