"""Law "tokens": for every template, ids and loss masks of fixed conversations equal golden files.

The law can fail: it detects a trained newline after the stop token (a bug of three published trainers), and a tokenizer
that splits ``<|im_start|>`` into pieces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.loader import DataReport
from luthier.encoding.encoder import Encoder
from luthier.models.chat_format import load_chat_format
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.templates import ChatML, Jinja, OwnTemplate, SystemAsUser, stop_ids
from luthier.types import Conversation, Message, RowRef, Span, Template
from tests.helpers.families import FORMS, gguf, speaks_to_all, tiny
from tests.helpers.rows import encode

GOLDEN = Path(__file__).parent.parent / "golden"
FIXED = {
    "one turn": (Message("user", "Who are you? 你是谁？"), Message("assistant", "Marlow, 12 stairs up.")),
    "system": (
        Message("system", "Be brief."),
        Message("user", " padded \n"),
        Message("assistant", "Aye.\n\nTwo lines."),
    ),
    "three turns": (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d e"),
        Message("user", "<f>"),
        Message("assistant", "g 😀"),
    ),
}


def encoded(template: Template, tokenizer: Tokenizer, stop: tuple[int, ...]) -> dict[str, Any]:
    encodings: dict[str, Any] = {}
    for train_on in ("all_replies", "last_reply"):
        for name, messages in FIXED.items():
            report = DataReport()
            encoder = Encoder(template, tokenizer, stop, 512, train_on=train_on)
            example = encode(encoder, [Conversation(messages, RowRef("fixed", 1))], report)[0]
            assert not report.problems
            encodings[f"{name}, {train_on}"] = {
                "ids": " ".join(map(str, example.ids)),
                "trained": "".join("T" if t else "." for t in example.trained),
            }
    return encodings


def same_as_golden(name: str, encodings: dict[str, Any]) -> None:
    path = GOLDEN / f"{name}.json"
    if not path.exists():  # a new template: look at the file, then commit it
        path.write_text(json.dumps(encodings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        raise AssertionError(f"{path} was written; look at it and run again")
    assert encodings == json.loads(path.read_text(encoding="utf-8"))


def templates(tokenizer: Tokenizer) -> dict[str, Template]:
    return {
        "chatml": ChatML(),
        "chatml-default-system": ChatML("You are a helpful assistant."),
        "jinja": Jinja(OwnTemplate(tokenizer.render, tokenizer.chat_template or ""), ("<|im_end|>",)),
    }


@pytest.mark.parametrize("name", ["chatml", "chatml-default-system", "jinja"])
def test_ids_and_masks_equal_the_golden_files(name: str, tokenizer: Tokenizer) -> None:
    same_as_golden(name, encoded(templates(tokenizer)[name], tokenizer, (2,)))


def test_the_law_detects_a_trained_newline(tokenizer: Tokenizer) -> None:
    class Newline(ChatML):
        def spans(self, messages: Any, tools: Any = ()) -> list[Span]:
            spans = super().spans(messages, tools)
            return [Span(s.text.removesuffix("\n") + "\n" * s.written, s.written) for s in spans]

    with pytest.raises(IndexError):  # no row is kept: it ends with a token that generation does not stop on
        same_as_golden("chatml", encoded(Newline(), tokenizer, (2,)))


def test_the_law_detects_a_tokenizer_that_splits_markers(tokenizer: Tokenizer) -> None:
    class Split:
        def encode_batch(self, texts: Any) -> Any:
            return tokenizer.encode_batch([t.replace("<|im_start|>", "<|im_ start|>") for t in texts])

        def splits_text_at(self, token: str) -> bool:
            return False

    assert encoded(ChatML(), Split(), (2,)) != json.loads((GOLDEN / "chatml.json").read_text(encoding="utf-8"))  # type: ignore[arg-type]


def test_jinja_and_native_chatml_agree(tokenizer: Tokenizer) -> None:
    both = templates(tokenizer)
    assert encoded(both["chatml"], tokenizer, (2,)) == encoded(both["jinja"], tokenizer, (2,))


def test_smollm2_ids_and_masks_equal_the_golden_file(smollm2: Path) -> None:
    v = load_chat_format(smollm2)
    assert v.template == ChatML("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    same_as_golden("smollm2", encoded(v.template, v.tokenizer, v.stop_ids))


@pytest.mark.parametrize(("vocab", "stop"), [("qwen2", "<|im_end|>")])
def test_real_vocabularies_equal_the_golden_files(vocab: str, stop: str, vocabs: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(vocabs, gguf_file=f"ggml-vocab-{vocab}.gguf", local_files_only=True)
    hf.chat_template = hf.chat_template or CHATML
    tokenizer = Tokenizer(hf)
    template = Jinja(OwnTemplate(tokenizer.render, hf.chat_template), (stop,))
    token = tokenizer.token_id(stop)
    assert token is not None
    same_as_golden(vocab, encoded(template, tokenizer, (token,)))


@pytest.mark.parametrize("name", [n for n in FORMS if n != "chatml"])
def test_each_familys_ids_and_masks_equal_the_golden_files(name: str) -> None:
    v = tiny(name)
    template = speaks_to_all(name)
    same_as_golden(name, encoded(template, v, stop_ids(template, v)))


@pytest.mark.parametrize("name", ["phi3", "phi3-2024-04"])
def test_markers_that_absorb_white_space_equal_the_golden_files(name: str) -> None:
    """Phi-3's published tokenizer leaves no newline after a marker."""
    v = tiny(name, rstrip=True)
    template = speaks_to_all(name)
    encodings = encoded(template, v, stop_ids(template, v))
    same_as_golden(f"{name}-rstrip", encodings)
    newline = v.encode_batch(["\n"])[0].ids
    assert str(newline[0]) not in encodings["three turns, all_replies"]["ids"].split()


@pytest.mark.parametrize(
    ("vocab", "name"), [("phi-3", "phi3"), ("phi-3", "phi3-2024-04"), ("deepseek-llm", "deepseek")]
)
def test_each_familys_real_vocabulary_equals_the_golden_file(vocab: str, name: str, vocabs: Path) -> None:
    v = gguf(vocabs, vocab)
    template = speaks_to_all(name)
    same_as_golden(f"{vocab}-{name}", encoded(template, v, stop_ids(template, v)))


def test_phi3s_real_ids(vocabs: Path) -> None:
    """Ids computed by hand: <|user|> 32010, <|end|> 32007, <|assistant|> 32001, newline 13 after the piece 29871."""
    encodings = encoded(FORMS["phi3"], gguf(vocabs, "phi-3"), (32007,))["three turns, all_replies"]
    turn = "32010 29871 13 {} 32007 29871 13 32001 29871 13 {} 32007"
    assert encodings["ids"].startswith(f"{turn.format(29874, 29890)} 29871 13 32010")
    assert encodings["trained"].startswith("..........TT...")


def test_deepseeks_real_ids_put_the_space_into_the_reply(vocabs: Path) -> None:
    v = gguf(vocabs, "deepseek-llm")
    begin, end = (v.token_id(t) for t in FORMS["deepseek"].markers)
    encodings = encoded(SystemAsUser(FORMS["deepseek"]), v, (end or 0,))["three turns, all_replies"]
    ids = [int(i) for i in encodings["ids"].split()]
    assert ids[0] == begin
    first = encodings["trained"].index("T")
    assert v.encode_batch([" b"])[0].ids == ids[first : first + 1]
    assert ids[first + 1] == end
    assert encodings["trained"][first : first + 3] == "TT."


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
