"""Converted vocabularies give the same ids as SentencePiece and tiktoken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken as reference
from gguf import GGUFReader
from hypothesis import given, settings
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import AddedToken
from tokenizers import Tokenizer as Fast
from transformers import AutoTokenizer

from luthier.errors import ModelError
from luthier.models.tokenizer import sentencepiece, tiktoken
from luthier.models.tokenizer.merges import merges_of
from luthier.models.tokenizer.sentencepiece import PieceType, Spacing
from luthier.models.tokenizer.tokenizer import Tokenizer
from tests.helpers import trained
from tests.helpers.trained import CASES, TEXT, train

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"add_dummy_prefix": False},
    "dummy prefix": {},
    "no byte fallback": {"byte_fallback": False, "add_dummy_prefix": False, "vocab_size": 450},
    "extra space removed": {"remove_extra_whitespaces": True},
    "no symbols": {"user_defined_symbols": [], "control_symbols": []},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_trained_sentencepiece_model_gives_its_own_ids(name: str) -> None:
    proto = train(**VARIANTS[name])
    theirs = SentencePieceProcessor(model_proto=proto.SerializeToString())
    ours = sentencepiece.from_proto(proto, {})
    assert ours.get_vocab_size() == theirs.get_piece_size() == len(proto.pieces)
    assert [ours.id_to_token(i) for i in range(len(proto.pieces))] == [p.piece for p in proto.pieces]
    symbols = [p.piece for p in proto.pieces if p.type == PieceType.USER_DEFINED]

    def check(text: str) -> None:
        if "<unk>" in text or (proto.normalizer_spec.add_dummy_prefix and text.strip(" ") in symbols):
            return  # ours reads a written <unk>; a text that is only a symbol gets no prefix
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text), text
        if theirs.unk_id() not in ids and "▁" not in text and proto.trainer_spec.byte_fallback:
            expected = text if not proto.normalizer_spec.remove_extra_whitespaces else theirs.decode(ids)
            assert ours.decode(ids) == expected, text

    for text in CASES:
        check(text)
    settings(max_examples=150, deadline=None, derandomize=True, database=None)(given(TEXT)(check))()


def test_control_pieces_are_single_tokens_and_split_the_text() -> None:
    for name in ("plain", "dummy prefix"):
        proto = train(**VARIANTS[name])
        theirs = SentencePieceProcessor(model_proto=proto.SerializeToString())
        ours = sentencepiece.from_proto(proto, {})
        marker = theirs.piece_to_id("<|ctl|>")
        expected = [*theirs.encode("fox"), marker, *theirs.encode("\nthe  dog"), 2]
        assert ours.encode("fox<|ctl|>\nthe  dog</s>").ids == expected
        assert ours.decode(expected).split() == ["fox", "the", "dog"]
        assert sentencepiece.agrees(ours, proto, ["<|ctl|>", "</s>"])
    assert sentencepiece.agrees(ours, train(**VARIANTS["plain"]), ["<|ctl|>"]) is False


# Published vocabularies


def gguf(path: Path, *names: str) -> list[Any]:
    fields = GGUFReader(path).fields
    return [fields[f"tokenizer.ggml.{name}"].contents() for name in names]


def as_proto(pieces: list[str], scores: list[float], types: list[int], spacing: Spacing) -> Any:
    proto = pb.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = pb.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = PieceType.BYTE in types
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = spacing.add_dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = spacing.remove_extra_whitespaces
    return proto


def references(path: Path) -> list[tuple[str, list[int]]]:
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in path.with_suffix(".gguf.out").read_text().split("\n")]
    return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize("name", ["baichuan", "llama-spm"])
def test_published_sentencepiece_vocabularies_give_the_reference_ids(vocabs: Path, name: str) -> None:
    path = vocabs / f"ggml-vocab-{name}.gguf"
    pieces, scores, types = gguf(path, "tokens", "scores", "token_type")
    if name == "baichuan":  # the file does not mark its first 393 pieces as user-defined, and has no reference ids
        types = [PieceType.USER_DEFINED if t == PieceType.NORMAL and i < 393 else t for i, t in enumerate(types)]
    else:
        ours = sentencepiece.from_pieces(pieces, scores, types, Spacing(remove_extra_whitespaces=False))
        samples = references(path)
        assert len(samples) == 47
        assert [text for text, ids in samples if ours.encode(text).ids != ids] == []
    spacing = Spacing(add_dummy_prefix=False, remove_extra_whitespaces=False)
    ours = sentencepiece.from_pieces(pieces, scores, types, spacing)
    theirs = SentencePieceProcessor(model_proto=as_proto(pieces, scores, types, spacing).SerializeToString())
    runs = [unit * n for unit in (" ", "=", "-", "0", "哈", "\n", ". ") for n in range(1, 70)]
    vocabulary = ["".join(pieces[i : 400 + i * 7 % 60000 : 5011]) for i in range(400, 2000, 7)]
    texts = [text for text in [*CASES, *runs, *vocabulary] if "<unk>" not in text]
    assert len(texts) > 700
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == text.replace("▁", " ")


@pytest.mark.parametrize(
    ("name", "misses"), [("phi-3", []), pytest.param("deepseek-llm", ["½"], marks=pytest.mark.slow)]
)
def test_published_vocabularies_read_by_transformers_give_the_reference_ids(
    vocabs: Path, name: str, misses: list[str]
) -> None:
    """The known miss comes from the conversion from GGUF, not from a tokenizer.json. Qwen2 is tested in tests/laws."""
    path = vocabs / f"ggml-vocab-{name}.gguf"
    ours = Tokenizer(AutoTokenizer.from_pretrained(vocabs, gguf_file=path.name))
    results = [(text, ids, list(ours.encode_batch([text])[0].ids)) for text, ids in references(path)]
    assert [text for text, ids, got in results if got != ids and not any(m in text for m in misses)] == []
    assert sum(got != ids for _, ids, got in results) == len(misses)


# tiktoken


def test_tiktoken_ranks_give_tiktokens_ids() -> None:
    # A token that no merge can form is still one token, as in tiktoken.
    ranks = {**trained.ranks(), "甄嬛传".encode(): len(trained.ranks())}
    special = {t: len(ranks) + i for i, t in enumerate(tiktoken.ADDED)}
    theirs = reference.Encoding("t", pat_str=tiktoken.PATTERN, mergeable_ranks=ranks, special_tokens=special)
    ours = tiktoken.from_ranks(ranks, {})
    assert ours.get_vocab_size() == theirs.n_vocab
    assert {t: ours.token_to_id(t) for t in tiktoken.ADDED} == special

    def check(text: str) -> None:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text, allowed_special="all"), text
        assert ours.decode(ids, skip_special_tokens=False) == text

    for text in [*CASES, "甄嬛传", "[gMASK]<sop><|user|>\n嘘<|assistant|> a  b<|endoftext|>"]:
        check(text)
    settings(max_examples=250, deadline=None, derandomize=True, database=None)(given(TEXT)(check))()


# Vocabularies that cannot be reproduced


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as e:
        call()
    assert e.value.fix
    return e.value.message


def test_vocabularies_that_merges_cannot_reproduce_are_refused() -> None:
    def build(*more: tuple[str, float, int]) -> Fast:
        table = [("<unk>", 0.0, 2), *((c, -9.0, 1) for c in "abc "), *more]
        return sentencepiece.from_pieces(*zip(*table, strict=True), Spacing(add_dummy_prefix=False))  # type: ignore[arg-type]

    assert build(("ab", -1.0, 1), ("bc", -2.0, 1)).encode("abc").tokens == ["ab", "c"]
    assert "have the same score" in refused(lambda: build(("ab", -1.0, 1), ("bc", -1.0, 1)))
    assert build(("aa", -1.0, 1), ("aaa", -1.0, 1)).encode("aaaaa").tokens == ["aaa", "aa"]
    assert "occurs in a piece but is not a piece itself" in refused(lambda: build(("ad", -1.0, 1)))
    assert "is marked unused but merges can form it" in refused(lambda: build(("ab", -1.0, 5)))
    assert build(("xy", -1.0, 5)).encode("abc").tokens == ["a", "b", "c"]
    assert "the normalizer removes the symbol" in refused(lambda: build(("▁▁", 0.0, 4)))
    assert "must have distinct pieces and exactly one for unknown" in refused(lambda: build(("a", -1.0, 1)))
    assert "must have distinct pieces and exactly one for unknown" in refused(lambda: build(("<none>", 0.0, 2)))


def test_a_configuration_can_rename_pieces_and_add_tokens() -> None:
    pieces = ["<unk>", "<s>", "</s>", "<extra>", "a", "b", "ab"]
    scores, types = [0.0] * 4 + [-2.0, -3.0, -1.0], [2, 3, 3, 4, 1, 1, 1]
    declared = {3: AddedToken("<|end|>", rstrip=True, special=True), 7: AddedToken("<|new|>", special=True)}
    ours = sentencepiece.from_pieces(pieces, scores, types, Spacing(add_dummy_prefix=False), declared)
    assert ours.encode("ab<|end|>  a<|new|>").ids == [6, 3, 4, 7]
    assert 3 not in ours.encode("<extra>").ids
    assert ours.decode([6, 3, 4, 7]) == "aba"


def test_merges_list_every_way_to_join_best_result_first() -> None:
    assert merges_of(["ab", "abc", "a", "b", "c", "bc"]) == [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")]
