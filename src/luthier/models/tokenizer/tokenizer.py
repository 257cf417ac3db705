"""Load a model's tokenizer and chat template and provide the methods that luthier needs."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.errors import ModelError
from luthier.models.checkpoint_reader import read_json
from luthier.models.protocols import HfTokenizer
from luthier.models.tokenizer import sentencepiece, tiktoken
from luthier.models.tokenizer.chat_template import TEMPLATE_FILE, own_templates, reads_only_parts, render
from luthier.templates import OwnTemplate
from luthier.templates.own import DATE, with_fixed_date
from luthier.types import Encoding, Message, Tools, as_dict

_VOCABULARY = "tokenizer.model"
TOKENIZER_FILES = (
    *("tokenizer.json", _VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", TEMPLATE_FILE),
)
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_RESERVED = re.compile(r"<reserved_\d+>")  # Baichuan's turn markers are two of these
_MARKER = re.compile(r"<[|｜]?[^<>\s]+[|｜]?>|\[/?[A-Z_]+\]")
_PAIR = re.compile(r"</?(\w+)>")  # <think> and </think>: markup that the model writes as text
# Ordinary text that is one token in some vocabularies (Baichuan, Gemma).
_HTML = re.compile(
    r"</?(a|b|br|code|div|em|h[1-6]|hr|i|img|li|ol|p|pre|span|strong|sub|sup|table|tbody|td|th|thead|tr|ul)/?>"
)


class Tokenizer:
    """A ``ChatTokenizer`` backed by a fast Hugging Face tokenizer (``.hf``)."""

    def __init__(self, hf: HfTokenizer) -> None:
        self.hf = hf
        self._fast = hf.backend_tokenizer
        self._fast.no_padding()
        self._fast.no_truncation()
        self._reads_parts: dict[str, bool] = {}

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding]:
        """Encode texts without adding special tokens."""
        return self._fast.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def _cuts(self) -> Cuts:
        return Cuts(self._fast)

    def encode_ids(self, texts: Sequence[str]) -> list[bytes]:
        """Encode texts to int32 ids, 4 bytes per token; each distinct part is encoded only once."""
        return self._cuts.encode(texts)

    def splits_text_at(self, token: str) -> bool:
        """Return whether texts can be split before this token without changing their ids."""
        return token in self._cuts.tokens

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The special added tokens, and others that look like markers (``<|im_end|>``, ``[INST]``) but not like markup.

        Markup is HTML, and every pair such as ``<think>`` and ``</think>``.
        """
        added = {t.content: t.special for t in self._fast.get_added_tokens_decoder().values()}

        def is_markup(text: str) -> bool:
            pair = _PAIR.fullmatch(text)
            return bool(_HTML.fullmatch(text) or (pair and {f"<{pair[1]}>", f"</{pair[1]}>"} <= added.keys()))

        return tuple(t for t, special in added.items() if special or (_MARKER.fullmatch(t) and not is_markup(t)))

    def token_id(self, text: str) -> int | None:
        """Return the id of a text that is exactly one token, else None."""
        ids = self._fast.encode(text, add_special_tokens=False).ids
        return int(ids[0]) if len(ids) == 1 else None

    def text_of(self, token: int) -> str | None:
        """Return the text of a token id, or None if the id is unused."""
        text: str | None = self._fast.id_to_token(token)
        return text

    def text(self, ids: Sequence[int]) -> str:
        """Decode ids to text, control tokens included."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=False)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text without control tokens."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds, control tokens included, for display.

        A character that spans several tokens belongs to the last one; the others get an empty string.
        """
        pieces: list[str] = []
        decoded = ""
        for count in range(1, len(ids) + 1):
            text = self._fast.decode(list(ids[:count]), skip_special_tokens=False)
            if text.endswith("\ufffd") and count < len(ids):  # an incomplete character
                pieces.append("")
                continue
            extends = text.startswith(decoded)
            pieces.append(text[len(decoded) :] if extends else "\ufffd" + text.rpartition("\ufffd")[2])
            decoded = text
        return pieces

    @property
    def chat_template(self) -> str | None:
        """The source of the model's own chat template, if it has one; of several named ones, the default."""
        template = self.hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def own_template(self) -> OwnTemplate | None:
        """The model's own chat template, if it has one."""
        source, named = self.chat_template, self.hf.chat_template
        if not source:
            return None
        for_tools = named.get("tool_use", "") if isinstance(named, dict) else ""
        dated = any("strftime_now" in text for text in (source, for_tools))
        return OwnTemplate(self.render, source, for_tools, DATE.isoformat() if dated else "")

    def source(self, with_tools: bool) -> str:
        """Return the text of the template that transformers would choose, with a fixed date. Raises TemplateError."""
        named = self.hf.chat_template
        source = named.get("tool_use") if with_tools and isinstance(named, dict) else None
        return with_fixed_date(source or self.chat_template or "")

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools = ()) -> str:
        """Render messages with the model's own chat template. Raises RefusedConversation if it refuses them."""
        source = self.source(bool(tools))
        if source not in self._reads_parts:
            self._reads_parts[source] = reads_only_parts(self.hf, source)
        rows = list(map(as_dict, messages))
        if self._reads_parts[source]:
            rows = [{**row, "content": [{"type": "text", "text": row["content"]}]} for row in rows]
        return render(self.hf, source, rows, add_generation_prompt, tools)

    def described(self) -> dict[str, object]:
        """Return the content of this tokenizer's tokenizer.json."""
        content: dict[str, object] = json.loads(self._fast.to_str())
        return content

    def digest(self) -> str:
        """Return the SHA-256 of the vocabulary, its rules and its added tokens."""
        return hashlib.sha256(self._fast.to_str().encode("utf-8")).hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a published checkpoint.

    Raises ModelError if the directory has no tokenizer that can be loaded without the model's own code.

    Baichuan and GLM-4 (original) publish a vocabulary and code: only the vocabulary is read. Llama checkpoints with a
    SentencePiece model (Yi) must agree with it, otherwise their tokenizer is rebuilt from it. tokenizer.json is loaded
    unchanged if transformers would lose spaces (DeepSeek) or text after special tokens (Phi-3). All others are loaded
    by ``AutoTokenizer``.
    """
    kind = read_json(path / "config.json").get("model_type")
    has_json = (path / "tokenizer.json").is_file()
    if kind == "baichuan":
        return Tokenizer(_from_sentencepiece(path, sentencepiece.read(path / _VOCABULARY), add_dummy_prefix=False))
    if kind in ("chatglm", "glm") and not has_json:
        return Tokenizer(_from_tiktoken(path))
    if kind in ("chatglm", "phi3") and has_json:
        return Tokenizer(_read(path, PreTrainedTokenizerFast))
    hf = _read(path, AutoTokenizer)
    if not getattr(hf, "is_fast", False):
        raise ModelError(f"{path}: its tokenizer has no fast form (tokenizer.json)", "download tokenizer.json too")
    if not hf.chat_template:
        hf.chat_template = own_templates(path)
    if kind == "llama" and (exact := _corrected(path, hf)):
        return Tokenizer(exact)
    if has_json and not _keeps_spaces(hf) and _keeps_spaces(verbatim := _read(path, PreTrainedTokenizerFast)):
        return Tokenizer(verbatim)
    return Tokenizer(hf)


def _read(path: Path, loader: type[AutoTokenizer] | type[PreTrainedTokenizerFast]) -> HfTokenizer:
    """Load a tokenizer with transformers. Raises ModelError.

    loader: AutoTokenizer, which may rebuild a tokenizer.json, or PreTrainedTokenizerFast, which loads it unchanged.
    """
    try:
        hf: HfTokenizer = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises many kinds for a missing or damaged file
        raise ModelError(
            f"{path}: its tokenizer cannot be read ({' '.join(str(e).split())[:200]})", "download the model again"
        ) from None
    return hf


def _keeps_spaces(hf: HfTokenizer) -> bool:
    """Return whether spaces survive; they do not if transformers treats a byte-level vocabulary as SentencePiece."""
    text, fast = "a  b\n c", hf.backend_tokenizer
    return bool(fast.decode(fast.encode(text, add_special_tokens=False).ids) == text)


def _corrected(path: Path, hf: HfTokenizer) -> HfTokenizer | None:
    """Rebuild a Llama tokenizer from its SentencePiece model if ``hf`` differs from it; otherwise return None.

    With a dummy prefix, checkpoints differ in the treatment of text after a special token, so ``hf`` is used unchanged.
    """
    if _settings(path).get("tokenizer_class") not in (None, "LlamaTokenizer", "LlamaTokenizerFast"):
        return None
    try:
        proto = sentencepiece.read(path / _VOCABULARY)
    except ModelError:  # absent or of another kind: only tokenizer.json defines the tokenizer
        return None
    added = hf.backend_tokenizer.get_added_tokens_decoder().values()
    markers = [t.content for t in added if t.special and not (t.lstrip or t.rstrip)]
    if proto.normalizer_spec.add_dummy_prefix or sentencepiece.agrees(hf.backend_tokenizer, proto, markers):
        return None
    return _from_sentencepiece(path, proto, add_dummy_prefix=False)


def _from_sentencepiece(path: Path, proto: ModelProto, add_dummy_prefix: bool) -> HfTokenizer:
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    spec, pieces = proto.trainer_spec, [p.piece for p in proto.pieces]
    roles = [value for key, value in _settings(path).items() if key.endswith(("_token", "_tokens"))]
    special = {text for value in roles for text in _contents(value)}
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
    """Wrap ``fast`` as a transformers tokenizer. Raises ModelError if a special token is not in its vocabulary.

    tokens: special tokens by role; the directory's configuration files override them.
    """
    settings = _settings(path)
    for key in _ROLES:
        if contents := _contents(settings.get(key)):
            tokens[key] = contents[0]
    unknown = [f"{key} {token!r}" for key, token in tokens.items() if fast.token_to_id(token) is None]
    if unknown:
        raise ModelError(f"{path}: {', '.join(unknown)} is not in its vocabulary", "download the model again")
    hf: HfTokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        chat_template=own_templates(path),
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **tokens,
        **{key: settings[key] for key in ("model_max_length",) if key in settings},
    )
    return hf


def _settings(path: Path) -> dict[str, object]:
    """Read the settings of the tokenizer from the directory's configuration files."""
    return read_json(path / "special_tokens_map.json") | read_json(path / "tokenizer_config.json")


def _contents(value: object) -> list[str]:
    """List the texts in one configuration entry: a string, a token object with ``content``, or a list of these."""
    if isinstance(value, list):
        return [text for item in value for text in _contents(item)]
    text = value.get("content") if isinstance(value, dict) else value
    return [text] if isinstance(text, str) else []


def _declared(path: Path) -> dict[int, AddedToken]:
    """Read the added tokens by id. Raises ModelError.

    ``single_word`` is ignored: a ``</s>`` directly after a letter is a stop token too.
    """
    try:
        if table := _settings(path).get("added_tokens_decoder"):
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


def has_tokenizer(path: Path) -> bool:
    """Return whether a directory contains a vocabulary."""
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


_MAX_CACHED_CHARACTERS = 1 << 22  # in cached parts: at most about 64 MB with their ids


class Cuts:
    """Encode many texts that share most of their parts, tokenising each distinct part once.

        <|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nAye
        `---------------------------'`----------'`---------------------'`----------'`-----------------------'

    A fast tokenizer first splits a text at the added tokens that are matched before normalisation, leftmost first, and
    then encodes the text between them separately. If no other added token can overlap the split, the ids of a text are
    therefore the concatenated ids of its parts, each of which (except the first) starts with such a token. ``_is_cut``
    selects the tokens for which this holds; without any, a text is one part. The result must equal ``encode_batch`` on
    the whole text.

    fast: a tokenizers.Tokenizer without padding and truncation, whose added tokens no longer change.
    """

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        first = _matched_before_normalisation(fast)
        cut = [t.content for t in first if _is_cut(t, first)] if not fast.encode_special_tokens else []
        self.tokens = frozenset(cut)
        longest = sorted(cut, key=len, reverse=True)
        self._split = re.compile(f"(?={'|'.join(map(re.escape, longest))})").split if cut else lambda text: [text]
        self._cache: dict[str, bytes] = {"": b""}
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Encode each text to int32 ids, 4 bytes per token, without adding special tokens."""
        parted = [self._split(text) for text in texts]
        if self._characters > _MAX_CACHED_CHARACTERS:
            self._cache, self._characters = {"": b""}, 0
        cache = self._cache
        new = list({part: None for parts in parted for part in parts if part not in cache})
        for part, encoding in zip(new, self._fast.encode_batch_fast(new, add_special_tokens=False), strict=True):
            cache[part] = array("i", encoding.ids).tobytes()
            self._characters += len(part)
        return [b"".join([cache[part] for part in parts]) for parts in parted]


def _matched_before_normalisation(fast: FastTokenizer) -> list[AddedToken]:
    """List the added tokens that are matched in the unnormalised text: all of them if there is no normalizer."""
    added = fast.get_added_tokens_decoder().values()
    kind = json.loads(fast.normalizer.__getstate__()) if fast.normalizer else {}
    no_normalizer = not kind or kind.get("normalizers") == []
    return [t for t in added if no_normalizer or not t.normalized]


def _is_cut(token: AddedToken, others: Sequence[AddedToken]) -> bool:
    """Return whether ``token`` is matched wherever its text occurs and never affects the ids of the text before it."""
    text = token.content
    if not text or token.lstrip or any(t.single_word for t in others):
        return False
    return not any(_overlap(text, t.content) for t in others)


def _overlap(a: str, b: str) -> bool:
    """Return whether occurrences of two tokens, or two occurrences of one token, can overlap."""
    inside = a != b and (a in b or b in a)
    return inside or any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b))))
