"""A model's tokenizer and chat template behind the few methods that luthier needs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError
from transformers import AutoTokenizer

from luthier.errors import ModelError, TemplateError
from luthier.templates import RefusedConversation
from luthier.types import Encoding, Message

_MARKER = re.compile(r"<[|｜]?[^<>\s]+[|｜]?>|\[/?[A-Z_]+\]")
# Templates that write the date get this one (Llama 3's own fallback): training and chat must not differ by the day.
_DATE = "26 Jul 2024"


class Tokenizer:
    """``ChatTokenizer`` over a fast Hugging Face tokenizer (kept at ``.hf``)."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._fast = hf.backend_tokenizer
        self._fast.no_padding()
        self._fast.no_truncation()

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding]:
        found: Sequence[Encoding] = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return found

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Special added tokens, and other added ones that look like markers (``<|im_end|>``, ``[INST]``)."""
        added = self._fast.get_added_tokens_decoder().values()
        return tuple(t.content for t in added if t.special or _MARKER.fullmatch(t.content))

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
        """What each token adds to the text, control tokens included (for showing them)."""
        texts = [self._fast.decode(list(ids[: i + 1]), skip_special_tokens=False) for i in range(len(ids))]
        return [b[len(a) :] if b.startswith(a) else b for a, b in zip(["", *texts], texts, strict=False)]

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

    def digest(self) -> str:
        """SHA-256 of the vocabulary, its rules and its added tokens."""
        return hashlib.sha256(self._fast.to_str().encode("utf-8")).hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises ModelError where the directory holds no tokenizer that can be read without the model's own code."""
    try:
        hf = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises many kinds for a missing or damaged file
        raise ModelError(
            f"{path}: its tokenizer cannot be read ({' '.join(str(e).split())[:200]})", "download the model again"
        ) from None
    if not getattr(hf, "is_fast", False):
        raise ModelError(f"{path}: its tokenizer has no fast form (tokenizer.json)", "download tokenizer.json too")
    return Tokenizer(hf)
