"""Convert a tiktoken ``tokenizer.model`` (GLM-4) to a ``tokenizers.Tokenizer`` that gives the same ids.

Each line of the file has a base64 token and its rank. Text is split by a pattern; a part that is a token is encoded as
that token, otherwise its bytes are merged, lowest rank first (openai/tiktoken, ``src/lib.rs``).
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from luthier.errors import ModelError
from luthier.models.tokenizer.merges import add_tokens, merges_of

# GLM-4's pattern, from its published tokenizer code (the same as cl100k's).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GLM-4's added tokens, with the ids after the ranks; used if the configuration lists none.
ADDED = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)


def read(path: Path) -> dict[bytes, int]:
    """Read the rank of every token. Raises ModelError if the file is absent, damaged or of another kind."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
    except OSError as e:
        raise ModelError(f"{path}: cannot be read ({e.strerror or e})", "download the model again") from None
    except ValueError:  # includes binascii.Error
        ranks = {}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ModelError(f"{path}: is not a complete tiktoken file", "download the model again")
    return ranks


def from_ranks(
    ranks: Mapping[bytes, int], declared: Mapping[int, AddedToken], source: object = "tokenizer.model"
) -> FastTokenizer:
    """Build the tokenizer of a tiktoken vocabulary.

    ranks:    rank by token; every single byte must be a token.
    declared: added tokens by id; GLM-4's if empty.
    source:   the file that errors name. Raises ModelError if the added tokens do not follow the ranks.
    """
    letter = bytes_to_unicode()  # the visible character that represents each byte in a byte-level vocabulary
    vocab = {"".join([letter[b] for b in token]): rank for token, rank in ranks.items()}
    merges = merges_of(sorted(vocab, key=vocab.__getitem__))
    tokenizer = FastTokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    default = {len(ranks) + i: AddedToken(t, special=True, normalized=False) for i, t in enumerate(ADDED)}
    add_tokens(tokenizer, declared or default, source)
    return tokenizer
