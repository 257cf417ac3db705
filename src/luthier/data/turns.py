"""Read the messages of one row: its system prompt, roles, texts, thoughts and tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from luthier.data.keys import (
    CALLS,
    THOUGHTS,
    TOOLS,
    Keys,
    ParsedRow,
    RowProblem,
    check_deciding,
    check_encodable,
    check_keys,
    is_empty,
)
from luthier.data.source import parse_json
from luthier.data.tools import parse_calls, parse_tools, plain, split_calls
from luthier.errors import nearest
from luthier.types import Message, Role

SYSTEM_KEYS = ("system", "system_prompt")  # of a row of any format


def open_row(value: Mapping[str, object], expected: Keys) -> ParsedRow:
    """Check the keys of a row, and read its system prompt, the first message, and its tools. Raises RowProblem."""
    row = ParsedRow([])
    known = (*expected.known, *SYSTEM_KEYS, *TOOLS)
    check_keys(value, Keys(known, expected.required), row)
    check_deciding(value, known, row)
    for key in SYSTEM_KEYS:
        if key not in value:
            continue
        system = content_text(value[key], key, row)
        if system and row.system_key and system.strip() != row.messages[0].content.strip():
            raise RowProblem(
                f"{row.system_key} and {key} are different system prompts",
                fix=f"--rename {key}=unused_{key} keeps only the first one",
            )
        if system and not row.system_key:
            row.system_key = key
            row.messages.append(Message("system", system))
    for key in TOOLS:
        if not is_empty(value.get(key)):
            tools = parse_tools(value[key], key)
            if row.tools and tools != row.tools:
                raise RowProblem(f"{' and '.join(TOOLS)} are different tools", fix="keep one of them")
            row.tools = tools
    return row


def read_thought(value: Mapping[str, object], row: ParsedRow, keys: Sequence[str] = THOUGHTS, place: str = "") -> str:
    """Return the thought of a reply that is a field of its own. place: prefix of its keys. Raises RowProblem."""
    thoughts: dict[str, str] = {}
    for key in keys:
        thought = value.get(key)
        if not is_empty(thought):
            if not isinstance(thought, str):
                raise RowProblem(f"{place}{key} must be text, got {type(thought).__name__}", fix="write it as text")
            thoughts[key] = text(thought, place + key, row)
    if len({t.strip() for t in thoughts.values()}) > 1:
        raise RowProblem(f"{' and '.join(place + key for key in thoughts)} are different thoughts", fix="keep one")
    return next(iter(thoughts.values()), "")


# --- values -----------------------------------------------------------------------------------------------------------


def keyed(value: object) -> Mapping[str, object]:
    """Return a row as an object; a list of messages is a row too. Raises RowProblem."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0].keys() & {"role", "from"}:
        return {"messages": value}
    return mapping(value)


def mapping(value: object) -> Mapping[str, object]:
    """Return a value that must be an object with keys. Raises RowProblem."""
    if isinstance(value, Mapping):
        return value
    reason = f"must be an object with keys, got {type(value).__name__}"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        raise RowProblem(f"{reason} of rows", fix="write one list of rows, without lists inside it")
    raise RowProblem(reason)


def decoded(value: object) -> object:
    """Return the list that a text contains as JSON, as in a cell of a table; return any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        content = parse_json(value)
        return content if isinstance(content, list) else value
    return value


def text(value: object, name: str, row: ParsedRow) -> str:
    """Return a value as text.

    Numbers and booleans are converted (a change), null is the empty text. Raises RowProblem for anything else.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        if not value.isascii():
            check_encodable(value, name)
        if "\0" in value:
            row.changes.append(f"NUL characters were removed from {name}")
            return value.replace("\0", "")
        return value
    if isinstance(value, bool | int | float):
        row.changes.append(f"{name} was a {type(value).__name__} and was converted to text")
        return str(value)
    raise RowProblem(f"{name} must be text, got {type(value).__name__}")


def content_text(value: object, name: str, row: ParsedRow, role: Role = "system") -> str:
    """Return the text of a message, also if it is a list of parts, ``[{"type": "text", "text": ...}, ...]``.

    Raises RowProblem for parts that are not text.
    """
    if role == "tool" and isinstance(value, Mapping):
        row.changes.append(f"{name} was an object and was converted to JSON text")
        return json.dumps(plain(value, name), ensure_ascii=False)
    if not isinstance(value, list) or not value or not all(isinstance(p, Mapping | str) for p in value):
        return text(value, name, row)
    texts = []
    for i, part in enumerate(value, 1):
        place = f"{name}[{i}]"
        if isinstance(part, str):
            texts.append(text(part, place, row))
            continue
        if part.get("type") not in _TEXT_PARTS:
            raise RowProblem(
                f"{place} is a part of type {part.get('type')!r}, but only text is trained", fix="leave such rows out"
            )
        if not check_deciding(part, (), row, f"{place}.", role):
            raise RowProblem(f"{row.mark}, but a part of a text cannot be left out of training", fix="delete the row")
        texts.append(text(part.get("text"), f"{place}.text", row))
    return "".join(texts)


# --- turns ------------------------------------------------------------------------------------------------------------

_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # the text is a call
    **dict.fromkeys(("tool", "function", "tool_response", "observation", "ipython"), "tool"),
}
_CALL_ROLES = ("function_call", "tool_call")
_THOUGHTS = (*THOUGHTS, "reasoning")  # of a message
_READ = {  # keys of a message by its role, besides those of role and text
    "assistant": (*_THOUGHTS, *CALLS),
    "tool": ("name", "tool_call_id"),
}
_RESPONSE = re.compile(r"\s*<tool_response>(.*)</tool_response>\s*", re.DOTALL)


def role_of(name: object) -> Role:
    """Return the role of that name, in any letter case. Raises RowProblem with the nearest name if there is none."""
    word = name.strip().lower() if isinstance(name, str) else ""
    if word in _ROLES:
        return _ROLES[word]
    guess = nearest(str(name), _ROLES)
    raise RowProblem(
        f"role {name!r} is not system, user, assistant or tool" + (f"; did you mean {guess}?" if guess else "")
    )


def add_turns(turns: object, name: str, row: ParsedRow, trained: bool = True) -> None:
    """Add a list of messages to ``row``; name is its key. Raises RowProblem.

    A message has the keys role and content, or from and value. trained: whether its replies are, if they do not say.
    """
    turns = decoded(turns)
    if not isinstance(turns, list) or not turns:
        raise RowProblem(f"{name} must be a list with at least one message, also as JSON text")
    for i, turn in enumerate(turns, 1):
        _add_turn(mapping(turn), f"{name}[{i}]", row, trained)


def _add_turn(message: Mapping[str, object], place: str, row: ParsedRow, trained: bool) -> None:
    speaker, words = ("from", "value") if not message.keys().isdisjoint(("from", "value")) else ("role", "content")
    if message.get(speaker) is None and message.get("role") is not None:
        speaker, words = "role", "content"  # a table may have empty cells of the other form
    role = role_of(message[speaker]) if speaker in message else None
    more = _READ.get(role or "", ())
    called = any(not is_empty(message.get(key)) for key in CALLS)
    check_keys(message, Keys((speaker, words, *more), (speaker,) if called else (speaker, words)), row)
    assert role
    trained &= check_deciding(message, more, row, f"{place}.", role)
    content = content_text(message.get(words), f"{place}.{words}", row, role)
    if role == "system":
        _add_system(content, place, row)
    elif role == "assistant":
        is_call = str(message[speaker]).strip().lower() in _CALL_ROLES
        _add_reply(message, content, place, row, trained, is_call)
    elif role == "tool":
        inner = _RESPONSE.fullmatch(content)
        ids = [text(message.get(key), f"{place}.{key}", row) for key in _READ["tool"]]
        row.messages.append(Message(role, inner[1].strip() if inner else content, name=ids[0], call_id=ids[1]))
    else:
        row.messages.append(Message(role, content))


def _add_system(content: str, place: str, row: ParsedRow) -> None:
    """Add a system prompt, unless it is empty or the same as the one before."""
    if not content:
        return
    before = row.messages[-1] if row.messages else None
    if before is None or before.role != "system":
        row.messages.append(Message("system", content))
    elif content.strip() == before.content.strip():
        return
    elif row.system_key and len(row.messages) == 1:
        raise RowProblem(
            f"{row.system_key} and {place} are different system prompts",
            fix=f"--rename {row.system_key}=unused_{row.system_key} keeps only that of the conversation",
        )
    else:
        row.messages[-1] = Message("system", f"{before.content}\n\n{content}")
        row.changes.append("two system prompts were joined")


def _add_reply(
    message: Mapping[str, object], content: str, place: str, row: ParsedRow, trained: bool, is_call: bool
) -> None:
    """Add a reply with its thought and calls. is_call: its text is a call. Raises RowProblem."""
    thought = read_thought(message, row, _THOUGHTS, f"{place}.")
    if thought and content.lstrip().startswith("<think>"):
        raise RowProblem(f"{place} has a thought as a key and another one in its text", fix="keep one of them")
    stated = [key for key in CALLS if not is_empty(message.get(key))]
    calls = tuple(call for key in stated for call in parse_calls(message[key], f"{place}.{key}"))
    if is_call:
        content, calls = "", (*parse_calls(content, place), *calls)
        before = row.messages[-1] if row.messages else None
        if before and before.role == "assistant" and before.tool_calls:  # a call per message: they are parallel
            if thought or trained != before.trained:
                raise RowProblem(
                    f"{place} has another thought or mark than the call before it", fix="write one message"
                )
            row.messages[-1] = replace(before, tool_calls=(*before.tool_calls, *calls))
            return
    elif not calls and "<tool_call>" in content:
        content, calls = split_calls(content, place)
    row.messages.append(Message("assistant", content, trained, thought, calls))


# --- the order of turns -----------------------------------------------------------------------------------------------

_FOLLOWS: dict[Role, tuple[Role, ...]] = {
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def finish(row: ParsedRow) -> ParsedRow:
    """Cut the turns after the last trained reply, and check the order of the others.

    An optional system message, then user and assistant alternate, with the results of tools after a reply that calls
    them. A reply before the first question is context. Raises RowProblem.
    """
    first = 1 if row.messages and row.messages[0].role == "system" else 0
    if len(row.messages) > first + 1 and row.messages[first].role == "assistant":
        row.messages[first] = replace(row.messages[first], trained=False)
        row.notes.append("the reply before the first question is context only")
    if not any(m.role == "assistant" for m in row.messages):
        raise RowProblem("has no assistant reply")
    if not any(m.role == "assistant" and m.trained for m in row.messages):
        why = row.mark or "the only one precedes the question"
        raise RowProblem(f"no reply of the row is to be trained ({why})", fix="delete the row, or the key to train it")
    end = max(i for i, m in enumerate(row.messages) if m.role == "assistant" and m.trained) + 1
    if end < len(row.messages):
        del row.messages[end:]
        row.changes.append("turns after the last reply were cut")
    if row.tools and first and "<tools>" in row.messages[0].content:  # as in Hermes' rows
        row.tools = ()
        row.notes.append("the system prompt describes the tools, so they are not described again")
    _check_order(row, first)
    _check_placeholders(row)
    return row


def _check_order(row: ParsedRow, first: int) -> None:
    """Raise RowProblem if a turn has an unexpected role or no text."""
    before: Message = Message("system", "")
    for i, message in enumerate(row.messages[first:]):
        expected = ("tool",) if before.tool_calls else _FOLLOWS[before.role]
        if before.role == "system" and message.trained:
            expected = ("user",)  # only a reply that is context may come first
        if message.role not in expected:
            turn = "the first turn" if i == 0 else f"turn {i + 1}"
            raise RowProblem(f"{turn} has the role {message.role}, expected {' or '.join(expected)}")
        if message.role != "tool" and not message.content.strip() and not message.tool_calls:
            raise RowProblem("a reply is empty" if message.role == "assistant" else "a user message is empty")
        before = message


_PLACEHOLDERS = ("<image>", "<video>", "<audio>")


def _check_placeholders(row: ParsedRow) -> None:
    """Raise RowProblem if a text refers to a picture: always in a multimodal row, else at either end of a question.

    ``<image>`` is also ordinary text, for example in a question about SVG.
    """
    for message in row.messages:
        if row.multimodal:
            placeholder = next((p for p in _PLACEHOLDERS if p in message.content), None)
        else:
            asked = message.content.strip() if message.role == "user" and "<image>" in message.content else ""
            placeholder = "<image>" if asked.startswith("<image>") or asked.endswith("<image>") else None
        if placeholder:
            raise RowProblem(
                f"a text contains the placeholder {placeholder}, but only text is trained", fix="leave such rows out"
            )
