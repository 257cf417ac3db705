"""Find out what a tokenizer's own chat template leaves out or changes of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

from luthier.errors import TemplateError
from luthier.templates.own import PROBE, OwnTemplate, RefusedConversation, Render
from luthier.types import Message, Tools

_MARKERS = re.compile(r"(\s|<[^<>\s]+>|\[/?[A-Z_]+\])*")  # between the text of a reply and its stop token
_WITH_TOOLS = "use a model whose chat template supports tools, or leave them out"
OTHER_TEMPLATE = "use another template, such as --set data.template=chatml"


def require_context(own: OwnTemplate, messages: Sequence[Message], tools: Tools, rendered: str) -> None:
    """Raise TemplateError if a template leaves out the tools, a tool's result, or what a user wrote."""
    if tools and not _writes_tools(own.render, own.source + own.for_tools):
        raise TemplateError("the model's chat template leaves tools out, or changes them", _WITH_TOOLS)
    for m in messages:
        if m.role in ("user", "tool") and not any(form in rendered for form in _forms(m.content.strip())):
            what = "the result of a tool" if m.role == "tool" else "a user message"
            raise TemplateError(f"the model's chat template leaves {what} out, or changes it", OTHER_TEMPLATE)


@lru_cache(64)
def _writes_tools(render: Render, _source: str) -> bool:
    """Whether a template writes descriptions of tools. _source: its text, which ``render`` may get anew."""
    tool = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {}}}
    with suppress(RefusedConversation, TemplateError):
        return PROBE in render((Message("user", "a"),), True, (tool,))
    return False


@lru_cache(64)
def _writes_thoughts(render: Render, _source: str) -> bool:
    """Whether a template writes the thought of a last reply. _source: its text, which ``render`` may get anew."""
    with suppress(RefusedConversation, TemplateError):
        return PROBE in render((Message("user", "a"), Message("assistant", "b", thought=PROBE)), False)
    return False


_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


def without_thought(message: Message, empty: bool = False) -> Message:
    """Return a reply without its thought, in a field or at the start of its text. empty: an empty one is put there."""
    if message.role != "assistant":
        return message
    thought = _THOUGHT.fullmatch(message.content)
    content = thought[2] if thought else message.content
    return replace(message, thought="", content="<think>\n\n</think>\n\n" + content if empty else content)


def with_fields(own: OwnTemplate, messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages with the thoughts at the start of their texts as fields, if the template writes such fields."""
    if not any(m.role == "assistant" and "<think>" in m.content for m in messages):
        return messages
    if not _writes_thoughts(own.render, own.source):
        return messages
    parts = [(m, _THOUGHT.fullmatch(m.content) if m.role == "assistant" else None) for m in messages]
    return [replace(m, thought=t[1].strip("\n"), content=t[2]) if t and not m.thought else m for m, t in parts]


def incomplete(reply: Message, shown: str, opened: bool) -> str | None:
    """Describe what the text that a template writes for a reply lacks; None if it is complete.

    shown: from the start of the thought, if the prompt opens it. opened: the template leaves out the reply's thought.
    """
    content = reply.content
    answer = (content.rpartition("</think>")[2] if opened and not reply.thought else content).strip()
    at = shown.rfind(answer)
    nested = opened and "<think>" in content.lstrip()[1:]
    if at < 0 or nested or not (reply.tool_calls or _MARKERS.fullmatch(shown, at + len(answer))):
        return "changes the text"
    if reply.thought and not opened and reply.thought.strip() not in shown[:at]:
        return "leaves out the thought"
    others = shown.replace(answer, "", 1).replace(reply.thought.strip(), "", 1)
    if any(others.count(call.name) < sum(c.name == call.name for c in reply.tool_calls) for call in reply.tool_calls):
        return "leaves out a tool call"
    values = [text for call in reply.tool_calls for text in _values(call.arguments)]
    if any(not any(form in others for form in _forms(text)) for text in values):
        return "leaves out a tool call"
    return None


def _values(value: object) -> Iterator[str]:
    """Yield the texts and numbers within JSON values, as text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner)


def _forms(text: str) -> tuple[str, ...]:
    """Return a text as it is, and as a template writes it within JSON."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


@lru_cache(64)
def omits_system(render: Render, _source: str) -> bool:
    """Whether a template leaves system messages out. _source: its text, which ``render`` may get anew."""
    try:
        return PROBE not in render((Message("system", PROBE), Message("user", "a")), True)
    except RefusedConversation:
        return False
