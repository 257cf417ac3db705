"""Make tokenizers for each family: the test tokenizer with the family's markers, or a real vocabulary."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gguf import GGUFReader
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.models.tokenizer import sentencepiece
from luthier.models.tokenizer.sentencepiece import PieceType, Spacing
from luthier.models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luthier.templates import NATIVE, ChatML, SystemAsUser
from luthier.types import Template
from tests.conftest import TOKENIZER

TABLE = ("tokens", "scores", "token_type")  # of a GGUF vocabulary
PUBLISHED = Path(__file__).parents[1] / "fixtures" / "templates"
# bos and eos of the published tokenizers
ENDS = {
    "phi3": ("<s>", "<|endoftext|>"),
    "baichuan2": ("<s>", "</s>"),
    "glm4": (None, "<|endoftext|>"),
    "deepseek": NATIVE["deepseek"][0].markers,
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "chatml": (None, "<|im_end|>"),
}
FORMS: dict[str, Template] = {
    "chatml": ChatML(),
    "phi3": NATIVE["phi3"][0],
    "phi3-2024-04": NATIVE["phi3"][1],
    "phi3-medium": NATIVE["phi3"][2],
    **{name: NATIVE[name][0] for name in ("baichuan2", "glm4", "deepseek", "llama3")},
}
NO_SYSTEM = ("phi3-2024-04", "phi3-medium", "deepseek")


def published(name: str) -> str:
    return (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8")


def speaks_to_all(name: str) -> Template:
    """Return the template; if it has no system role, system prompts are merged into the user's message."""
    return SystemAsUser(FORMS[name]) if name in NO_SYSTEM else FORMS[name]


@cache
def tiny(name: str, rstrip: bool = False) -> Tokenizer:
    """Return the test tokenizer with a family's markers. rstrip: they absorb white space after them, as in Phi-3."""
    family = FORMS[name].name
    hf = load_tokenizer(TOKENIZER).hf
    bos, eos = ENDS[family]
    texts = dict.fromkeys(t for t in (*FORMS[name].markers, bos, eos) if t)
    absorbs = {t: rstrip and t not in (bos, eos) for t in texts}
    hf.add_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=absorbs[t]) for t in texts], special_tokens=True
    )
    if bos:
        hf.bos_token = bos
    hf.eos_token = eos
    path = PUBLISHED / f"{name}.jinja"
    hf.chat_template = published(name) if path.exists() else None
    return Tokenizer(hf)


@cache
def gguf(vocabs: Path, name: str) -> Tokenizer:
    """Load a real vocabulary. Phi-3's markers do not absorb white space here; Baichuan's is of the first 7B model."""
    if name == "baichuan":  # transformers cannot read it
        table = [GGUFReader(vocabs / f"ggml-vocab-{name}.gguf").fields[f"tokenizer.ggml.{n}"].contents() for n in TABLE]
        pieces, scores, types = table
        types = [PieceType.USER_DEFINED if t == PieceType.NORMAL and i < 393 else t for i, t in enumerate(types)]
        spacing = Spacing(add_dummy_prefix=False, remove_extra_whitespaces=False)
        fast = sentencepiece.from_pieces(pieces, scores, types, spacing)
        return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>"))
    hf = AutoTokenizer.from_pretrained(vocabs, gguf_file=f"ggml-vocab-{name}.gguf", local_files_only=True)
    return Tokenizer(hf)
