"""Read the messages of one row: its texts, roles and system prompt, and the keys that decide what is learnt.

A key that decides what is learnt is never ignored: it agrees with what is trained anyway, or its row is dropped with a
reason that names the key. Any other unknown key is only noted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from luthier.data.source import parse_json
from luthier.errors import nearest
from luthier.types import Message, Role


class RowProblem(Exception):
    """A row that cannot be used. refused: every row of the file probably has this fault, so the run must not start."""

    def __init__(self, reason: str, refused: bool = False, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.refused = refused
        self.fix = fix


@dataclass(slots=True)
class ParsedRow:
    """A parsed row: its messages, what was changed in them, and remarks that changed nothing.

    untrained:  replies (indices into ``messages``) that the row marks as not to be trained, with the mark.
    system_key: the key that ``messages[0]`` came from, if it is a system prompt beside the conversation.
    multimodal: whether the row has a key for images, video or audio, even an empty one.
    """

    messages: list[Message]
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    untrained: dict[int, str] = field(default_factory=dict)
    system_key: str = ""
    multimodal: bool = False


# --- keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that are read from a row or message, and which of them it must have."""

    known: tuple[str, ...]
    required: tuple[str, ...]


SYSTEM_KEYS = ("system", "system_prompt")  # of a row of any format
_MARKS = ("label", "loss", "loss_scale", "loss_weight", "train", "trainable", "training", "weight")
_MARK_VALUES = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}  # of cells of a table
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
_REASONING = ("reasoning is not trained", "write it into the text of the reply")
_TOOLS = ("tool calls are not trained", "leave such rows out")
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
_UNSUPPORTED = {  # key: (why a value that is not empty drops the row, what to do)
    **dict.fromkeys(("reasoning_content", "thinking"), _REASONING),
    **dict.fromkeys(("tools", "tool_calls", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(_MEDIA, ("only text is trained", "leave such rows out")),
    **dict.fromkeys(
        ("rejected_response", "rejected_messages"),
        ("preferences are not trained", "leave the key out to train the reply"),
    ),
    "chat_template_kwargs": ("all rows get the same template settings", "leave such rows out"),
}
_DECIDING = frozenset({*_MARKS, *_UNSUPPORTED})
_EMPTY_TEXTS = ("", "[]", "{}", "null", "none", "false")  # cells of a table without a value


def open_row(value: Mapping[str, object], expected: Keys) -> ParsedRow:
    """Check the keys of a row and read its system prompt, the first message. Raises RowProblem."""
    row = ParsedRow([])
    check_keys(value, expected, row)
    _check_deciding(value, row)
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
    return row


def check_keys(value: Mapping[str, object], expected: Keys, row: ParsedRow) -> None:
    """Note unknown keys in ``row``, except those with the value null.

    Raises RowProblem if a required key is missing; a misspelt one refuses the file.
    """
    outcome = _compare_keys(tuple(value), expected.known, expected.required)
    if isinstance(outcome, RowProblem):
        raise RowProblem(outcome.reason, outcome.refused, outcome.fix)
    if outcome:
        row.notes += [note for key, note in outcome if value[key] is not None]


@lru_cache(1024)
def _compare_keys(
    keys: tuple[str, ...], known: tuple[str, ...], required: tuple[str, ...]
) -> tuple[tuple[str, str], ...] | RowProblem:
    """Return (key, note) pairs for these keys, or their problem. Cached, since most rows of a file have equal keys."""
    unknown = [k for k in keys if k not in known and k not in _DECIDING]
    missing = [name for name in required if name not in keys]
    misspelt = {guess: name for name in missing if (guess := similar_key(name, unknown))}
    if misspelt:
        wrong, right = (", ".join(map(repr, names)) for names in (misspelt, misspelt.values()))
        return RowProblem(
            f"key {wrong} is unknown; did you mean {right}?",
            refused=True,
            fix="correct the rows, or pass " + " ".join(f"--rename {old}={new}" for old, new in misspelt.items()),
        )
    if missing:
        return RowProblem(f"has no key '{missing[0]}'")
    notes = []
    for key in unknown:
        guess = similar_key(key, [k for k in known if k not in keys])
        notes.append((key, f"key {key!r} is not used" + (f"; did you mean '{guess}'?" if guess else "")))
    return tuple(notes)


def similar_key(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that ``key`` probably is a misspelling of, or None."""
    return nearest(key, known, cutoff=0.75)


def _check_deciding(value: Mapping[str, object], row: ParsedRow, place: str = "", role: Role | None = None) -> None:
    """Check the keys of a row or message that decide what is learnt; record a reply that is not to be trained.

    place: prefix of the keys of a message, e.g. "messages[2]." role: its role, None for a row. Raises RowProblem.
    """
    if _DECIDING.isdisjoint(value):
        return
    for key in value:
        if key not in _DECIDING:
            continue
        name = place + key
        unused = "" if place else f", or --rename {key}=unused_{key} if the key means something else"
        row.multimodal |= key in _MEDIA
        if key in _MARKS:
            _check_mark(name, value[key], row, role, unused)
        elif not _is_empty(value[key]):
            why, fix = _UNSUPPORTED[key]
            raise RowProblem(f"{name} is not empty, but {why}", fix=fix + unused)


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in _EMPTY_TEXTS
    if isinstance(value, list):
        return all(map(_is_empty, value))
    if isinstance(value, Mapping):
        return all(content is None for content in value.values())
    return value is None or value is False


def _check_mark(name: str, value: object, row: ParsedRow, role: Role | None, unused: str) -> None:
    """Check a key that says whether a row or message is trained, or with which weight. Raises RowProblem."""
    weight = _weight(value)
    if value is None or (isinstance(value, str) and not value.strip()) or (weight is not None and math.isnan(weight)):
        return  # a cell of a table without a value may be NaN
    if weight is None and isinstance(value, str) and name.endswith("label"):
        row.notes.append("key 'label' is not used")  # the name of a class
        return
    shown = repr(value) if isinstance(value, str) else str(value).lower()
    fix = f"delete the row, or the key to train its reply{unused}"
    if weight is None:
        shown = shown if isinstance(value, str) else type(value).__name__
        raise RowProblem(f"{name} must be true, false or a number, got {shown}", fix=fix)
    if role in ("system", "user"):
        if weight:
            raise RowProblem(f"{name} is {shown}, but only replies are trained", fix="delete the key" + unused)
    elif weight not in (0, 1):
        raise RowProblem(f"{name} is {shown}, but all rows and replies have the weight 1", fix=fix)
    elif not weight and role is None:
        raise RowProblem(f"{name} is {shown}: the row is not to be trained", fix=fix)
    elif not weight:
        row.untrained[len(row.messages)] = f"{name} is {shown}"


def _weight(value: object) -> float | None:
    """Return the value of a mark as a number, None if it is something else."""
    if isinstance(value, str):
        value = _MARK_VALUES.get(value.strip().lower(), value)
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def check_trained(row: ParsedRow, last_reply_only: bool) -> None:
    """Raise RowProblem if a reply would be trained that the row marks as not to be trained."""
    if not row.untrained:
        return
    replies = [i for i, m in enumerate(row.messages) if m.role == "assistant"]
    contradicted = [i for i in row.untrained if i == replies[-1] or not last_reply_only]
    if contradicted:
        follow = replies[-1] not in row.untrained and len(row.untrained) == len(replies) - 1
        raise RowProblem(
            f"{row.untrained[contradicted[0]]}, but this reply would be trained",
            fix="--set data.train_on=last_reply trains only the last reply of every row"
            if follow
            else "delete the row, or the key to train the reply",
        )


# --- values -----------------------------------------------------------------------------------------------------------


def mapping(value: object) -> Mapping[str, object]:
    """Return a value that must be an object with keys. Raises RowProblem."""
    if isinstance(value, Mapping):
        return value
    reason = f"must be an object with keys, got {type(value).__name__}"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        if {"role", "from"} & value[0].keys():
            raise RowProblem(f"{reason} of messages", fix='write it as {"messages": [...]}')
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
            _check_encodable(value, name)
        if "\0" in value:
            row.changes.append(f"NUL characters were removed from {name}")
            return value.replace("\0", "")
        return value
    if isinstance(value, bool | int | float):
        row.changes.append(f"{name} was a {type(value).__name__} and was converted to text")
        return str(value)
    raise RowProblem(f"{name} must be text, got {type(value).__name__}")


def _check_encodable(value: str, name: str) -> None:
    """Raise RowProblem if a text has lone surrogates, which no UTF-8 file can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        reason = f"{name} contains bytes or half a surrogate pair that are not text"
        raise RowProblem(reason, fix="save the file as UTF-8") from None


def content_text(value: object, name: str, row: ParsedRow, role: Role = "system") -> str:
    """Return the text of a message, also if it is a list of parts, ``[{"type": "text", "text": ...}, ...]``.

    Raises RowProblem for parts that are not text.
    """
    if not isinstance(value, list) or not value or not all(isinstance(p, Mapping) for p in value):
        return text(value, name, row)
    texts = []
    for i, part in enumerate(value, 1):
        place = f"{name}[{i}]"
        if part.get("type") != "text":
            raise RowProblem(
                f"{place} is a part of type {part.get('type')!r}, but only text is trained", fix="leave such rows out"
            )
        _check_deciding(part, row, f"{place}.", role)
        texts.append(text(part.get("text"), f"{place}.text", row))
    return "".join(texts)


# --- turns ------------------------------------------------------------------------------------------------------------

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
}
_ROLE_CONTENT, _FROM_VALUE = (Keys(names, names) for names in (("role", "content"), ("from", "value")))


def as_role(name: object) -> Role:
    """Return the role of that name, in any letter case. Raises RowProblem with the nearest name if there is none."""
    word = name.strip().lower() if isinstance(name, str) else ""
    if word in _ROLES:
        return _ROLES[word]
    if word in _TOOL_ROLES:
        raise RowProblem(f"a message has the role {name!r}, but tool calls are not trained", fix=_TOOLS[1])
    guess = nearest(str(name), _ROLES)
    raise RowProblem(f"role {name!r} is not system, user or assistant" + (f"; did you mean {guess}?" if guess else ""))


def add_turns(turns: object, name: str, row: ParsedRow) -> None:
    """Add a list of messages to ``row``; name is its key. Raises RowProblem.

    A message has the keys role and content, or from and value.
    """
    turns = decoded(turns)
    if not isinstance(turns, list) or not turns:
        raise RowProblem(f"{name} must be a list with at least one message, also as JSON text")
    for i, turn in enumerate(turns, 1):
        _add_turn(mapping(turn), f"{name}[{i}]", row)


def _add_turn(message: Mapping[str, object], place: str, row: ParsedRow) -> None:
    named = message.get("from") is not None or message.get("value") is not None
    speaker, words = (_FROM_VALUE if named else _ROLE_CONTENT).known
    role: Role | None = None
    if speaker in message:  # a message with tool calls may have no text
        role = as_role(message[speaker])
        _check_deciding(message, row, f"{place}.", role)
    check_keys(message, _FROM_VALUE if named else _ROLE_CONTENT, row)
    assert role
    content = content_text(message[words], f"{place}.{words}", row, role)
    if role == "system" and not content:
        return  # an empty system prompt counts as none
    if role == "system" and row.system_key and len(row.messages) == 1:
        if content.strip() != row.messages[0].content.strip():
            raise RowProblem(
                f"{row.system_key} and {place} are different system prompts",
                fix=f"--rename {row.system_key}=unused_{row.system_key} keeps only that of the conversation",
            )
        return
    row.messages.append(Message(role, content))


def finish(row: ParsedRow) -> ParsedRow:
    """Cut the turns after the last reply, and check that user and assistant alternate after an optional system message.

    Raises RowProblem.
    """
    turns = [m for i, m in enumerate(row.messages) if not (i == 0 and m.role == "system")]
    if not any(m.role == "assistant" for m in turns):
        raise RowProblem("has no assistant reply")
    while turns[-1].role != "assistant":
        turns.pop()
        row.messages.pop()
        if "turns after the last reply were cut" not in row.changes:
            row.changes.append("turns after the last reply were cut")
    for i, message in enumerate(turns):
        expected: Role = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            turn = "the first turn" if i == 0 else f"turn {i + 1}"
            raise RowProblem(f"{turn} has the role {message.role}, expected {expected}")
        if not message.content.strip():
            raise RowProblem("a reply is empty" if expected == "assistant" else "a user message is empty")
    _check_placeholders(row)
    return row


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
                f"a text contains the placeholder {placeholder}, but only text is trained", fix=_UNSUPPORTED["image"][1]
            )
