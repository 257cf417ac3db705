"""A tiktoken ``tokenizer.model`` (GLM-4) as a ``tokenizers.Tokenizer`` that gives the same ids.

The file holds a token in base64 and its rank on each line. Text is cut by a pattern; a cut that is a token is that one,
else its bytes are joined, the lowest rank first (openai/tiktoken, ``src/lib.rs``).
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from luthier.errors import ModelError
from luthier.models.tokenizer.merges import add_tokens, merges_of

# GLM-4's, from its published tokenizer code (the pattern is cl100k's).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GLM-4's, which follow the ranks where the configuration lists none.
ADDED = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)


def read(path: Path) -> dict[bytes, int]:
    """Ranks by token. Raises ModelError where the file is absent, damaged or of another kind."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
    except OSError as e:
        raise ModelError(f"{path}: cannot be read ({e.strerror or e})", "download the model again") from None
    except ValueError:  # binascii.Error is one
        ranks = {}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ModelError(f"{path}: is not a whole tiktoken file", "download the model again")
    return ranks


def from_ranks(
    ranks: Mapping[bytes, int], declared: Mapping[int, AddedToken], where: object = "tokenizer.model"
) -> Tokenizer:
    """The tokenizer of ``ranks`` (every single byte among them). declared: added tokens by id; GLM-4's where empty."""
    letter = bytes_to_unicode()  # the visible character that stands for a byte in a byte-level vocabulary
    vocab = {"".join([letter[b] for b in token]): rank for token, rank in ranks.items()}
    merges = merges_of(sorted(vocab, key=vocab.__getitem__))
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    default = {len(ranks) + i: AddedToken(t, special=True, normalized=False) for i, t in enumerate(ADDED)}
    add_tokens(tokenizer, declared or default, where)
    return tokenizer
