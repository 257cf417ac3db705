"""Describe a tokenizer's own chat template: how it is run, its date, and what it writes (found out with probes)."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Protocol

from luthier.errors import TemplateError
from luthier.types import Message, ToolCall, Tools

PROBE = "probe-reply"
DATE = date(2024, 7, 26)  # today's, for templates that write it (Llama 3's own fallback): all prompts have the same
WRITTEN = "{#- Written by luthier: the chat template of the training. -#}"  # the start of every exported template

_TODAY = re.compile(r"""strftime_now\s*\(\s*(["'])([^"']*)\1\s*\)""")
_ANY_DATE = re.compile(r"strftime_now(?!\s+is\s+(not\s+)?defined)")


@lru_cache(64)
def with_fixed_date(source: str) -> str:
    """Return the text of a template with ``DATE`` in place of today's date. Raises TemplateError if that is unknown."""
    fixed = _TODAY.sub(lambda call: json.dumps(DATE.strftime(call[2])), source)
    if _ANY_DATE.search(fixed):
        raise TemplateError(
            "the model's chat template inserts today's date in a form that cannot be fixed, so later prompts would "
            "differ from the trained ones",
            "choose another template: --set data.template=chatml",
        )
    return fixed


class RefusedConversation(ValueError):
    """The template itself rejects this conversation, for example because it does not support a role."""


class Render(Hashable, Protocol):
    """Runs a jinja chat template."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools = ()) -> str: ...


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """The chat template that a tokenizer comes with.

    render: runs it. source: its text, which identifies it. for_tools: the text of another one, for conversations with
    tools. date: the day that it writes as today's (YYYY-MM-DD), if it writes that.
    """

    render: Render
    source: str
    for_tools: str = ""
    date: str = ""

    def describe(self) -> dict[str, object]:
        more = {"for_tools": self.for_tools, "date": self.date}
        return {"source": self.source, **{key: text for key, text in more.items() if text}}


def is_plain(messages: Sequence[Message], tools: Tools = ()) -> bool:
    """Whether a conversation consists of texts of system, user and assistant only."""
    return not tools and not any(m.role == "tool" or m.tool_calls or m.thought for m in messages)


def require_plain(messages: Sequence[Message], tools: Tools, name: str) -> None:
    """Raise TemplateError if a conversation is not plain. name: of the template."""
    if not is_plain(messages, tools):
        own = "use a model whose own chat template supports them"
        if not tools and is_plain([m for m in messages if not m.thought]):
            raise TemplateError(
                f"the {name} template has no form for thoughts", f"--set data.thinking=drop leaves them out, or {own}"
            )
        raise TemplateError(f"the {name} template has no form for tools", own)


def written_stop(own: OwnTemplate, tokens: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the control token that a template writes after the last reply, if none of the ``known`` ones is there.

    tokens: all control tokens. None if the template writes none, or refuses the probe.
    """
    try:
        text = own.render((Message("user", "a"), Message("assistant", PROBE)), False)
    except (RefusedConversation, TemplateError):
        return None
    tail = text.rpartition(PROBE)[2]
    if any(stop in tail for stop in known):
        return None
    tail, stop = tail.lstrip(), None
    while token := max((t for t in tokens if tail.startswith(t)), key=len, default=None):  # the last one of a run
        tail, stop = tail.removeprefix(token), token
    return stop


@lru_cache(64)
def inner_stop(own: OwnTemplate, stops: tuple[str, ...], called: bool) -> str | None:
    """Return the stop token that ends a reply in the middle of a conversation, else the model's first one, if any.

    called: whether the reply calls a tool.
    """
    reply = Message("assistant", PROBE, tool_calls=(ToolCall("probe", {}),) if called else ())
    follows = Message("tool", "x", name="probe") if called else Message("user", "x")
    try:
        tail = own.render((Message("user", "a"), reply, follows), False).rpartition(PROBE)[2]
    except (RefusedConversation, TemplateError):
        tail = ""
    written = [(at, stop) for stop in stops if (at := tail.find(stop)) >= 0]
    return min(written)[1] if written else next(iter(stops), None)


@lru_cache(64)
def writes_tools(own: OwnTemplate) -> bool:
    """Whether a template writes descriptions of tools."""
    tool = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {}}}
    with suppress(RefusedConversation, TemplateError):
        return PROBE in own.render((Message("user", "a"),), True, (tool,))
    return False


@lru_cache(64)
def writes_thoughts(own: OwnTemplate) -> bool:
    """Whether a template writes the thought of a last reply."""
    with suppress(RefusedConversation, TemplateError):
        return PROBE in own.render((Message("user", "a"), Message("assistant", "b", thought=PROBE)), False)
    return False


@lru_cache(64)
def omits_system(own: OwnTemplate) -> bool:
    """Whether a template leaves system messages out."""
    try:
        return PROBE not in own.render((Message("system", PROBE), Message("user", "a")), True)
    except RefusedConversation:
        return False
