"""Tokenizers of published checkpoints load exactly, without their code, and stay the same when saved."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken as reference
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Fast
from transformers import AutoTokenizer, LlamaTokenizer

from luthier.errors import ModelError
from luthier.models.tokenizer import sentencepiece, tiktoken
from luthier.models.tokenizer import tokenizer as loading
from luthier.models.tokenizer.sentencepiece import PieceType, Spacing, from_pieces
from luthier.models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import TOKENIZER
from tests.helpers import trained
from tests.helpers.trained import CASES, CORPUS, train, written


@pytest.fixture
def ranks() -> dict[bytes, int]:
    return trained.ranks()


def directory(path: Path, model_type: str, **files: Any) -> Path:
    """Write a model directory without weights; ``__`` in a name stands for a dot."""
    path.mkdir(parents=True, exist_ok=True)
    for name, value in {"config__json": {"model_type": model_type}, **files}.items():
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (path / name.replace("__", ".")).write_bytes(data)
    return path


RESERVED = [f"<reserved_{i}>" for i in range(104, 108)]


@pytest.fixture(scope="module")
def baichuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    proto = train(user_defined_symbols=["\n", "<br>", *RESERVED], add_dummy_prefix=True)
    table = {"__type": "AddedToken", "content": "</s>", "single_word": True}
    return directory(
        tmp_path_factory.mktemp("baichuan"),
        "baichuan",
        tokenizer__model=proto.SerializeToString(),
        tokenizer_config__json={
            "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
            "tokenizer_class": "BaichuanTokenizer",
            "eos_token": table,
            "model_max_length": 4096,
            "pad_token": {**table, "content": "<unk>"},
        },
    )


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ranks = trained.ranks()
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return directory(
        tmp_path_factory.mktemp("glm"),
        "chatglm",
        tokenizer__model=written(ranks),
        tokenizer_config__json={
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
            "tokenizer_class": "ChatGLM4Tokenizer",
            "added_tokens_decoder": {
                str(len(ranks) + i): {"content": t, **flags} for i, t in enumerate(tiktoken.ADDED[:10])
            },
            "chat_template": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}",
            "eos_token": "<|endoftext|>",
        },
    )


def yi(path: Path, **options: Any) -> Path:
    """Write a Llama checkpoint with both files; like Yi's, its tokenizer.json adds a prefix after special tokens."""
    markers = ["<|im_start|>", "<|im_end|>"]
    proto = train(
        **{"add_dummy_prefix": False, "user_defined_symbols": markers, "bos_piece": "<|startoftext|>", **options},
        eos_piece="<|endoftext|>",
    )
    special = {
        i: AddedToken(p.piece, special=True, normalized=False) for i, p in enumerate(proto.pieces) if p.type == 4
    }
    fast = sentencepiece.from_proto(proto, special)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ids = {i: p.piece for i, p in enumerate(proto.pieces) if p.type in (PieceType.CONTROL, PieceType.USER_DEFINED)}
    return directory(
        path,
        "llama",
        tokenizer__model=proto.SerializeToString(),
        tokenizer__json=fast.to_str().encode(),
        tokenizer_config__json={
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            "add_bos_token": False,
            "added_tokens_decoder": {
                str(i): {"content": t, "special": True, "normalized": True} for i, t in ids.items() if t not in markers
            },
        },
        special_tokens_map__json={
            "additional_special_tokens": markers,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<unk>",
            "unk_token": "<unk>",
        },
    )


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode_batch([text])[0].ids)


def test_baichuan_gives_the_ids_of_its_sentencepiece_file_without_a_prefix(baichuan: Path) -> None:
    tokenizer = load_tokenizer(baichuan)
    proto = pb.ModelProto.FromString((baichuan / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    theirs = SentencePieceProcessor(model_proto=proto.SerializeToString())
    user, assistant = (theirs.piece_to_id(t) for t in RESERVED[2:])
    text = f"{RESERVED[2]}嘘——都说\n the<br> {RESERVED[3]}fox。</s>"
    expected = [user, *theirs.encode("嘘——都说\n the<br> "), assistant, *theirs.encode("fox。"), 2]
    assert ids_of(tokenizer, text) == expected
    hf = tokenizer.hf
    assert (hf.unk_token_id, hf.pad_token_id, hf.bos_token_id, hf.eos_token_id) == (0, 0, 1, 2)
    assert hf.model_max_length == 4096
    assert hf("fox").input_ids == theirs.encode("fox")
    assert {*RESERVED, "<s>", "</s>"} <= set(tokenizer.control_tokens)
    assert "<br>" not in tokenizer.control_tokens  # one token, but ordinary text
    assert tokenizer.chat_template is None


def test_glm4_gives_the_ids_of_its_tiktoken_file_and_adds_none(glm: Path, ranks: dict[bytes, int]) -> None:
    tokenizer = load_tokenizer(glm)
    special = {t: len(ranks) + i for i, t in enumerate(tiktoken.ADDED[:10])}
    theirs = reference.Encoding("g", pat_str=tiktoken.PATTERN, mergeable_ranks=ranks, special_tokens=special)
    text = "[gMASK]<sop><|user|>\n小姐，it's 12345  ok<|assistant|>\n嘘<|endoftext|>"
    assert ids_of(tokenizer, text) == tokenizer.hf(text).input_ids == theirs.encode(text, allowed_special="all")
    assert tokenizer.hf.eos_token_id == tokenizer.hf.pad_token_id == special["<|endoftext|>"]
    assert tokenizer.hf.bos_token_id is None
    assert set(tokenizer.control_tokens) == set(special)
    assert tokenizer.chat_template is not None and tokenizer.chat_template.startswith("[gMASK]<sop>")


def test_glm4_with_a_tokenizer_json_uses_it(glm: Path, tmp_path: Path) -> None:
    load_tokenizer(glm).hf.save_pretrained(tmp_path)
    directory(tmp_path, "chatglm", tokenizer__model=b"not read")
    assert load_tokenizer(tmp_path).digest() == load_tokenizer(glm).digest()


def test_yi_is_corrected_to_its_sentencepiece_model(tmp_path: Path) -> None:
    path = yi(tmp_path)
    theirs = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    end = theirs.piece_to_id("<|im_end|>")
    assert theirs.encode("<|im_end|>\n") == [end, *theirs.encode("\n")]
    published = Fast.from_file(str(path / "tokenizer.json"))
    assert published.encode("<|im_end|>\n").ids != [end, *theirs.encode("\n")]  # the published file is wrong
    tokenizer = load_tokenizer(path)
    text = "<|im_start|>user\nthe fox?<|im_end|>\n<|im_start|>assistant\n 嘘<|im_end|>\n"
    assert ids_of(tokenizer, text) == theirs.encode(text)
    assert ids_of(tokenizer, "the fox") == theirs.encode("the fox")
    hf = tokenizer.hf
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (1, 2, 0)
    assert {"<|im_end|>", "<|endoftext|>"} <= set(tokenizer.control_tokens)
    assert tokenizer.decode(theirs.encode(text)) == "user\nthe fox?\nassistant\n 嘘\n"
    assert load_tokenizer(path).digest() == tokenizer.digest()


@pytest.mark.parametrize("case", ["its own class", "a dummy prefix", "another file", "already exact"])
def test_other_llama_checkpoints_load_as_published(case: str, tmp_path: Path) -> None:
    path = yi(tmp_path, **({"add_dummy_prefix": True} if case == "a dummy prefix" else {}))
    if case == "its own class":
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if case == "another file":
        (path / "tokenizer.model").write_bytes(b"%%\n")
    if case == "already exact":
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": False}))
    published = AutoTokenizer.from_pretrained(path)
    assert load_tokenizer(path).digest() == Tokenizer(published).digest()


def byte_level(path: Path, model_type: str, *added: AddedToken) -> Path:
    shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
    fast = Fast.from_file(str(TOKENIZER / "tokenizer.json"))
    fast.add_tokens(list(added))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "legacy": True}
    return directory(path, model_type, tokenizer__json=fast.to_str().encode(), tokenizer_config__json=settings)


def test_a_byte_level_vocabulary_keeps_its_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of transformers treat DeepSeek's vocabulary as SentencePiece; this test does so by hand."""
    path = byte_level(tmp_path, "llama")
    plain = Fast.from_file(str(path / "tokenizer.json"))
    text = "User: a  b\n\n  c\n\nAssistant: 嘘"
    for loader in (AutoTokenizer, LlamaTokenizer):
        monkeypatch.setattr(loading, "AutoTokenizer", loader)
        tokenizer = load_tokenizer(path)
        assert ids_of(tokenizer, text) == plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids_of(tokenizer, text)) == text
    wrapped = LlamaTokenizer.from_pretrained(path).backend_tokenizer
    assert wrapped.decode(wrapped.encode(text).ids) != text  # spaces are lost


def test_phi3_special_tokens_strip_the_white_space_after_them(tmp_path: Path) -> None:
    end = AddedToken("<|end|>", rstrip=True, special=True, normalized=False)
    tokenizer = load_tokenizer(byte_level(tmp_path, "phi3", end))
    assert ids_of(tokenizer, "a<|end|>\n b") == ids_of(tokenizer, "a<|end|>b")
    assert ids_of(tokenizer, "a<|end|>")[-1] == tokenizer.token_id("<|end|>")


@pytest.mark.parametrize(("family", "native"), [("baichuan", "llama"), ("glm", "glm"), ("yi", "llama")])
def test_a_saved_tokenizer_gives_the_same_ids(
    family: str, native: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = yi(tmp_path / "yi") if family == "yi" else request.getfixturevalue(family)
    ours = load_tokenizer(source)
    path = directory(tmp_path / "saved", native)
    ours.hf.save_pretrained(path)
    for again in (Tokenizer(AutoTokenizer.from_pretrained(path)), load_tokenizer(path)):
        markers = "".join(ours.control_tokens)
        for text in (*CASES, markers, f"a{markers}\n b"):
            ids = ids_of(ours, text)
            assert ids_of(again, text) == ids
            assert again.decode(ids) == ours.decode(ids)
            assert again.hf(text).input_ids == ids
        assert again.digest() == ours.digest()
        assert again.hf.eos_token_id == ours.hf.eos_token_id
        assert again.chat_template == ours.chat_template
    marker = ours.control_tokens[-1]
    for text in (CORPUS[2], f"a🦙鲸饕b{marker}"):  # the second contains characters encoded as bytes
        ids = ids_of(ours, text)
        assert "".join(ours.pieces(ids)) == text
    cut = ours.pieces([*ids[:-3], ids[-1]])  # within the last character
    assert len(cut) == len(ids) - 2 and cut[-1].endswith(marker) and "".join(cut).startswith("a🦙鲸")


# Files that cannot be used


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as e:
        call()
    assert e.value.fix
    return e.value.message


def test_damaged_sentencepiece_files_are_refused(baichuan: Path, tmp_path: Path) -> None:
    path = shutil.copytree(baichuan, tmp_path / "m")
    file = path / "tokenizer.model"
    whole = file.read_bytes()
    for data in (b"", b"\xff" * 99, b"aGk= 0\n", whole[: len(whole) // 2], whole[:4000], written({b"a": 0})):
        file.write_bytes(data)
        assert "is not a complete SentencePiece model" in refused(lambda: load_tokenizer(path))
    file.unlink()
    assert "tokenizer.model: cannot be read (No such file" in refused(lambda: load_tokenizer(path))
    file.write_bytes(train(model_type="unigram", vocab_size=400).SerializeToString())
    assert "is a SentencePiece UNIGRAM model; only BPE models are supported" in refused(lambda: load_tokenizer(path))
    file.write_bytes(train(normalization_rule_name="nmt_nfkc").SerializeToString())
    assert "normalises text (nmt_nfkc) in a way that cannot be reproduced exactly" in refused(
        lambda: load_tokenizer(path)
    )


def test_a_vocabulary_that_merges_cannot_express_is_refused() -> None:
    """Two pieces of equal score overlap: SentencePiece forms the leftmost."""
    pieces, kinds = ["<unk>", "a", "b", "ab", "ba"], [PieceType.UNKNOWN, *[PieceType.NORMAL] * 4]
    spacing = Spacing(False, False, False)
    message = refused(lambda: from_pieces(pieces, [0.0, -1.0, -2.0, -3.0, -3.0], kinds, spacing, source="m"))
    assert "m: cannot be reproduced exactly ('ab' and 'ba' have the same score)" in message


def test_damaged_tiktoken_files_are_refused(glm: Path, ranks: dict[bytes, int], tmp_path: Path) -> None:
    path = shutil.copytree(glm, tmp_path / "m")
    file = path / "tokenizer.model"
    whole = file.read_bytes()
    twice = b"\n".join([*whole.splitlines()[:-1], base64.b64encode("甄嬛".encode()) + b" 7"])
    for data in (b"", whole[:1000], b"\x0a\x0e\n" * 9, whole + b"!!! 9\n", whole + b"YQ== x", b"YQ==\n" * 300, twice):
        file.write_bytes(data)
        assert "is not a complete tiktoken file" in refused(lambda: load_tokenizer(path))
    file.unlink()
    assert "tokenizer.model: cannot be read" in refused(lambda: load_tokenizer(path))


def test_configurations_that_do_not_fit_the_vocabulary_are_refused(
    glm: Path, ranks: dict[bytes, int], tmp_path: Path
) -> None:
    path = shutil.copytree(glm, tmp_path / "m")
    good = json.loads((path / "tokenizer_config.json").read_text())

    def message(**change: Any) -> str:
        (path / "tokenizer_config.json").write_text(json.dumps({**good, **change}))
        return refused(lambda: load_tokenizer(path))

    gap = {str(len(ranks) + 5): {"content": "<|endoftext|>"}}
    assert "added tokens do not follow its vocabulary (<|endoftext|> is" in message(added_tokens_decoder=gap)
    for value in ({"a": {"content": "b"}}, {"9": {}}, {"9": "b"}, ["b"], {"9": {"content": 3}}):
        assert "its added tokens cannot be read" in message(added_tokens_decoder=value)
    assert "eos_token '</none>' is not in its vocabulary" in message(eos_token="</none>")
