"""Encoding text in parts gives the same ids, loss masks and reports as encoding it whole, for every family's tokenizer.

The tests can fail: a tokenizer with overlapping added tokens gives other ids when text is split at them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Fast

from luthier.data.loader import DataReport
from luthier.encoding.encoder import Encoder
from luthier.models.chat_format import load_chat_format
from luthier.models.tokenizer import tokenizer as tokenizer_module
from luthier.models.tokenizer.tokenizer import Cuts, Tokenizer, load_tokenizer
from luthier.templates import stop_ids
from luthier.types import ChatTokenizer, Conversation, Example
from tests.conftest import TOKENIZER
from tests.helpers import published
from tests.helpers.families import FORMS, gguf, speaks_to_all, tiny
from tests.helpers.rows import encode, load
from tests.laws.test_prompt_prefix import chats

FAMILIES: dict[str, Callable[[Path], Any]] = {
    "yi": published.yi,
    "yi, prefix": lambda path: published.yi(path, dummy_prefix=True, tokenizer_json=True),
    "phi3": published.phi3,
    "phi3, april": lambda path: published.phi3(path, form="april"),
    "baichuan2": published.baichuan2,
    "glm4": published.glm4,
    "glm4-hf": published.glm4_hf,
    "deepseek": published.deepseek,
}


class Plain:
    """A tokenizer that never splits text: the reference."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> Any:
        return self._tokenizer.encode_batch(texts)

    def splits_text_at(self, token: str) -> bool:
        return False


def plain_ids(fast: Any, texts: Sequence[str]) -> list[bytes]:
    return [array("i", e.ids).tobytes() for e in fast.encode_batch(list(texts), add_special_tokens=False)]


def texts(markers: Sequence[str]) -> st.SearchStrategy[str]:
    """Draw text of markers, fragments of markers, white space and words."""
    fragments = [m[:n] for m in markers for n in (1, 3)] + [m[n:] for m in markers for n in (1, 3)]
    plain = [" ", "  ", "\n", "\t", "a", "lamp", " lamp", "茶", "😀", "1234", "▁", "́", "<", "'s"]
    return st.lists(st.sampled_from([*markers, *fragments, *plain]) | st.text(max_size=3), max_size=14).map("".join)


def added(fast: Any) -> list[str]:
    return [t.content for t in fast.get_added_tokens_decoder().values()]


@settings(max_examples=150, deadline=None)
@given(drawn=st.data(), rstrip=st.booleans())
@pytest.mark.parametrize("name", FORMS)
def test_ids_are_the_same_as_for_the_whole_text(name: str, drawn: st.DataObject, rstrip: bool) -> None:
    v = tiny(name, rstrip)
    assert all(map(v.splits_text_at, FORMS[name].stop))
    samples = drawn.draw(st.lists(texts(added(v._fast)), max_size=3))
    assert v.encode_ids(samples) == plain_ids(v._fast, samples)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("family")
    FAMILIES[request.param](path)
    return load_tokenizer(path)


def test_published_tokenizers_give_the_same_ids_as_for_the_whole_text(family: Tokenizer) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(texts(added(family._fast)), max_size=3))
    def same(samples: list[str]) -> None:
        assert family.encode_ids(samples) == plain_ids(family._fast, samples)

    assert family._cuts.tokens
    same()


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_prefix_is_added_only_where_the_scheme_adds_it(scheme: Any) -> None:
    fast = Fast.from_file(str(TOKENIZER / "tokenizer.json"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="a", prepend_scheme=scheme)
    samples = ["lamp<|im_start|>lamp<|im_end|>", "<|im_start|>lamp", "lamp", "", "<|im_end|>"]
    cuts = Cuts(fast)
    assert cuts.tokens
    assert cuts.encode(samples) == plain_ids(fast, samples)


OVERLAPS = {
    "begins before": ([AddedToken("x<|im", normalized=False)], "x<|im_end|>", set()),
    "holds it": ([AddedToken("[<|im_end|>]", normalized=False)], "[<|im_end|>]", {"<|im_start|>"}),
    "longer": ([AddedToken("<|im_end|>x", normalized=False)], "a<|im_end|>x", {"<|im_start|>"}),
    "begins inside": ([AddedToken("_end|>x", normalized=False)], "<|im_end|>x", {"<|im_start|>"}),
    "itself": ([AddedToken("abab", normalized=False)], "ababab abababab", {"<|im_start|>", "<|im_end|>"}),
    "strips": ([AddedToken("##", normalized=False, lstrip=True)], "a  ##", {"<|im_start|>", "<|im_end|>"}),
    "a word": ([AddedToken("lamp", normalized=False, single_word=True)], "lamp<|im_end|>", set()),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_text_is_not_split_at_overlapping_tokens(case: str) -> None:
    tokens, text, expected = OVERLAPS[case]
    fast = Fast.from_file(str(TOKENIZER / "tokenizer.json"))
    fast.add_tokens(tokens)
    cuts = Cuts(fast)
    assert {t for t in cuts.tokens if "im_" in t} == expected
    assert tokens[0].content not in cuts.tokens
    assert cuts.encode([text, text + text]) == plain_ids(fast, [text, text + text])


@pytest.mark.parametrize("case", ["begins before", "holds it", "strips"])
def test_a_wrong_split_changes_the_ids(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, text, _ = OVERLAPS[case]
    fast = Fast.from_file(str(TOKENIZER / "tokenizer.json"))
    fast.add_tokens(tokens)
    monkeypatch.setattr(tokenizer_module, "_is_cut", lambda *_: True)
    assert Cuts(fast).encode([text]) != plain_ids(fast, [text])


def test_text_is_not_split_at_tokens_matched_after_normalisation() -> None:
    fast = Fast.from_file(str(TOKENIZER / "tokenizer.json"))
    fast.add_tokens([AddedToken("#A$", normalized=True)])
    samples = ["x#A$y", "x#a$y", "x<|im_end|>#A$"]
    assert "#A$" in Cuts(fast).tokens  # nothing is normalised
    assert Cuts(fast).encode(samples) == plain_ids(fast, samples)
    fast.normalizer = normalizers.Sequence([])
    assert "#A$" in Cuts(fast).tokens
    fast.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    assert "#A$" not in Cuts(fast).tokens
    assert Cuts(fast).tokens
    assert Cuts(fast).encode(samples) == plain_ids(fast, samples)


def test_text_is_not_split_at_markers_that_are_read_as_text() -> None:
    fast = Fast.from_file(str(TOKENIZER / "tokenizer.json"))
    fast.encode_special_tokens = True
    fast.normalizer = normalizers.Lowercase()
    assert not Cuts(fast).tokens
    assert Cuts(fast).encode(["A<|im_end|>b"]) == plain_ids(fast, ["A<|im_end|>b"])


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_MAX_CACHED_CHARACTERS", 40)
    fast = Fast.from_file(str(TOKENIZER / "tokenizer.json"))
    cuts = Cuts(fast)
    for i in range(20):
        samples = [f"<|im_start|>user\nrow {i}<|im_end|>", "<|im_start|>user\nagain<|im_end|>"]
        assert cuts.encode(samples) == plain_ids(fast, samples)
        assert len(cuts._cache) < 8


def both(encoder: Encoder, rows: Sequence[Conversation]) -> tuple[list[Example], DataReport]:
    """Encode rows with and without splitting, compare, and return the examples and the report."""
    assert isinstance(encoder.tokenizer, Tokenizer)
    reference = replace(encoder, tokenizer=Plain(encoder.tokenizer))  # type: ignore[arg-type]
    reports = [DataReport(read=len(rows)) for _ in range(2)]
    examples, expected = (encode(e, rows, r) for e, r in zip((encoder, reference), reports, strict=True))
    assert reports[0] == reports[1]
    assert len(examples) == len(expected)
    for a, b in zip(examples, expected, strict=True):
        assert (a.source, a.ids.dtype, a.trained.dtype) == (b.source, b.ids.dtype, b.trained.dtype)
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.trained, b.trained)
    return examples, reports[0]


@settings(max_examples=60, deadline=None)
@given(chat=chats(), rstrip=st.booleans(), limit=st.sampled_from([8, 24, 60, 4096]), last=st.booleans())
@pytest.mark.parametrize("name", FORMS)
def test_rows_are_encoded_as_by_the_reference(
    name: str, chat: Conversation, rstrip: bool, limit: int, last: bool
) -> None:
    v, template = tiny(name, rstrip), speaks_to_all(name)
    both(
        Encoder(template, v, stop_ids(template, v), limit, train_on="last_reply" if last else "all_replies"),
        [chat, chat],
    )


@pytest.mark.smollm2
def test_huanhuan_is_encoded_as_by_the_reference(smollm2: Path, huanhuan: Path) -> None:
    v = load_chat_format(smollm2)
    rows = load(huanhuan).conversations
    examples, report = both(Encoder(v.template, v.tokenizer, v.stop_ids, 128), rows)
    assert len(rows) == 3729
    assert report.changed > 100
    assert report.dropped > 100  # their prompts exceed the limit
    assert len(examples) == 3729 - report.dropped


def test_a_published_vocabulary_is_encoded_as_by_the_reference(huanhuan: Path, vocabs: Path) -> None:
    v, template = gguf(vocabs, "phi-3"), FORMS["phi3"]
    rows = load(huanhuan).conversations[:600]
    examples, _ = both(Encoder(template, v, stop_ids(template, v), 2048), rows)
    assert len(examples) == 600


def test_tokenizer_implements_the_protocol(tokenizer: Tokenizer) -> None:
    """The class has the type that the encoder requires."""
    plain: ChatTokenizer = tokenizer
    assert plain.splits_text_at("<|im_end|>")
    assert not plain.splits_text_at("lamp")
