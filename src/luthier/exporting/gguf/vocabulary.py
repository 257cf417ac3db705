"""Translate a tokenizer for llama.cpp: tokens, their types, merges or scores, and the name of a pre-tokenizer.

    byte-level BPE (as in GPT-2 and tiktoken)   model "gpt2", merges, a named pre-tokenizer
    SentencePiece BPE (as in Llama 2)           model "llama", scores, byte fallback

Everything is read from the tokenizer of the training, whatever files it came from.
Source: llama.cpp's ``llama-vocab.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gguf import GGUFWriter, TokenType

from luthier.errors import ModelError
from luthier.models.protocols import HfTokenizer
from luthier.models.tokenizer.tiktoken import PATTERN
from luthier.models.tokenizer.tokenizer import Tokenizer

_QWEN2 = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_LAST_OF_DEEPSEEK = "[一-龥ࠀ-一가-퟿]+"
_INSTEAD = "use --to hf, which stock transformers loads"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as llama.cpp stores it.

    tokens, types, scores: by token id.
    prefix: add a space before text. strips: control tokens remove the white space after them (Phi-3).
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    prefix: bool = False
    strips: bool = False


def read(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Translate a tokenizer. Raises ModelError if llama.cpp has no equivalent.

    size: number of rows of the embedding; ids past the vocabulary become unused tokens.
    """
    description = tokenizer.described()
    model, added_tokens = description["model"], description["added_tokens"]
    assert isinstance(model, dict) and isinstance(added_tokens, list)
    added = {t["id"]: t for t in added_tokens}
    if model["type"] != "BPE":
        raise ModelError(f"a model with a {model['type']} vocabulary cannot be written as GGUF", _INSTEAD)
    names = {i: text for text, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    steps = _steps(description["pre_tokenizer"])
    sentencepiece = not any(c["type"] == "ByteLevel" for c in steps)
    size = max(size, max(names) + 1)
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    types = [_type(i, names, added, model) for i in range(size)]
    strips = any(t["rstrip"] for t in added.values())
    if not sentencepiece:
        return Vocabulary(
            "gpt2", _pre_tokenizer(steps, bool(model["ignore_merges"])), tokens, types, [" ".join(p) for p in pairs]
        )
    # llama.cpp joins the pair with the best score, BPE the pair whose merge comes first: score = -rank of the merge
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks[t]) if t in ranks and types[i] == TokenType.NORMAL else -1e6 for i, t in enumerate(tokens)]
    prefix = _adds_prefix(description["normalizer"]) or any(c.get("prepend_scheme") == "always" for c in steps)
    return Vocabulary("llama", "default", tokens, types, [], scores, prefix, strips)


def write(
    writer: GGUFWriter, vocabulary: Vocabulary, stop_ids: Sequence[int], hf: HfTokenizer, template: str | None
) -> None:
    """Add vocabulary, special tokens, the first three stop tokens and the chat template, if any, to the file's header.

    llama.cpp adds no tokens to a prompt: the template writes all of them, as in training.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    for add, token in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), stop_ids):  # noqa: B905
        add(int(token))
    for add, special in (
        (writer.add_bos_token_id, hf.bos_token_id),
        (writer.add_unk_token_id, hf.unk_token_id),
        (writer.add_pad_token_id, hf.pad_token_id),
    ):
        if special is not None:
            add(int(special))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _type(
    i: int, names: Mapping[int, str], added: Mapping[int, Mapping[str, object]], model: Mapping[str, object]
) -> int:
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


def _steps(pre_tokenizer: object) -> list[Mapping[str, object]]:
    """List the steps of a pre-tokenizer as described in ``tokenizer.json``."""
    if not isinstance(pre_tokenizer, Mapping):
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _pre_tokenizer(steps: Sequence[Mapping[str, object]], ignore_merges: bool) -> str:
    """Return llama.cpp's name of a pre-tokenizer. Raises ModelError if it has none that is equivalent."""
    names = tuple(_step_name(s) for s in steps)
    known = {
        ("bytes by words",): "gpt-2",
        ("digits", "bytes by words"): "smollm",
        (_QWEN2, "bytes"): "qwen2",
        (PATTERN, "bytes"): "llama-bpe" if ignore_merges else "chatglm-bpe",
    }
    name = known.get(names)
    if name is None and names[-3:] == (_LAST_OF_DEEPSEEK, "digits", "bytes"):
        name = "deepseek-llm"
    if name is None:
        raise ModelError("llama.cpp has no pre-tokenizer that splits text as this model's tokenizer does", _INSTEAD)
    return name


def _step_name(step: Mapping[str, object]) -> str:
    """Name a step of a pre-tokenizer; a split is named by its regular expression."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "bytes by words" if use_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str(pattern)}}:
            return pattern
    return f"? {step['type']}"


def _adds_prefix(normalizer: object) -> bool:
    """Whether the normalizer adds a "▁" before every piece of text."""
    if not isinstance(normalizer, Mapping):
        return False
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return any(s["type"] == "Prepend" for s in steps)
