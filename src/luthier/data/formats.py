"""Parse one row (a JSON object) into the messages of a conversation, or give the reason why it cannot be used.

To add a format, extend the table ``FORMATS`` at the end: the keys that identify the format, and its parser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from luthier.data.keys import THOUGHTS, Keys, ParsedRow, RowProblem, similar_key
from luthier.data.turns import add_turns, decoded, finish, open_row, read_thought, text
from luthier.types import Message, Role

# --- messages ---------------------------------------------------------------------------------------------------------

_MESSAGES = Keys(known=("messages",), required=("messages",))


def parse_messages(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"messages": [{"role", "content"}, ...]}``, optionally ``system``. Raises RowProblem."""
    row = open_row(value, _MESSAGES)
    add_turns(value["messages"], "messages", row)
    return finish(row)


# --- sharegpt ---------------------------------------------------------------------------------------------------------

_SHAREGPT = Keys(known=("conversations",), required=("conversations",))


def parse_sharegpt(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"conversations": [{"from", "value"}, ...]}``, optionally ``system``. Raises RowProblem."""
    row = open_row(value, _SHAREGPT)
    add_turns(value["conversations"], "conversations", row)
    return finish(row)


# --- alpaca -----------------------------------------------------------------------------------------------------------

_QUESTIONS = ("instruction", "question", "query", "prompt")  # or input, in a row without any of these
_REPLIES = ("output", "answer", "response", "completion")
_ALPACA = Keys(known=("instruction", "input", "output", "history", *THOUGHTS), required=("instruction", "output"))


def parse_alpaca(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"instruction", "input", "output"}``, optionally ``system`` and ``history``. Raises RowProblem.

    The keys in _QUESTIONS and _REPLIES are other names of instruction and output.
    """
    pair = None if _is_complete(value, _ALPACA) else _question_and_reply(value)
    names = {old: new for old, new in zip(pair or (), _ALPACA.required, strict=False) if old != new}
    if value.get("context") is not None and value.get("input") is None:
        names["context"] = "input"
    if names:
        value = {names.get(key, key): content for key, content in value.items() if key not in names.values()}
    row = open_row(value, _ALPACA)
    row.notes += [f"key {old!r} is read as {new!r}" for old, new in names.items()]
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
    row.messages += [Message("user", question), Message("assistant", output, thought=read_thought(value, row))]
    return finish(row)


def _question_and_reply(row: Mapping[str, object]) -> tuple[str, str] | None:
    """Return the keys of question and reply if a row has no others that could be. Raises RowProblem if it has."""
    filled = tuple(key for key, value in row.items() if value is not None)
    pair = _pair_of(filled) or _pair_of(tuple(row))
    if isinstance(pair, RowProblem):
        raise RowProblem(pair.reason, pair.refused, pair.fix)
    return pair


@lru_cache(1024)
def _pair_of(keys: tuple[str, ...]) -> tuple[str, str] | RowProblem | None:
    questions = [k for k in _QUESTIONS if k in keys] or [k for k in ("input",) if k in keys]
    replies = [k for k in _REPLIES if k in keys]
    missing = [name for name in _ALPACA.required if name not in keys]
    misspelt = any(similar_key(k, missing) for k in keys if k not in (*questions, *replies))
    if not questions or not replies or misspelt:
        return None
    if len(questions) == len(replies) == 1:
        return questions[0], replies[0]
    return RowProblem(
        f"has the keys {', '.join([*questions, *replies])}: it is unclear which is the question and which the reply",
        refused=True,
        fix="name them, e.g. "
        + " ".join(
            f"--rename {old}={new}"
            for old, new in zip((questions[0], replies[0]), _ALPACA.required, strict=True)
            if old != new
        ),
    )


def _pairs(history: object) -> list[tuple[object, object]]:
    """Return the (question, answer) pairs of ``history``. Raises RowProblem."""
    history = decoded(history)
    if history is None or history == "":
        return []
    if isinstance(history, list):
        pairs = [(p[0], p[1]) for p in history if isinstance(p, list | tuple) and len(p) == 2]
        if len(pairs) == len(history):
            return pairs
    raise RowProblem("history must be a list of [question, answer] pairs")


# --- prompt_completion ------------------------------------------------------------------------------------------------

_PROMPT_COMPLETION = Keys(known=("prompt", "completion", *THOUGHTS), required=("prompt", "completion"))


def parse_prompt_completion(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"prompt", "completion"}``, optionally ``system``. Both may be lists of messages. Raises RowProblem."""
    row = open_row(value, _PROMPT_COMPLETION)
    roles: tuple[tuple[str, Role], ...] = (("prompt", "user"), ("completion", "assistant"))
    for key, role in roles:
        turns = decoded(value[key])
        if isinstance(value[key], list) or (turns and _are_messages(turns)):
            _add_part(turns, key, row)
            continue
        content = text(value[key], key, row)
        if not content.strip():
            raise RowProblem(f"{key} is empty")
        row.messages.append(Message(role, content))
    if thought := read_thought(value, row):
        if row.messages[-1].thought.strip() not in ("", thought.strip()):
            raise RowProblem("the row and its completion have different thoughts", fix="keep one of them")
        row.messages[-1] = replace(row.messages[-1], thought=thought)
    return finish(row)


def _are_messages(turns: object) -> bool:
    """Whether decoded text is a conversation; a reply may also be JSON of another kind."""
    return isinstance(turns, list) and all(isinstance(t, Mapping) and t.keys() >= {"role", "content"} for t in turns)


def _add_part(turns: object, key: str, row: ParsedRow) -> None:
    """Add the messages of a prompt, which are not trained, or of a completion. Raises RowProblem."""
    start = len(row.messages)
    add_turns(turns, key, row, trained=key == "completion")
    for message in row.messages[start:]:
        if key == "completion" and message.role != "assistant":
            raise RowProblem(
                f"completion has a message of the role {message.role}, but only replies are trained",
                fix="move the messages before the last reply to prompt",
            )


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
    """Return the name of the row's format, recognised by its keys even if they are misspelt, or None.

    Raises RowProblem for a row of another kind.
    """
    if isinstance(row.get("chosen"), Mapping) and isinstance(row.get("rejected"), Mapping):
        raise _preference(row)
    if row.get("preferred_output") is not None:
        raise RowProblem("has the key preferred_output: preferences are not trained", refused=True, fix=_WRITE_CHOSEN)
    for name, fmt in FORMATS.items():
        if _is_complete(row, fmt.keys):
            return name
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise _preference(row)
    if _question_and_reply(row):
        return "alpaca"
    for name, fmt in FORMATS.items():
        if any(key in row for key in fmt.keys.required):
            return name
    formats = {key: name for name, fmt in FORMATS.items() for key in fmt.keys.required}
    for key in row:
        guess = similar_key(key, formats)
        if guess:
            return formats[guess]
    return None


def _is_complete(row: Mapping[str, object], keys: Keys) -> bool:
    return None not in map(row.get, keys.required)


_WRITE_CHOSEN = "write the chosen replies into the conversations"


def _preference(row: Mapping[str, object]) -> RowProblem:
    """Return the reason why a preference row is refused, and how to train on its chosen reply."""
    chosen, prompt = decoded(row["chosen"]), decoded(row.get("prompt"))
    name = None
    if isinstance(chosen, list) and len(chosen) > 1 and not isinstance(prompt, list):
        name = "messages"
    elif not isinstance(chosen, Mapping) and any(key in row for key in _QUESTIONS):
        name = "output" if prompt is None else "completion"
    return RowProblem(
        "has the keys chosen and rejected: preferences are not trained",
        refused=True,
        fix=f"--rename chosen={name} trains the chosen replies only" if name else _WRITE_CHOSEN,
    )
