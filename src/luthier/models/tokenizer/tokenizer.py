"""A model's tokenizer and chat template behind the few methods that luthier needs."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from jinja2.exceptions import TemplateError as JinjaError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.errors import ModelError, TemplateError
from luthier.models.checkpoint_reader import read_json
from luthier.models.protocols import HfTokenizer
from luthier.models.tokenizer import sentencepiece, tiktoken
from luthier.templates import RefusedConversation
from luthier.types import Encoding, Message

_VOCABULARY = "tokenizer.model"
TOKENIZER_FILES = (
    *("tokenizer.json", _VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_RESERVED = re.compile(r"<reserved_\d+>")  # Baichuan's turn markers are two of these
_MARKER = re.compile(r"<[|｜]?[^<>\s]+[|｜]?>|\[/?[A-Z_]+\]")
# Ordinary text that some vocabularies (Baichuan, Gemma) keep whole.
_HTML = re.compile(
    r"</?(a|b|br|code|div|em|h[1-6]|hr|i|img|li|ol|p|pre|span|strong|sub|sup|table|tbody|td|th|thead|tr|ul)/?>"
)
# Templates that write the date get this one (Llama 3's own fallback): training and chat must not differ by the day.
_DATE = "26 Jul 2024"


class Tokenizer:
    """``ChatTokenizer`` over a fast Hugging Face tokenizer (kept at ``.hf``)."""

    def __init__(self, hf: HfTokenizer) -> None:
        self.hf = hf
        self._fast = hf.backend_tokenizer
        self._fast.no_padding()
        self._fast.no_truncation()

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding]:
        return self._fast.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def _cuts(self) -> Cuts:
        return Cuts(self._fast)

    def encode_ids(self, texts: Sequence[str]) -> list[bytes]:
        return self._cuts.encode(texts)

    def is_cut(self, token: str) -> bool:
        return token in self._cuts.tokens

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Special added tokens, and other added ones that look like markers (``<|im_end|>``, ``[INST]``) and are not
        HTML."""
        added = [(t.special, t.content) for t in self._fast.get_added_tokens_decoder().values()]
        return tuple(t for special, t in added if special or (_MARKER.fullmatch(t) and not _HTML.fullmatch(t)))

    def token_id(self, text: str) -> int | None:
        ids = self._fast.encode(text, add_special_tokens=False).ids
        return int(ids[0]) if len(ids) == 1 else None

    def text_of(self, token: int) -> str | None:
        found: str | None = self._fast.id_to_token(token)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text, control tokens included (for showing them).

        A character in several tokens is the last one's, and the others add nothing.
        """
        found: list[str] = []
        shown = ""
        for count in range(1, len(ids) + 1):
            text = self._fast.decode(list(ids[:count]), skip_special_tokens=False)
            if text.endswith("\ufffd") and count < len(ids):  # bytes of a character; those before may be hidden too
                found.append("")
                continue
            grown = text.startswith(shown)
            found.append(text[len(shown) :] if grown else "\ufffd" + text.rpartition("\ufffd")[2])
            shown = text
        return found

    @property
    def chat_template(self) -> str | None:
        found = self.hf.chat_template
        return found if isinstance(found, str) else None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The model's own chat template. Raises RefusedConversation where the template does."""
        source = self.chat_template or ""
        if "strftime_now" in source and "date_string" not in source:
            raise TemplateError(
                "the model's chat template writes today's date, so tomorrow's prompt would not be the trained one",
                "choose another template: --set data.template=chatml",
            )
        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text: str = self.hf.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_DATE
            )
        except (JinjaError, TypeError, ValueError) as e:
            raise RefusedConversation(str(e)) from None
        return text

    def described(self) -> dict[str, object]:
        """The content of tokenizer.json for this tokenizer."""
        content: dict[str, object] = json.loads(self._fast.to_str())
        return content

    def digest(self) -> str:
        """SHA-256 of the vocabulary, its rules and its added tokens."""
        return hashlib.sha256(self._fast.to_str().encode("utf-8")).hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a published checkpoint. Raises ModelError where the directory holds none that can be read
    without the model's own code.

    Baichuan and GLM-4 (original) publish a vocabulary and code: the vocabulary alone is read. Llama checkpoints with a
    SentencePiece model (Yi) are held to it; tokenizer.json is never rebuilt into something that loses spaces (DeepSeek)
    or what follows a special token (Phi-3). All others are as ``AutoTokenizer`` loads them.
    """
    kind = read_json(path / "config.json").get("model_type")
    whole = (path / "tokenizer.json").is_file()
    if kind == "baichuan":
        return Tokenizer(_from_sentencepiece(path, sentencepiece.read(path / _VOCABULARY), add_dummy_prefix=False))
    if kind in ("chatglm", "glm") and not whole:
        return Tokenizer(_from_tiktoken(path))
    if kind in ("chatglm", "phi3") and whole:
        return Tokenizer(_read(path, PreTrainedTokenizerFast))
    hf = _read(path, AutoTokenizer)
    if not getattr(hf, "is_fast", False):
        raise ModelError(f"{path}: its tokenizer has no fast form (tokenizer.json)", "download tokenizer.json too")
    if kind == "llama" and (exact := _held_to_sentencepiece(path, hf)):
        return Tokenizer(exact)
    if whole and not _keeps_spaces(hf) and _keeps_spaces(verbatim := _read(path, PreTrainedTokenizerFast)):
        return Tokenizer(verbatim)
    return Tokenizer(hf)


def _read(path: Path, loader: type[AutoTokenizer] | type[PreTrainedTokenizerFast]) -> HfTokenizer:
    """loader: AutoTokenizer, which may rebuild a tokenizer.json, or PreTrainedTokenizerFast, which takes it as is."""
    try:
        hf: HfTokenizer = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises many kinds for a missing or damaged file
        raise ModelError(
            f"{path}: its tokenizer cannot be read ({' '.join(str(e).split())[:200]})", "download the model again"
        ) from None
    return hf


def _keeps_spaces(hf: HfTokenizer) -> bool:
    """False where a byte-level vocabulary was wrapped in SentencePiece's treatment of spaces."""
    text, fast = "a  b\n c", hf.backend_tokenizer
    return bool(fast.decode(fast.encode(text, add_special_tokens=False).ids) == text)


def _held_to_sentencepiece(path: Path, hf: HfTokenizer) -> HfTokenizer | None:
    """A Llama checkpoint's tokenizer made from its SentencePiece model, where ``hf`` is not equal to that; else None.

    Where the model asks for a dummy prefix, checkpoints differ in what follows a special token: ``hf`` is kept.
    """
    if _names(path).get("tokenizer_class") not in (None, "LlamaTokenizer", "LlamaTokenizerFast"):
        return None
    try:
        proto = sentencepiece.read(path / _VOCABULARY)
    except ModelError:  # none, or of another kind: then tokenizer.json alone counts
        return None
    added = hf.backend_tokenizer.get_added_tokens_decoder().values()
    markers = [t.content for t in added if t.special and not (t.lstrip or t.rstrip)]
    if proto.normalizer_spec.add_dummy_prefix or sentencepiece.agrees(hf.backend_tokenizer, proto, markers):
        return None
    return _from_sentencepiece(path, proto, add_dummy_prefix=False)


def _from_sentencepiece(path: Path, proto: ModelProto, add_dummy_prefix: bool) -> HfTokenizer:
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    spec, pieces = proto.trainer_spec, [p.piece for p in proto.pieces]
    names = _names(path)
    special = {name for key, value in names.items() if key.endswith(("_token", "_tokens")) for name in _contents(value)}
    declared = {
        i: AddedToken(piece, special=True, normalized=False)
        for i, piece in enumerate(pieces)
        if piece in special or _RESERVED.fullmatch(piece)
    } | _declared(path)
    fast = sentencepiece.from_proto(proto, declared, path / _VOCABULARY)
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.unk_id}
    tokens = {key: fast.id_to_token(i) or "" for key, i in ids.items() if 0 <= i < len(pieces)}
    return _wrap(path, fast, tokens)


def _from_tiktoken(path: Path) -> HfTokenizer:
    fast = tiktoken.from_ranks(tiktoken.read(path / _VOCABULARY), _declared(path), path / _VOCABULARY)
    end = "<|endoftext|>"
    return _wrap(path, fast, {"eos_token": end, "pad_token": end})


def _wrap(path: Path, fast: FastTokenizer, tokens: dict[str, str]) -> HfTokenizer:
    """``fast`` as transformers' tokenizer. tokens: its special tokens, where the directory's files name no others."""
    names = _names(path)
    for key in _ROLES:
        if found := _contents(names.get(key)):
            tokens[key] = found[0]
    strangers = [f"{key} {token!r}" for key, token in tokens.items() if fast.token_to_id(token) is None]
    if strangers:
        raise ModelError(f"{path}: {', '.join(strangers)} is not in its vocabulary", "download the model again")
    hf: HfTokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        chat_template=_chat_template(path),
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **tokens,
        **{key: names[key] for key in ("model_max_length",) if key in names},
    )
    return hf


def _names(path: Path) -> dict[str, object]:
    """What the directory's configuration files say of its tokenizer."""
    return read_json(path / "special_tokens_map.json") | read_json(path / "tokenizer_config.json")


def _contents(value: object) -> list[str]:
    """The texts in one entry of a configuration: a text, a token written as a table, or a list of them."""
    if isinstance(value, list):
        return [text for one in value for text in _contents(one)]
    found = value.get("content") if isinstance(value, dict) else value
    return [found] if isinstance(found, str) else []


def _declared(path: Path) -> dict[int, AddedToken]:
    """Added tokens by id. ``single_word`` is left out: a ``</s>`` after a letter is an end too."""
    try:
        if table := _names(path).get("added_tokens_decoder"):
            if not isinstance(table, dict):
                raise TypeError("added_tokens_decoder is not a table")
            return {
                int(i): AddedToken(
                    t["content"],
                    lstrip=t.get("lstrip", False),
                    rstrip=t.get("rstrip", False),
                    normalized=False,
                    special=t.get("special", False),
                )
                for i, t in table.items()
            }
        more = read_json(path / "added_tokens.json")
        return {int(str(i)): AddedToken(text, normalized=False, special=True) for text, i in more.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ModelError(f"{path}: its added tokens cannot be read ({e!r})", "download the model again") from None


def _chat_template(path: Path) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = read_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
    return found if isinstance(found, str) else None


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds a vocabulary at all."""
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


_CHARACTERS = 1 << 22  # of remembered parts: at most about 64 MB with their ids


class Cuts:
    """Ids of many texts that share most of their parts: each distinct part is tokenised once.

        <|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nAye
        `---------------------------'`----------'`---------------------'`----------'`-----------------------'

    A fast tokenizer first cuts a text at the added tokens that are matched before normalisation, leftmost first, and
    then treats what lies between them on its own. So a text's ids are the ids of its parts, one after another, where
    each part but the first begins with such a token, if no other added token can reach over the cut. ``_is_cut`` says
    which tokens do; if none does, a text is one part. The definition is ``encode_batch`` on the whole text.

    ``fast``: a tokenizers.Tokenizer without padding and truncation, whose added tokens do not change any more.
    """

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        first = _taken_first(fast)
        cut = [t.content for t in first if _is_cut(t, first)] if not fast.encode_special_tokens else []
        self.tokens = frozenset(cut)
        longest = sorted(cut, key=len, reverse=True)
        self._split = re.compile(f"(?={'|'.join(map(re.escape, longest))})").split if cut else lambda text: [text]
        self._known: dict[str, bytes] = {"": b""}
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text as int32, 4 bytes a token; no special tokens are added."""
        parted = [self._split(text) for text in texts]
        if self._characters > _CHARACTERS:
            self._known, self._characters = {"": b""}, 0
        known = self._known
        new = list({part: None for parts in parted for part in parts if part not in known})
        for part, encoding in zip(new, self._fast.encode_batch_fast(new, add_special_tokens=False), strict=True):
            known[part] = array("i", encoding.ids).tobytes()
            self._characters += len(part)
        return [b"".join([known[part] for part in parts]) for parts in parted]


def _taken_first(fast: FastTokenizer) -> list[AddedToken]:
    """The added tokens that are matched in the text as it is: all of them where nothing is normalised."""
    added = fast.get_added_tokens_decoder().values()
    kind = json.loads(fast.normalizer.__getstate__()) if fast.normalizer else {}
    as_it_is = not kind or kind.get("normalizers") == []
    return [t for t in added if as_it_is or not t.normalized]


def _is_cut(token: AddedToken, others: Sequence[AddedToken]) -> bool:
    """Whether ``token`` is matched wherever its text stands, and what is before it cannot tell that it follows."""
    text = token.content
    if not text or token.lstrip or any(t.single_word for t in others):
        return False
    return not any(_overlap(text, t.content) for t in others)


def _overlap(a: str, b: str) -> bool:
    """Whether two tokens, or a token and itself one place further, can claim the same characters."""
    inside = a != b and (a in b or b in a)
    return inside or any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b))))
