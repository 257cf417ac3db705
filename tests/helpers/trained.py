"""Train small vocabularies with SentencePiece and in tiktoken's format; texts to compare tokenizers on."""

from __future__ import annotations

import base64
import io
import unicodedata
from functools import cache
from typing import Any

from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

CORPUS = [
    "The quick brown fox jumps over the lazy dog, then sleeps. It didn't; they'll say it's 1234567 reasons.",
    "    def tune(strings):\n        return  [s  for  s in strings]\n\n\n",
    "小姐，别的秀女都在求中选，唯有咱们小姐想被撂牌子。嘘——都说许愿说破是不灵的。",
    "中国人民银行在北京。国人、人民、中国，哈哈哈哈哈哈！",
    "==== ---- abababab -=-=-=- 🦙🎻 café naïve Ünïcödé\ttabs\t\tand\r\nlines",
]
CASES = [
    *CORPUS,
    *(
        "",
        " ",
        "  ",
        "\n",
        "\n\n \n",
        "a",
        " a",
        "a ",
        "  a  b  ",
        "▁",
        "▁a▁",
        "<0x41>",
        "<unk>",
        "½ Ⅷ ｆｕｌｌ",
        "𠮷野家 🏴󠁧󠁢󠁥󠁮󠁧󠁿 👩‍👩‍👧",
    ),
    *("<sep>", "a<sep>b", "<sep> <sep>a", "::::", "a:::b", " <sep>", "<sep", "x1y22z333", "\u3000\xa0", "\x00\x7f"),
    *(unit * n for unit in ("=", "-=", "aba", "哈", " ", "\n", "▁", ":") for n in (2, 3, 5, 7, 8, 17, 33)),
]
PARTS = [*"ab =-:1。中国人哈é🦙\n▁", "the", "  ", "<sep>", "::", "银行", "��", "aba", "ſ", "'LL", "\r\n"]


def assigned(c: str) -> bool:
    """Whether a character is assigned in every Unicode table that the tokenizers use."""
    return unicodedata.category(c) not in ("Cn", "Cs")


TEXT = st.lists(st.one_of(st.sampled_from(PARTS), st.characters().filter(assigned)), max_size=24).map("".join)


def train(**options: Any) -> Any:
    """Train a small SentencePiece BPE model and return its ModelProto."""
    buffer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=buffer,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "vocab_size": 700,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "user_defined_symbols": ["<sep>", "::", ":::", "\n", "7"],
            "control_symbols": ["<|ctl|>"],
            "max_sentencepiece_length": 12,
            "hard_vocab_limit": False,
            **options,
        },
    )
    return pb.ModelProto.FromString(buffer.getvalue())


@cache
def ranks() -> dict[bytes, int]:
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    byte = {letter: b for b, letter in bytes_to_unicode().items()}
    return {bytes(byte[c] for c in token): rank for token, rank in fast.get_vocab().items()}


def written(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in sorted(ranks.items(), key=lambda x: x[1]))
