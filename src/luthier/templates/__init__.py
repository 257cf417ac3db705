"""Choosing the renderer. ``auto`` takes the model's own chat template, natively where it provably is ChatML.

A native template is only taken for a model's own one when both give the same text on every probe, default system
prompt included; otherwise the model's own template is run as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from luthier.errors import TemplateError
from luthier.templates.chatml import END, START, ChatML
from luthier.templates.jinja import Jinja, RefusedConversation, Render
from luthier.types import ChatTokenizer, Message, Template

__all__ = ["ChatML", "Jinja", "RefusedConversation", "digest", "from_description", "pick", "stop_ids"]


def pick(
    choice: Literal["auto", "chatml", "jinja"], render: Render | None, source: str | None, stop: tuple[str, ...]
) -> Template:
    """The template of a run.

    choice: ``data.template``.
    render: the tokenizer's own template, None where it has none; source: its text.
    stop:   texts of the model's stop tokens.
    """
    if choice == "chatml":
        return ChatML(_chatml_default(render) if render else None)
    if render is None or source is None:
        raise TemplateError(
            "the model has no chat template (is it a base model?), so it does not say how a prompt looks",
            "take a chat model, or choose a template: --set data.template=chatml",
        )
    if choice == "auto":
        native = ChatML(_chatml_default(render))
        if _same_text(native, render):
            return native
    return Jinja(render, source, stop)


def from_description(
    described: dict[str, Any], render: Render | None, source: str | None, stop: tuple[str, ...]
) -> Template:
    """The template an adapter was trained with, from what ``describe`` recorded."""
    if described["name"] == "chatml":
        return ChatML(described["default_system"])
    if render is None:
        raise TemplateError(
            "the adapter was trained with the base model's chat template, but the base model has none",
            "use the base model directory that the adapter was trained on",
        )
    if source is None or source != described["source"]:
        raise TemplateError(
            "the base model's chat template is not the one that the adapter was trained with",
            "put the base model's original chat_template back",
        )
    return Jinja(render, source, stop)


def digest(template: Template) -> str:
    """SHA-256 of what identifies a template."""
    text = json.dumps(dict(template.describe()), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def stop_ids(template: Template, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Ids of the template's stop tokens. Raises TemplateError for a stop that is not one token."""
    found: list[int] = []
    for text in template.stop:
        token = tokenizer.token_id(text)
        if token is None:
            raise TemplateError(
                f"{text} is not one token of this model's tokenizer, so a reply could never end by it",
                "use the model's own template: --set data.template=auto",
            )
        found.append(token)
    return tuple(found)


_PROBES: tuple[tuple[Message, ...], ...] = (
    (Message("user", " What is this?\n"),),
    (Message("system", "Be brief. "), Message("user", "你好")),
    (Message("user", "a"), Message("assistant", " b\n\n"), Message("user", "c")),
    (Message("system", " s"), Message("user", "a"), Message("assistant", "<b>"), Message("user", "c\td")),
)


def _chatml_default(render: Render) -> str | None:
    """The system prompt that a ChatML-like template adds by itself, None where it adds none."""
    try:
        text = render([Message("user", "probe")], True)
    except RefusedConversation:
        return None
    head = f"{START}system\n"
    body = text.partition(f"{END}\n{START}user\n")[0]
    return body.removeprefix(head) if text.startswith(head) else None


def _same_text(native: ChatML, render: Render) -> bool:
    try:
        for probe in _PROBES:
            reply = (*probe, Message("assistant", " x \n"))
            if native.prompt(probe) != render(probe, True) or _whole(native, reply) != render(reply, False):
                return False
    except RefusedConversation:
        return False
    return True


def _whole(template: Template, messages: Sequence[Message]) -> str:
    return "".join(span.text for span in template.spans(messages))
