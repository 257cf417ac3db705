"""Parse descriptions of tools and calls of them, in the forms that data files have.

tools        [{"type": "function", "function": {...}}, ...], or the functions alone, also as JSON text
calls        OpenAI's ``tool_calls`` and ``function_call``; ``{"name", "arguments"}`` of ShareGPT; the calls that
             Hermes writes into a reply's text, ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from luthier.data.keys import RowProblem, check_encodable
from luthier.data.source import BadRow, parse_json
from luthier.types import ToolCall, Tools

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_DEEPEST = 64
_CALL_FORM = '{"name": ..., "arguments": {...}}'


def parse_tools(value: object, name: str) -> Tools:
    """Parse a list of tools; empty for none. name: its key. Raises RowProblem."""
    value = _decoded(value)
    if value is None or value == "":
        return ()
    tools = []
    for i, described in enumerate(value if isinstance(value, list) else [value], 1):
        tool = _decoded(described)
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowProblem(
                f"{name}[{i}] is not the description of a tool",
                fix='write {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}',
            )
        parameters = _decoded(function.get("parameters"))
        function = {**function, **({"parameters": parameters} if parameters is not None else {})}
        tools.append({"type": "function", "function": plain(function, f"{name}[{i}]")})
    return tuple(tools)


def parse_calls(value: object, name: str) -> tuple[ToolCall, ...]:
    """Parse one call or a list of calls; empty for none. name: its key. Raises RowProblem."""
    value = _decoded(value)
    if value is None or value == "":
        return ()
    calls = value if isinstance(value, list) else [value]
    return tuple(_call(call, f"{name}[{i}]" if isinstance(value, list) else name) for i, call in enumerate(calls, 1))


def split_calls(content: str, name: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Separate the calls that Hermes writes at the end of a reply's text from the text before. Raises RowProblem."""
    start = content.find("<tool_call>")
    if start < 0 or _CALL.sub("", content[start:]).strip():
        return content, ()
    return content[:start].rstrip(), tuple(_call(text, name) for text in _CALL.findall(content))


def _call(value: object, name: str) -> ToolCall:
    call = _decoded(value)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if isinstance(call, Mapping) and isinstance(function, Mapping) and isinstance(function.get("name"), str):
        arguments = _decoded(function.get("arguments", function.get("parameters")))
        if arguments is None or arguments == "":
            arguments = {}
        if isinstance(arguments, Mapping):
            number = call.get("id")
            named = plain({"name": function["name"], "id": "" if number is None else str(number)}, name)
            return ToolCall(str(named["name"]), plain(arguments, name), str(named["id"]))
    raise RowProblem(f"{name} is not a tool call", fix=f"write it as {_CALL_FORM}")


def plain(value: Mapping[str, object], name: str) -> dict[str, object]:
    """Return an object that consists of JSON values. name: its key. Raises RowProblem for others, and if it is deep."""

    def checked(value: object, depth: int) -> object:
        if depth > _DEEPEST:
            raise RowProblem(f"{name} is nested too deeply", fix="leave such rows out")
        if isinstance(value, str):
            return check_encodable(value, name).replace("\0", "")
        if isinstance(value, Mapping):
            return objects(value, depth)
        if isinstance(value, list):
            return [checked(inner, depth + 1) for inner in value]
        if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise RowProblem(
            f"{name} contains a value that JSON has no form for ({type(value).__name__})", fix="write text"
        )

    def objects(value: Mapping[str, object], depth: int) -> dict[str, object]:
        return {str(checked(str(key), depth)): checked(inner, depth + 1) for key, inner in value.items()}

    return objects(value, 0)


def _decoded(value: object) -> object:
    """Return what a text contains as JSON, if it is an object or a list; return any other value unchanged."""
    if isinstance(value, str) and value.strip().startswith(("{", "[")):
        content = parse_json(value)
        return value if isinstance(content, BadRow) else content
    return None if isinstance(value, str) and value.strip().lower() in ("", "null", "none") else value
