"""Find out what a tokenizer's own chat template leaves out or changes of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from luthier.errors import TemplateError
from luthier.templates.own import OwnTemplate, writes_thoughts, writes_tools
from luthier.types import Message, Tools, json_leaves

_MARKERS = re.compile(r"(\s|<[^<>\s]+>|\[/?[A-Z_]+\])*")  # between the text of a reply and its stop token
_WITH_TOOLS = "use a model whose chat template supports tools, or leave them out"
OTHER_TEMPLATE = "use another template, such as --set data.template=chatml"


def require_context(own: OwnTemplate, messages: Sequence[Message], tools: Tools, rendered: str) -> None:
    """Raise TemplateError if a template leaves out the tools, a tool's result, or what a user wrote."""
    if tools and not writes_tools(own):
        raise TemplateError("the model's chat template leaves tools out, or changes them", _WITH_TOOLS)
    for m in messages:
        if m.role in ("user", "tool") and not any(form in rendered for form in _forms(m.content.strip())):
            what = "the result of a tool" if m.role == "tool" else "a user message"
            raise TemplateError(f"the model's chat template leaves {what} out, or changes it", OTHER_TEMPLATE)


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
    if not writes_thoughts(own):
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
    leaves = (leaf for call in reply.tool_calls for leaf in json_leaves(call.arguments))
    values = (str(leaf) for leaf in leaves if leaf is not None and not isinstance(leaf, bool))
    if any(not any(form in others for form in _forms(text)) for text in values):
        return "leaves out a tool call"
    return None


def _forms(text: str) -> tuple[str, ...]:
    """Return a text as it is, and as a template writes it within JSON."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
