"""A tokenizer in llama.cpp's terms: tokens, their types, merges or scores, and the name of how text is cut.

    byte-level BPE (GPT-2's kind; tiktoken too)   model "gpt2", merges, a named pre-tokenizer
    SentencePiece BPE (Llama 2's kind)            model "llama", scores, byte fallback

All is read from the tokenizer that trained, whatever files it came from. Source: llama.cpp's ``llama-vocab.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from luthier.errors import ModelError
from luthier.models.tokenizer.tiktoken import PATTERN
from luthier.models.tokenizer.tokenizer import Tokenizer

_QWEN2 = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_LAST_OF_DEEPSEEK = "[一-龥ࠀ-一가-퟿]+"
_INSTEAD = "use --to hf, which stock transformers loads"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens, types, scores: by id. strips: markers swallow the white space after them (Phi-3)."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    prefix: bool = False
    strips: bool = False


def read(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """size: rows of the embedding; ids past the vocabulary are unused ones. Raises ModelError."""
    whole = tokenizer.described()
    model, added = whole["model"], {t["id"]: t for t in whole["added_tokens"]}
    if model["type"] != "BPE":
        raise ModelError(f"no GGUF of a model with a {model['type']} vocabulary can be written", _INSTEAD)
    names = {i: text for text, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    cuts = _cuts(whole["pre_tokenizer"])
    sentencepiece = not any(c["type"] == "ByteLevel" for c in cuts)
    size = max(size, max(names) + 1)
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    types = [_type(i, names, added, model) for i in range(size)]
    strips = any(t["rstrip"] for t in added.values())
    if not sentencepiece:
        return Vocabulary("gpt2", _pre(cuts, bool(model["ignore_merges"])), tokens, types, [" ".join(p) for p in pairs])
    # the rank of a product's first merge: pieces are joined the best score first, as merges are the first in the list
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks[t]) if t in ranks and types[i] == TokenType.NORMAL else -1e6 for i, t in enumerate(tokens)]
    prefix = _prefixed(whole["normalizer"]) or any(c.get("prepend_scheme") == "always" for c in cuts)
    return Vocabulary("llama", "default", tokens, types, [], scores, prefix, strips)


def write(writer: GGUFWriter, found: Vocabulary, stop_ids: Sequence[int], hf: Any, template: str) -> None:
    """Vocabulary, special tokens, stops (the first three that end a reply) and chat template.

    No token is ever added around a prompt: the template writes them all, as in training.
    """
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.prefix)
    else:
        writer.add_token_merges(found.merges)
    for add, token in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), stop_ids):  # noqa: B905
        add(int(token))
    for add, token in (
        (writer.add_bos_token_id, hf.bos_token_id),
        (writer.add_unk_token_id, hf.unk_token_id),
        (writer.add_pad_token_id, hf.pad_token_id),
    ):
        if token is not None:
            add(int(token))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(template)


def _type(i: int, names: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any]) -> int:
    name = names.get(i)
    if name is None:
        return int(TokenType.UNUSED)
    if name == model["unk_token"]:
        return int(TokenType.UNKNOWN)
    if i in added:
        return int(TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED)
    if model["byte_fallback"] and len(name) == 6 and name.startswith("<0x"):
        return int(TokenType.BYTE)
    return int(TokenType.NORMAL)


def _cuts(pre: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre is None:
        return []
    return list(pre["pretokenizers"]) if pre["type"] == "Sequence" else [pre]


def _pre(cuts: Sequence[Mapping[str, Any]], ignore_merges: bool) -> str:
    """llama.cpp's name of a way to cut text. Raises ModelError where it has none that is the same."""
    steps = tuple(_step(c) for c in cuts)
    known = {
        ("bytes by words",): "gpt-2",
        ("digits", "bytes by words"): "smollm",
        (_QWEN2, "bytes"): "qwen2",
        (PATTERN, "bytes"): "llama-bpe" if ignore_merges else "chatglm-bpe",
    }
    name = known.get(steps)
    if name is None and steps[-3:] == (_LAST_OF_DEEPSEEK, "digits", "bytes"):
        name = "deepseek-llm"
    if name is None:
        raise ModelError("llama.cpp has no pre-tokenizer that cuts text as this model's tokenizer does", _INSTEAD)
    return name


def _step(cut: Mapping[str, Any]) -> str:
    kind = cut["type"]
    if kind == "ByteLevel" and not cut["add_prefix_space"]:
        return "bytes by words" if cut["use_regex"] else "bytes"
    if kind == "Digits" and cut["individual_digits"]:
        return "digits"
    if kind == "Split" and cut["behavior"] == "Isolated" and not cut["invert"]:
        return str(cut["pattern"].get("Regex"))
    return f"? {kind}"


def _prefixed(normalizer: Mapping[str, Any] | None) -> bool:
    """Whether every stretch of text gets a "▁" before it."""
    if normalizer is None:
        return False
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return any(s["type"] == "Prepend" for s in steps)
