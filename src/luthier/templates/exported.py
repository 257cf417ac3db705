"""Convert a template to a jinja ``chat_template`` for other tools, which writes the prompts of the training there.

The run's system prompt, its treatment of system messages and the date of the training become part of the text.
"""

from __future__ import annotations

import json
import re

from luthier.errors import TemplateError
from luthier.templates import ChatML, Jinja, OwnForTools, OwnTemplate, SystemAsUser, Turns, same_text
from luthier.templates.own import DATE, WRITTEN, RefusedConversation, with_fixed_date
from luthier.types import Message, Template


def chat_template(template: Template, own: OwnTemplate | None, system: str | None) -> str:
    """Return a jinja template that writes what ``template`` writes; ``system`` is the default system message.

    If the tokenizer's own template writes the same text it is used, since it may support more (such as tools). System
    messages that ``template`` refuses are refused there too.
    """
    inner = template.inner if isinstance(template, SystemAsUser) else template
    if isinstance(inner, OwnForTools):
        inner = inner.jinja
    if isinstance(inner, Jinja):
        source = _with_tools(inner.own)
    else:
        assert isinstance(inner, ChatML | Turns)
        source = own.source if own and same_text(inner, own.render) else inner.jinja()
    opening = WRITTEN
    if system:
        opening += _DEFAULT_SYSTEM.format(system=json.dumps(system, ensure_ascii=False))
    if isinstance(template, SystemAsUser):
        opening += _SYSTEM_AS_USER
    if refusal := _refusal_of_system(inner):
        opening += _REFUSED_SYSTEM.format(reason=json.dumps(refusal, ensure_ascii=False))
    if "date_string" in source:
        opening += f'{{%- set date_string = "{DATE:%d %b %Y}" -%}}'
    source = with_fixed_date(source)
    # the empty text keeps the white space that the source starts with, except what jinja removes before a block
    return opening + "{{- '' }}" + re.sub(r"^[^\S\n]+(?=\{[%#](?!\+))", "", source)


def _with_tools(own: OwnTemplate) -> str:
    """Return the text of a tokenizer's own template; if it has another one for tools, a template that chooses."""
    if not own.for_tools:
        return own.source
    plain, for_tools = (text.removesuffix("\n") for text in (own.source, own.for_tools))
    return f"{{%- if tools %}}{{{{- '' }}}}{for_tools}{{% else %}}{{{{- '' }}}}{plain}{{% endif %}}"


def _refusal_of_system(template: Template) -> str | None:
    """Return why ``template`` refuses a system message, or None if it does not."""
    try:
        template.prompt((Message("system", "probe"), Message("user", "a")))
    except TemplateError as e:
        return e.message
    except RefusedConversation:  # the published template raises its own error
        return None
    return None


_DEFAULT_SYSTEM = (
    "{{%- if messages[0]['role'] != 'system' -%}}"
    "{{%- set messages = [{{'role': 'system', 'content': {system}}}] + messages -%}}{{%- endif -%}}"
)
_SYSTEM_AS_USER = (
    "{%- if messages[0]['role'] == 'system' and messages | length > 1 -%}"
    "{%- set merged = namespace(system=messages[0]['content'] + \"\\n\\n\", messages=[]) -%}"
    "{%- for m in messages[1:] -%}{%- if merged.system and m['role'] == 'user' -%}"
    "{%- set merged.messages = merged.messages + [{'role': 'user', 'content': merged.system + m['content']}] -%}"
    "{%- set merged.system = '' -%}"
    "{%- else -%}{%- set merged.messages = merged.messages + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = merged.messages -%}{%- endif -%}"
)
_REFUSED_SYSTEM = "{{%- if messages[0]['role'] == 'system' -%}}{{{{- raise_exception({reason}) -}}}}{{%- endif -%}}"
