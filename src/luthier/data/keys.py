"""Check the keys of rows and messages, and what those that decide what is learnt say.

A key that decides what is learnt is never ignored: it is obeyed, or its row is dropped with a reason that names it. Any
other unknown key is only noted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from luthier.errors import nearest
from luthier.types import Message, Role, Tools


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

    tools:      the tools that its replies may call.
    mark:       why a reply is not to be trained, if the row says so of one.
    system_key: the key that ``messages[0]`` came from, if it is a system prompt beside the conversation.
    multimodal: whether the row has a key for images, video or audio, even an empty one.
    """

    messages: list[Message]
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tools: Tools = ()
    mark: str = ""
    system_key: str = ""
    multimodal: bool = False


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that are read from a row or message, and which of them it must have."""

    known: tuple[str, ...]
    required: tuple[str, ...]


_MARKS = ("label", "loss", "loss_scale", "loss_weight", "train", "trainable", "training", "weight")
_MARK_VALUES = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}  # of cells of a table
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
THOUGHTS = ("reasoning_content", "thinking")  # of a reply
CALLS = ("tool_calls", "function_call")  # of a reply
TOOLS = ("tools", "functions")  # of a row
# A row is dropped if one of these keys has content in a place where luthier does not read it: (why, what to do).
_UNSUPPORTED = {
    **dict.fromkeys(THOUGHTS, ("a thought belongs to a reply", "write it into the message of its reply")),
    **dict.fromkeys(CALLS, ("only replies call tools", "write it into the message of a reply")),
    **dict.fromkeys(TOOLS, ("tools belong to the whole row", "write them beside the messages")),
    **dict.fromkeys(_MEDIA, ("only text is trained", "leave such rows out")),
    **dict.fromkeys(
        ("rejected_response", "rejected_messages"),
        ("preferences are not trained", "leave the key out to train the reply"),
    ),
    "train_detail": ("a reply is trained as a whole", "delete the row, or the key to train the whole reply"),
    "chat_template_kwargs": ("all rows get the same template settings", "leave such rows out"),
}
_DECIDING = frozenset({*_MARKS, *_UNSUPPORTED})
_EMPTY_TEXTS = ("", "[]", "{}", "null", "none", "false")  # cells of a table without a value


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


def check_deciding(
    value: Mapping[str, object], known: Sequence[str], row: ParsedRow, place: str = "", role: Role | None = None
) -> bool:
    """Check the keys of a row or message that decide what is learnt; return whether it is to be trained.

    known: keys that are read elsewhere. place: prefix of the keys of a message, e.g. "messages[2]." role: its role,
    None for a row. Raises RowProblem.
    """
    if _DECIDING.isdisjoint(value):
        return True
    trained = True
    for key in value:
        if key not in _DECIDING or key in known:
            continue
        name = place + key
        unused = "" if place else f", or --rename {key}=unused_{key} if the key means something else"
        row.multimodal |= key in _MEDIA
        if key in _MARKS:
            trained &= _is_trained(name, value[key], row, role, unused)
        elif not is_empty(value[key]):
            why, fix = _UNSUPPORTED[key]
            raise RowProblem(f"{name} is not empty, but {why}", fix=fix + unused)
    return trained


def is_empty(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in _EMPTY_TEXTS
    if isinstance(value, list):
        return all(map(is_empty, value))
    if isinstance(value, Mapping):
        return all(content is None for content in value.values())
    return value is None or value is False


def _is_trained(name: str, value: object, row: ParsedRow, role: Role | None, unused: str) -> bool:
    """Return what a key says that decides whether a row or message is trained, or with which weight.

    Raises RowProblem for a row that is not, and for a weight between 0 and 1.
    """
    weight = _weight(value)
    if value is None or (isinstance(value, str) and not value.strip()) or (weight is not None and math.isnan(weight)):
        return True  # a cell of a table without a value may be NaN
    if weight is None and isinstance(value, str) and name.endswith("label"):
        row.notes.append("key 'label' is not used")  # the name of a class
        return True
    shown = repr(value) if isinstance(value, str) else str(value).lower()
    fix = f"delete the row, or the key to train its reply{unused}"
    if weight is None:
        shown = shown if isinstance(value, str) else type(value).__name__
        raise RowProblem(f"{name} must be true, false or a number, got {shown}", fix=fix)
    if role in ("system", "user", "tool"):
        if weight:
            raise RowProblem(f"{name} is {shown}, but only replies are trained", fix="delete the key" + unused)
    elif weight not in (0, 1):
        raise RowProblem(f"{name} is {shown}, but all rows and replies have the weight 1", fix=fix)
    elif not weight and role is None:
        raise RowProblem(f"{name} is {shown}: the row is not to be trained", fix=fix)
    elif not weight:
        row.mark = f"{name} is {shown}"
        return False
    return True


def _weight(value: object) -> float | None:
    """Return the value of a mark as a number, None if it is something else."""
    if isinstance(value, str):
        value = _MARK_VALUES.get(value.strip().lower(), value)
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def check_encodable(value: str, name: str) -> str:
    """Return a text. Raises RowProblem if it has lone surrogates, which no UTF-8 file can hold. name: its key."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        reason = f"{name} contains bytes or half a surrogate pair that are not text"
        raise RowProblem(reason, fix="save the file as UTF-8") from None
    return value
