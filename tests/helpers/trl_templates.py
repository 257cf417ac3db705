"""The chat templates that trl ships, on a small tokenizer whose vocabulary has their markers.

The files are read where trl is installed; ``{% generation %}`` in the ones for training marks what trl trains.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from tokenizers import AddedToken

from luthier.models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luthier.templates import OwnTemplate, pick
from luthier.templates.own import written_stop
from luthier.types import Template
from tests.conftest import TOKENIZER

_SPEC = importlib.util.find_spec("trl")
FOLDER = Path(_SPEC.origin).parent / "chat_templates" if _SPEC and _SPEC.origin else Path("trl-is-not-installed")
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja"))
_MARKER = re.compile(r"<[|｜]?[^<>\s'{}]+[|｜]?>|\[/?[A-Z_]+\]")
# templates that write no stop token after the last reply: those of the model's configuration
CONFIGURED = {"glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>")}


def with_markers(source: str) -> Tokenizer:
    """Return the small tokenizer with a template, and each of the template's markers as one token."""
    hf = load_tokenizer(TOKENIZER).hf
    hf.chat_template = source
    if "bos_token" in source:
        hf.add_special_tokens({"bos_token": "<s>"})
    hf.add_tokens([AddedToken(m, special=True, normalized=False) for m in sorted(set(_MARKER.findall(source)))])
    return Tokenizer(hf)


def tokenizer_of(name: str) -> Tokenizer:
    return with_markers((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def template_of(name: str, tokenizer: Tokenizer) -> Template:
    """Choose the template as a run does; stop tokens are those that it writes."""
    own = tokenizer.own_template
    assert isinstance(own, OwnTemplate)
    known = CONFIGURED.get(name.removesuffix("_training"), ())
    tokens = [t for t in known if tokenizer.token_id(t) is not None]
    written = written_stop(own, tokenizer.control_tokens, tokens)
    return pick("auto", own, (*([written] if written else []), *tokens))
