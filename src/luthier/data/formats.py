"""Row formats: one JSON object -> the messages of a conversation, or the reason why it cannot be used.

``FORMATS`` at the end is the table to extend: how a format is recognised by its keys, and how a row of it is parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from luthier.errors import nearest
from luthier.types import Message, Role


class RowProblem(Exception):
    """This row cannot be used. ``refused``: the file is at fault, not the row, so the run must not start."""

    def __init__(self, reason: str, refused: bool = False, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.refused = refused
        self.fix = fix


@dataclass(slots=True)
class Row:
    """A row that was read: its messages, what was altered in it, and what was merely noticed."""

    messages: list[Message]
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def text(value: Any, name: str, row: Row) -> str:
    """A text value. Numbers and booleans become text (a change); null is empty; anything else drops the row."""
    if value is None:
        return ""
    found: str
    if isinstance(value, str):
        found = value
        if not value.isascii():
            _encodable(value, name)
        if "\0" in value:
            row.changes.append(f"NUL characters were removed from {name}")
            found = value.replace("\0", "")
        return found
    if isinstance(value, bool | int | float):
        row.changes.append(f"{name} was a {type(value).__name__}, made text")
        return str(value)
    raise RowProblem(f"{name} must be text, got {type(value).__name__}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a format reads, and those among them that a row must have."""

    known: tuple[str, ...]
    required: tuple[str, ...]


def check_keys(keys: Iterable[str], expected: Keys, row: Row) -> None:
    """Note unknown keys; a required key that is present under a misspelt name refuses the file."""
    notes = _verdict(tuple(keys), expected.known, expected.required)
    if isinstance(notes, RowProblem):
        raise RowProblem(notes.reason, notes.refused, notes.fix)
    row.notes += notes


@lru_cache(1024)
def _verdict(keys: tuple[str, ...], known: tuple[str, ...], required: tuple[str, ...]) -> tuple[str, ...] | RowProblem:
    """The notes on a row with such keys, or its problem: the same few keys come with every row."""
    unknown = [k for k in keys if k not in known]
    missing = [name for name in required if name not in keys]
    meant = {found: name for name in missing if (found := _nearest(name, unknown))}
    if meant:
        wrong, right = (", ".join(map(repr, names)) for names in (meant, meant.values()))
        return RowProblem(
            f"key {wrong} is unknown; did you mean {right}?",
            refused=True,
            fix="correct the rows, or pass " + " ".join(f"--rename {old}={new}" for old, new in meant.items()),
        )
    if missing:
        return RowProblem(f"has no key '{missing[0]}'")
    notes = []
    for key in unknown:
        guess = _nearest(str(key), [k for k in known if k not in keys])
        notes.append(f"key {key!r} is not used" + (f"; did you mean '{guess}'?" if guess else ""))
    return tuple(notes)


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return nearest(name, [str(k) for k in known], cutoff=0.75)


def as_role(name: Any) -> Role:
    """``system``, ``user`` or ``assistant``; any other role drops the row, with the nearest name."""
    if name in ("system", "user", "assistant"):
        return name  # type: ignore[no-any-return]
    guess = nearest(str(name), ("system", "user", "assistant"))
    raise RowProblem(f"role {name!r} is not system, user or assistant" + (f"; did you mean {guess}?" if guess else ""))


def close(row: Row) -> Row:
    """Check that system comes first, then user and assistant in turn; cut turns after the last reply."""
    turns = [m for i, m in enumerate(row.messages) if not (i == 0 and m.role == "system")]
    if not any(m.role == "assistant" for m in turns):
        raise RowProblem("has no reply by the assistant")
    while turns[-1].role != "assistant":
        turns.pop()
        row.messages.pop()
        if "turns after the last reply were cut" not in row.changes:
            row.changes.append("turns after the last reply were cut")
    for i, message in enumerate(turns):
        expected: Role = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            where = "the first turn" if i == 0 else f"turn {i + 1}"
            raise RowProblem(f"{where} is by {message.role}, expected {expected}")
        if not message.content.strip():
            raise RowProblem("a reply is empty" if expected == "assistant" else "a user's message is empty")
    return row


def mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RowProblem(f"must be an object with keys, got {type(value).__name__}")
    return value


def _encodable(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        reason = f"{name} holds bytes or half a surrogate pair that are not text"
        raise RowProblem(reason, fix="save the file as UTF-8") from None


# --- messages ---------------------------------------------------------------------------------------------------------

_MESSAGES = Keys(known=("messages",), required=("messages",))


def parse_messages(value: Mapping[str, Any]) -> Row:
    """``{"messages": [{"role", "content"}, ...]}``. Raises RowProblem."""
    row = Row([])
    check_keys(value, _MESSAGES, row)
    turns = value["messages"]
    if not isinstance(turns, list) or not turns:
        raise RowProblem("messages must be a list with at least one message")
    for i, turn in enumerate(turns, 1):
        message = mapping(turn)
        check_keys(message, Keys(("role", "content"), ("role", "content")), row)
        role = as_role(message["role"])
        content = text(_joined(message["content"]), f"messages[{i}].content", row)
        if role == "system" and not content:
            continue  # an empty system prompt is no system prompt
        row.messages.append(Message(role, content))
    return close(row)


def _joined(content: Any) -> Any:
    """``[{"type": "text", "text": ...}, ...]`` as one text; anything else as it is."""
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)
    ):
        return "".join(str(p.get("text", "")) for p in content)
    return content


# --- sharegpt ---------------------------------------------------------------------------------------------------------

_SHAREGPT = Keys(known=("conversations", "system"), required=("conversations",))
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}


def parse_sharegpt(value: Mapping[str, Any]) -> Row:
    """``{"conversations": [{"from": "human" or "gpt", "value"}, ...]}``, optionally ``system``. Raises RowProblem."""
    row = Row([])
    check_keys(value, _SHAREGPT, row)
    system = text(value.get("system"), "system", row)
    if system:
        row.messages.append(Message("system", system))
    turns = value["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowProblem("conversations must be a list with at least one message")
    for i, turn in enumerate(turns, 1):
        message = mapping(turn)
        names = ("from", "value") if "from" in message or "value" in message else ("role", "content")
        check_keys(message, Keys(names, names), row)
        said = message[names[0]]
        role = as_role(_ROLES.get(said, said) if isinstance(said, str) else said)
        content = text(message[names[1]], f"conversations[{i}].{names[1]}", row)
        if role == "system" and not content:
            continue
        row.messages.append(Message(role, content))
    return close(row)


# --- alpaca -----------------------------------------------------------------------------------------------------------

_ALPACA = Keys(known=("instruction", "input", "output", "system", "history"), required=("instruction", "output"))


def parse_alpaca(value: Mapping[str, Any]) -> Row:
    """``{"instruction", "input", "output"}``, optionally ``system`` and ``history``. Raises RowProblem."""
    row = Row([])
    check_keys(value, _ALPACA, row)
    system = text(value.get("system"), "system", row)
    if system:
        row.messages.append(Message("system", system))
    for i, pair in enumerate(_pairs(value.get("history")), 1):
        row.messages.append(Message("user", text(pair[0], f"history[{i}] question", row)))
        row.messages.append(Message("assistant", text(pair[1], f"history[{i}] answer", row)))
    instruction = text(value["instruction"], "instruction", row)
    extra = text(value.get("input"), "input", row)
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    output = text(value["output"], "output", row)
    if not question.strip():
        raise RowProblem("instruction is empty")
    if not output.strip():
        raise RowProblem("output is empty")
    row.messages += [Message("user", question), Message("assistant", output)]
    return close(row)


def _pairs(history: Any) -> list[Any]:
    if history is None:
        return []
    ok = isinstance(history, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in history)
    if not ok:
        raise RowProblem("history must be a list of [question, answer] pairs")
    return list(history)


# --- prompt_completion ------------------------------------------------------------------------------------------------

_PROMPT_COMPLETION = Keys(known=("prompt", "completion", "system"), required=("prompt", "completion"))


def parse_prompt_completion(value: Mapping[str, Any]) -> Row:
    """``{"prompt", "completion"}``, optionally ``system``. Raises RowProblem."""
    row = Row([])
    check_keys(value, _PROMPT_COMPLETION, row)
    system = text(value.get("system"), "system", row)
    prompt = text(value["prompt"], "prompt", row)
    completion = text(value["completion"], "completion", row)
    if not prompt.strip():
        raise RowProblem("prompt is empty")
    if not completion.strip():
        raise RowProblem("completion is empty")
    opening = [Message("system", system)] if system else []
    row.messages += [*opening, Message("user", prompt), Message("assistant", completion)]
    return close(row)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """keys: what a row may and must hold; any of ``keys.required`` gives the format away. parse: raises RowProblem."""

    keys: Keys
    parse: Callable[[Mapping[str, Any]], Row]


FORMATS = {
    "messages": Format(_MESSAGES, parse_messages),
    "sharegpt": Format(_SHAREGPT, parse_sharegpt),
    "alpaca": Format(_ALPACA, parse_alpaca),
    "prompt_completion": Format(_PROMPT_COMPLETION, parse_prompt_completion),
}


def recognise(row: Mapping[str, Any]) -> str | None:
    """The format's name, told from the row's keys, misspelt ones included."""
    for name, fmt in FORMATS.items():
        if any(key in row for key in fmt.keys.required):
            return name
    wanted = {key: name for name, fmt in FORMATS.items() for key in fmt.keys.required}
    for key in row:
        guess = nearest(str(key), wanted, cutoff=0.75)
        if guess:
            return wanted[guess]
    return None
