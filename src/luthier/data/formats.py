"""Parse one row (a JSON object) into the messages of a conversation, or give the reason why it cannot be used.

To add a format, extend the table ``FORMATS`` at the end: the keys that identify the format, and its parser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

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
    """A parsed row: its messages, what was changed in them, and remarks that changed nothing."""

    messages: list[Message]
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a format reads, and which of them every row must have."""

    known: tuple[str, ...]
    required: tuple[str, ...]


def check_keys(keys: Iterable[str], expected: Keys, row: ParsedRow) -> None:
    """Note unknown keys in ``row``. Raises RowProblem if a required key is missing; a misspelt one refuses the file."""
    outcome = _compare_keys(tuple(keys), expected.known, expected.required)
    if isinstance(outcome, RowProblem):
        raise RowProblem(outcome.reason, outcome.refused, outcome.fix)
    row.notes += outcome


@lru_cache(1024)
def _compare_keys(
    keys: tuple[str, ...], known: tuple[str, ...], required: tuple[str, ...]
) -> tuple[str, ...] | RowProblem:
    """Return the notes on a row with these keys, or its problem. Cached, since most rows of a file have equal keys."""
    unknown = [k for k in keys if k not in known]
    missing = [name for name in required if name not in keys]
    misspelt = {guess: name for name in missing if (guess := _nearest(name, unknown))}
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
        guess = _nearest(key, [k for k in known if k not in keys])
        notes.append(f"key {key!r} is not used" + (f"; did you mean '{guess}'?" if guess else ""))
    return tuple(notes)


def _nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that ``key`` probably is a misspelling of, or None."""
    return nearest(key, known, cutoff=0.75)


_ROLES: tuple[Role, ...] = ("system", "user", "assistant")


def as_role(name: object) -> Role:
    """Return the role of that name. Raises RowProblem with the nearest name if there is none."""
    for role in _ROLES:
        if name == role:
            return role
    guess = nearest(str(name), _ROLES)
    raise RowProblem(f"role {name!r} is not system, user or assistant" + (f"; did you mean {guess}?" if guess else ""))


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
    return row


def mapping(value: object) -> Mapping[str, object]:
    """Return a value that must be an object with keys. Raises RowProblem."""
    if not isinstance(value, Mapping):
        raise RowProblem(f"must be an object with keys, got {type(value).__name__}")
    return value


def _check_encodable(value: str, name: str) -> None:
    """Raise RowProblem if a text has lone surrogates, which no UTF-8 file can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        reason = f"{name} contains bytes or half a surrogate pair that are not text"
        raise RowProblem(reason, fix="save the file as UTF-8") from None


# --- messages ---------------------------------------------------------------------------------------------------------

_MESSAGES = Keys(known=("messages",), required=("messages",))


def parse_messages(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"messages": [{"role", "content"}, ...]}``. Raises RowProblem."""
    row = ParsedRow([])
    check_keys(value, _MESSAGES, row)
    turns = value["messages"]
    if not isinstance(turns, list) or not turns:
        raise RowProblem("messages must be a list with at least one message")
    for i, turn in enumerate(turns, 1):
        message = mapping(turn)
        check_keys(message, Keys(("role", "content"), ("role", "content")), row)
        role = as_role(message["role"])
        content = text(_joined_parts(message["content"]), f"messages[{i}].content", row)
        if role == "system" and not content:
            continue  # an empty system prompt counts as none
        row.messages.append(Message(role, content))
    return finish(row)


def _joined_parts(content: object) -> object:
    """Join ``[{"type": "text", "text": ...}, ...]`` into one text; return anything else unchanged."""
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)
    ):
        return "".join(str(p.get("text", "")) for p in content)
    return content


# --- sharegpt ---------------------------------------------------------------------------------------------------------

_SHAREGPT = Keys(known=("conversations", "system"), required=("conversations",))
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def parse_sharegpt(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"conversations": [{"from", "value"}, ...]}``, optionally ``system``. Raises RowProblem."""
    row = ParsedRow([])
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
        sender = message[names[0]]
        role = as_role(_SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else sender)
        content = text(message[names[1]], f"conversations[{i}].{names[1]}", row)
        if role == "system" and not content:
            continue
        row.messages.append(Message(role, content))
    return finish(row)


# --- alpaca -----------------------------------------------------------------------------------------------------------

_ALPACA = Keys(known=("instruction", "input", "output", "system", "history"), required=("instruction", "output"))


def parse_alpaca(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"instruction", "input", "output"}``, optionally ``system`` and ``history``. Raises RowProblem."""
    row = ParsedRow([])
    check_keys(value, _ALPACA, row)
    system = text(value.get("system"), "system", row)
    if system:
        row.messages.append(Message("system", system))
    for i, (asked, answered) in enumerate(_pairs(value.get("history")), 1):
        row.messages.append(Message("user", text(asked, f"history[{i}] question", row)))
        row.messages.append(Message("assistant", text(answered, f"history[{i}] answer", row)))
    instruction = text(value["instruction"], "instruction", row)
    extra = text(value.get("input"), "input", row)
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    output = text(value["output"], "output", row)
    if not question.strip():
        raise RowProblem("instruction is empty")
    if not output.strip():
        raise RowProblem("output is empty")
    row.messages += [Message("user", question), Message("assistant", output)]
    return finish(row)


def _pairs(history: object) -> list[tuple[object, object]]:
    """Return the (question, answer) pairs of ``history``. Raises RowProblem."""
    if history is None:
        return []
    if isinstance(history, list):
        pairs = [(p[0], p[1]) for p in history if isinstance(p, list | tuple) and len(p) == 2]
        if len(pairs) == len(history):
            return pairs
    raise RowProblem("history must be a list of [question, answer] pairs")


# --- prompt_completion ------------------------------------------------------------------------------------------------

_PROMPT_COMPLETION = Keys(known=("prompt", "completion", "system"), required=("prompt", "completion"))


def parse_prompt_completion(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"prompt", "completion"}``, optionally ``system``. Raises RowProblem."""
    row = ParsedRow([])
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
    return finish(row)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """A row format. Any key of ``keys.required`` identifies it; ``parse`` raises RowProblem."""

    keys: Keys
    parse: Callable[[Mapping[str, object]], ParsedRow]


FORMATS = {
    "messages": Format(_MESSAGES, parse_messages),
    "sharegpt": Format(_SHAREGPT, parse_sharegpt),
    "alpaca": Format(_ALPACA, parse_alpaca),
    "prompt_completion": Format(_PROMPT_COMPLETION, parse_prompt_completion),
}


def recognise(row: Mapping[str, object]) -> str | None:
    """Return the name of the row's format, recognised by its keys even if they are misspelt, or None."""
    for name, fmt in FORMATS.items():
        if any(key in row for key in fmt.keys.required):
            return name
    formats = {key: name for name, fmt in FORMATS.items() for key in fmt.keys.required}
    for key in row:
        guess = _nearest(key, formats)
        if guess:
            return formats[guess]
    return None
