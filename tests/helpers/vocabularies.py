"""Make tiny vocabularies in the published formats: SentencePiece models, GLM-4's rank file, tokenizer.json.

Trained once per process on the shipped personas. Markers and line breaks have the ids of the published vocabularies if
those are below 704.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from luthier import personas

SIZE = 704  # of every config.json; byte-level vocabularies are padded to it, like the published ones

GLM4_SPECIAL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
]
# from tokenization_chatglm.py of the original repository; the rank file does not contain it
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4_RANKS = 640  # 256 bytes in GPT-2's order ("\n" is 198) and the merges; the special tokens follow

DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEPSEEK_RANKS = 640
DEEPSEEK_OTHER = "øöúÿõ÷ûýÀùÁþü"  # never occur in UTF-8: not in the vocabulary; added, not special

PHI3_BASE = 640  # pieces of tokenizer.model, 32000 as published
PHI3_ADDED = [
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]

YI_SPECIAL = ["<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]  # ids 3 to 8


@cache
def corpus() -> tuple[str, ...]:
    """Return English sentences, and Chinese ones with so few characters that a tiny vocabulary covers most."""
    rows = [json.loads(line) for line in personas.TRAIN.read_text(encoding="utf-8").splitlines()[:60]]
    chinese = [json.loads(line) for line in personas.TEAHOUSE.read_text(encoding="utf-8").splitlines()[:4]]
    return tuple(text for row in rows + chinese * 15 for text in row.values() if text)


@cache
def _sentencepiece(
    size: int, dummy_prefix: bool, symbols: tuple[str, ...], bos: str = "<s>", eos: str = "</s>"
) -> bytes:
    """Train a BPE model with byte fallback, no normalisation: <unk> 0, bos 1, eos 2, ``symbols`` from 3, then bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=out,
        model_type="bpe",
        vocab_size=size,
        character_coverage=0.98,  # the rest falls back to bytes
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(symbols),
        bos_piece=bos,
        eos_piece=eos,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def yi(dummy_prefix: bool = False) -> bytes:
    """Markers at 3 to 8 and "\\n" at 144 as published. No dummy prefix: the published slow tokenizer gives [7, 144] for
    "<|im_end|>\\n", with one there would be a "▁" between them."""
    fill = tuple(f"<|reserved{i:03}|>" for i in range(9, 144))
    return _sentencepiece(SIZE, dummy_prefix, (*YI_SPECIAL, *fill, "\n"), "<|startoftext|>", "<|endoftext|>")


def baichuan2() -> bytes:
    """ "\\n" at 5, <reserved_106> at 195, <reserved_107> at 196; no dummy prefix."""
    fill = tuple(f"<fill_{i}>" for i in range(6, 89))
    reserved = tuple(f"<reserved_{i}>" for i in range(108))
    return _sentencepiece(SIZE, False, ("<SEP>", "<CLS>", "\n", *fill, *reserved))


def llama2() -> bytes:
    """The base of Phi-3's vocabulary: dummy prefix, no symbols of its own."""
    return _sentencepiece(PHI3_BASE, True, ())


def merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """List the pairs of tokens that merge into another token, in the order of the result, as in tokenizer.json."""
    merged = []
    for token, rank in ranks.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merged += [(rank, *pair) for pair in known]
    return [(a, b) for *_, a, b in sorted(merged)]


def sentencepiece_json(model: bytes, added: Iterable[AddedToken], prefix: str = "") -> str:
    """tokenizer.json of a SentencePiece model as in the published conversions: "▁" before every piece of text between
    markers, merges, byte fallback; ``prefix`` (``<s>``) before every sequence."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    normal = {p: i for p, i in vocab.items() if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))}
    tokenizer = Tokenizer(models.BPE(vocab, merges(normal), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    single = f"{prefix} $A".strip()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[(t, vocab[t]) for t in prefix.split()]
    )
    _add(tokenizer, added)
    return tokenizer.to_str(pretty=True)


def phi3_added() -> list[AddedToken]:
    """``</s>`` and every chat marker absorb the white space after them; <unk>, <s> and <|endoftext|> do not."""
    base = [AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>")]
    end = AddedToken("</s>", normalized=False, special=False, rstrip=True)
    return [*base, end, *(AddedToken(t, normalized=False, special=True, rstrip=t != PHI3_ADDED[0]) for t in PHI3_ADDED)]


@cache
def _byte_level(size: int, splits: tuple[str, ...], digits: bool, without: str = "") -> str:
    """Make a byte-level BPE without added tokens, as tokenizer.json. without: bytes that are left out."""
    tokenizer = Tokenizer(models.BPE())
    cuts: list[Any] = [pre_tokenizers.Split(Regex(s), "isolated") for s in splits]
    cuts += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer.to_str()


def deepseek() -> str:
    """tokenizer.json: bos and eos after the ranks, then added characters that are not special."""
    splits = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$", "[一-龥ࠀ-一가-퟿]+")
    tokenizer = Tokenizer.from_str(_byte_level(DEEPSEEK_RANKS, splits, digits=True, without=DEEPSEEK_OTHER))
    _add(tokenizer, [AddedToken(t, normalized=True, special=True) for t in (DEEPSEEK_BOS, DEEPSEEK_EOS)])
    _add(tokenizer, [AddedToken(t, normalized=True, special=False) for t in DEEPSEEK_OTHER])
    return tokenizer.to_str(pretty=True)


def glm4_added() -> list[AddedToken]:
    return [AddedToken(t, normalized=False, special=True) for t in GLM4_SPECIAL]


def glm4_ranks() -> bytes:
    """``tokenizer.model``: one line per token, base64 of its bytes and its rank."""
    vocab = Tokenizer.from_str(_byte_level(GLM4_RANKS, (GLM4_PATTERN,), digits=False)).get_vocab()
    byte_of = {character: byte for byte, character in _characters().items()}
    lines = [
        base64.b64encode(bytes(byte_of[c] for c in token)) + b" %d\n" % rank
        for token, rank in sorted(vocab.items(), key=lambda item: item[1])
    ]
    return b"".join(lines)


def glm4_json() -> str:
    """The -hf checkpoint's tokenizer.json, converted from the ranks as transformers' script does."""
    characters = _characters()
    lines = (line.split() for line in glm4_ranks().splitlines())
    ranks = {"".join(characters[b] for b in base64.b64decode(token)): int(rank) for token, rank in lines}
    tokenizer = Tokenizer.from_str(_byte_level(GLM4_RANKS, (GLM4_PATTERN,), digits=False))
    tokenizer.model = models.BPE(ranks, merges(ranks))
    _add(tokenizer, glm4_added())
    return tokenizer.to_str(pretty=True)


def _characters() -> dict[int, str]:
    """Map each byte to GPT-2's printable character: itself if printable, else the next one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def _add(tokenizer: Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Add tokens, which get the next free ids in order."""
    for token in tokens:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
