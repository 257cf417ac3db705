"""A template as the ``chat_template`` that other tools run, with the run's system prompt as its default."""

from __future__ import annotations

import json
from dataclasses import dataclass

from luthier.templates import ChatML, Jinja, MergedSystem, Turns, same_text
from luthier.templates.jinja import Render
from luthier.types import Template


@dataclass(frozen=True, slots=True)
class Own:
    """The tokenizer's own template. render: it, running; source: its text."""

    render: Render
    source: str


def chat_template(template: Template, own: Own | None, system: str | None) -> str:
    """jinja that writes what ``template`` writes; a conversation without a system message gets ``system``.

    The tokenizer's own text is kept where both write the same, since it may know more (tools).
    """
    inner = template.inner if isinstance(template, MergedSystem) else template
    opening = ""
    if system:
        opening += _OPENING.format(system=json.dumps(system, ensure_ascii=False))
    if isinstance(template, MergedSystem):
        opening += _MERGED
    if isinstance(inner, Jinja):
        dated = '{%- set date_string = "26 Jul 2024" -%}' if "date_string" in inner.source else ""
        return opening + dated + inner.source
    assert isinstance(inner, ChatML | Turns)
    return opening + (own.source if own and same_text(inner, own.render) else inner.jinja())


_OPENING = (
    "{{%- if messages[0]['role'] != 'system' -%}}"
    "{{%- set messages = [{{'role': 'system', 'content': {system}}}] + messages -%}}{{%- endif -%}}"
)
_MERGED = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set messages = [{'role': messages[1]['role'], 'content': "
    "messages[0]['content'] + \"\\n\\n\" + messages[1]['content']}] + messages[2:] -%}{%- endif -%}"
)
