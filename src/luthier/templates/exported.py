"""Convert a template to a jinja ``chat_template`` for other tools, with the run's system prompt as its default."""

from __future__ import annotations

import json
from dataclasses import dataclass

from luthier.templates import ChatML, Jinja, SystemAsUser, Turns, same_text
from luthier.templates.jinja import Render
from luthier.types import Template


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """The tokenizer's own chat template: a function that runs it, and its text."""

    render: Render
    source: str


def chat_template(template: Template, own: OwnTemplate | None, system: str | None) -> str:
    """Return a jinja template that writes what ``template`` writes; ``system`` is the default system message.

    If the tokenizer's own template writes the same text it is used, since it may support more (such as tools).
    """
    inner = template.inner if isinstance(template, SystemAsUser) else template
    opening = ""
    if system:
        opening += _OPENING.format(system=json.dumps(system, ensure_ascii=False))
    if isinstance(template, SystemAsUser):
        opening += _SYSTEM_AS_USER
    if isinstance(inner, Jinja):
        dated = '{%- set date_string = "26 Jul 2024" -%}' if "date_string" in inner.source else ""
        return opening + dated + inner.source
    assert isinstance(inner, ChatML | Turns)
    return opening + (own.source if own and same_text(inner, own.render) else inner.jinja())


_OPENING = (
    "{{%- if messages[0]['role'] != 'system' -%}}"
    "{{%- set messages = [{{'role': 'system', 'content': {system}}}] + messages -%}}{{%- endif -%}}"
)
_SYSTEM_AS_USER = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set messages = [{'role': messages[1]['role'], 'content': "
    "messages[0]['content'] + \"\\n\\n\" + messages[1]['content']}] + messages[2:] -%}{%- endif -%}"
)
