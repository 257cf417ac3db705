"""Render conversations with chat templates, and choose the one of a model.

``auto`` runs the model's own template, or uses a native one in its place if both write the same text for every probe
conversation, including the default system prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress

from luthier.errors import TemplateError, nearest
from luthier.templates import baichuan2, deepseek, glm4, llama3, phi3
from luthier.templates.chatml import END, START, ChatML
from luthier.templates.jinja import Jinja, OwnForTools
from luthier.templates.own import WRITTEN, OwnTemplate, RefusedConversation, Render, writes_thoughts, writes_tools
from luthier.templates.system_as_user import SystemAsUser
from luthier.templates.turns import Turns
from luthier.types import ChatTokenizer, Message, SystemRole, Template

__all__ = [
    "NATIVE", "ChatML", "Jinja", "OwnForTools", "OwnTemplate", "RefusedConversation", "SystemAsUser", "Turns",
    "digest", "from_description", "pick", "same_text", "stop_ids",
]  # fmt: skip

# the published versions of each format, the current one first; ChatML only varies in its default system prompt
NATIVE: dict[str, tuple[Turns, ...]] = {
    "phi3": phi3.FORMS,
    "baichuan2": baichuan2.FORMS,
    "glm4": glm4.FORMS,
    "deepseek": deepseek.FORMS,
    "llama3": llama3.FORMS,
}
# what the published jinja template writes after the last reply's text, in place of our stop token and gap
_ENDINGS = {"phi3": phi3.ENDING, "glm4": glm4.ENDING}


def pick(
    choice: str,
    own: OwnTemplate | None,
    stop: tuple[str, ...],
    family: str | None = None,
    system_role: SystemRole = "template",
) -> Template:
    """Choose the template of a run. Raises TemplateError.

    choice:      ``data.template``.
    own:         the tokenizer's own template, if it has one.
    stop:        texts of the model's stop tokens.
    family:      name of the template that the model was trained with, for models that are published without one.
    system_role: ``data.system_role``.
    """
    template = _pick(choice, own, stop, family)
    return SystemAsUser(template) if system_role == "merge" else template


def _pick(choice: str, own: OwnTemplate | None, stop: tuple[str, ...], family: str | None) -> Template:
    if choice not in ("auto", "jinja"):
        return _named(choice, own)
    if own is None:
        if choice == "auto" and family is not None:
            return _named(family, None)
        raise TemplateError(
            "the model has no chat template (is it a base model?), so its prompt format is unknown",
            f"use a chat model, or choose a template: --set data.template={family or 'chatml'}",
        )
    render = own.render
    with suppress(RefusedConversation):
        render(_PROBES[0], True)  # raises TemplateError if the text depends on today's date
    native = next((n for n in _natives(render) if same_text(n, render)), None)
    if native and own.source.startswith(WRITTEN) and not _has_system(native) and not _refuses_system(render):
        native = None  # the training accepted system messages that the native template refuses
    template = Jinja(own, stop)
    if choice == "auto" and native:
        return OwnForTools(native, template) if writes_tools(own) or writes_thoughts(own) else native
    if native:
        try:
            template.spans((Message("user", "a"), Message("assistant", "b")))
        except TemplateError as e:
            raise TemplateError(e.message, f"--set data.template={native.name}") from None
    return template


def _named(name: str, own: OwnTemplate | None) -> Template:
    """Return a native template by name, in the version that matches the model's own template, else the current one."""
    if name not in ("chatml", *NATIVE):
        known = ("auto", "jinja", "chatml", *NATIVE)
        raise TemplateError(
            f"data.template: '{name}' is not a template; choose one of {', '.join(known)}",
            f"--set data.template={nearest(name, known) or 'auto'}",
        )
    if name == "chatml":
        return ChatML(_chatml_default(own.render) if own else None)
    forms = NATIVE[name]
    return next((f for f in forms if own and same_text(f, own.render)), forms[0])


def _natives(render: Render) -> Iterator[ChatML | Turns]:
    yield ChatML(_chatml_default(render))
    for forms in NATIVE.values():
        yield from forms


def from_description(described: Mapping[str, object], own: OwnTemplate | None, stop: tuple[str, ...]) -> Template:
    """Rebuild the template that an adapter was trained with, from what ``describe`` recorded. Raises TemplateError.

    own, stop: as in ``pick``.
    """
    plain = {k: v for k, v in described.items() if k not in ("system_role", "own")}
    template = _described(plain, own, stop)
    for_tools = described.get("own")
    if isinstance(for_tools, Mapping):
        template = OwnForTools(template, _same_own(for_tools, own, stop))
    return SystemAsUser(template) if described.get("system_role") == "merge" else template


def _described(described: Mapping[str, object], own: OwnTemplate | None, stop: tuple[str, ...]) -> Template:
    name = described["name"]
    if name == "chatml":
        default = described["default_system"]
        return ChatML(None if default is None else str(default))
    if name in NATIVE:
        try:
            return Turns.read(described)
        except TypeError as e:
            raise TemplateError(
                f"the adapter's record of its {name} template cannot be read ({e})", "upgrade luthier"
            ) from None
    if name != "jinja":
        raise TemplateError(
            f"the adapter was trained with template {name}, which this version does not know", "upgrade luthier"
        )
    return _same_own(described, own, stop)


def _same_own(described: Mapping[str, object], own: OwnTemplate | None, stop: tuple[str, ...]) -> Jinja:
    """Return the tokenizer's own template. Raises TemplateError unless it is the described one."""
    if own is None:
        raise TemplateError(
            "the adapter was trained with the base model's chat template, but the base model has none",
            "use the base model directory that the adapter was trained on",
        )
    recorded = {"date": own.date, "for_tools": own.for_tools, **described}  # earlier versions did not record these
    if own != OwnTemplate(own.render, *(str(recorded.get(key, "")) for key in ("source", "for_tools", "date"))):
        raise TemplateError(
            "the base model's chat template is not the one that the adapter was trained with",
            "restore the base model's original chat_template",
        )
    return Jinja(own, stop)


def digest(template: Template) -> str:
    """Return the hex SHA-256 of what identifies a template."""
    text = json.dumps(dict(template.describe()), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def stop_ids(template: Template, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Return the ids of the template's stop tokens. Raises TemplateError if a marker is not one token."""
    for text in (*template.stop, *template.markers):
        if tokenizer.token_id(text) is None:
            fitting = _fitting(tokenizer)
            raise TemplateError(
                f"{text} is not one token of this model's tokenizer, so the template {template.name} does not fit: the "
                "model would read its markers as ordinary text",
                f"--set data.template={fitting or 'auto'}",
            )
    return tuple(token for text in template.stop if (token := tokenizer.token_id(text)) is not None)


def _fitting(tokenizer: ChatTokenizer) -> str | None:
    """Return the name of a template whose markers are all in this vocabulary, or None."""
    markers = {"chatml": ChatML().markers, **{name: forms[0].markers for name, forms in NATIVE.items()}}
    return next((n for n, texts in markers.items() if all(tokenizer.token_id(t) is not None for t in texts)), None)


_PROBES: tuple[tuple[Message, ...], ...] = (
    (Message("user", " What is this?\n"),),
    (Message("system", "Be brief. "), Message("user", "你好")),
    (Message("user", "a"), Message("assistant", " b\n\n"), Message("user", "c")),
    (Message("system", " s"), Message("user", "a"), Message("assistant", "<b>"), Message("user", "c\td")),
    (Message("user", "a"), Message("assistant", "<think>\nhm\n</think>\n\nb"), Message("user", "c")),
)


def _chatml_default(render: Render) -> str | None:
    """Return the system prompt that a ChatML-like template adds by itself, or None if it adds none."""
    try:
        text = render([Message("user", "probe")], True)
    except (RefusedConversation, TemplateError):
        return None
    head = f"{START}system\n"
    body = text.partition(f"{END}\n{START}user\n")[0]
    return body.removeprefix(head) if text.startswith(head) else None


def same_text(native: ChatML | Turns, render: Render) -> bool:
    """Whether a native template writes the same prompts and conversations as ``render``, for every probe conversation.

    After the last reply, the known ending of a published template is accepted too.
    """
    try:
        for probe in _PROBES:
            if probe[0].role == "system" and not _has_system(native):
                continue
            prompt, reply = native.prompt(probe), Message("assistant", " x \n")
            spans = native.spans((*probe, reply))
            text = "".join(s.text for s in spans)
            allowed = [text]
            if native.name in _ENDINGS:
                allowed.append(prompt + spans[-2].text.removesuffix(native.stop[0]) + _ENDINGS[native.name])
            if prompt != render(probe, True) or render((*probe, reply), False) not in allowed:
                return False
    except (RefusedConversation, TemplateError):
        return False
    return True


def _has_system(native: ChatML | Turns) -> bool:
    return not isinstance(native, Turns) or native.system is not None


def _refuses_system(render: Render) -> bool:
    try:
        render(_PROBES[1], True)
    except RefusedConversation:
        return True
    return False
