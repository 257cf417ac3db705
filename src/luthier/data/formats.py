"""Parse one row (a JSON object) into the messages of a conversation, or give the reason why it cannot be used.

To add a format, extend the table ``FORMATS`` at the end: the keys that identify the format, and its parser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from luthier.data.turns import (
    SYSTEM_KEYS,
    Keys,
    ParsedRow,
    RowProblem,
    add_turns,
    finish,
    open_row,
    similar_key,
    text,
)
from luthier.types import Message

# --- messages ---------------------------------------------------------------------------------------------------------

_MESSAGES = Keys(known=("messages", *SYSTEM_KEYS), required=("messages",))


def parse_messages(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"messages": [{"role", "content"}, ...]}``, optionally ``system``. Raises RowProblem."""
    row = open_row(value, _MESSAGES)
    add_turns(value["messages"], "messages", row)
    return finish(row)


# --- sharegpt ---------------------------------------------------------------------------------------------------------

_SHAREGPT = Keys(known=("conversations", *SYSTEM_KEYS), required=("conversations",))


def parse_sharegpt(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"conversations": [{"from", "value"}, ...]}``, optionally ``system``. Raises RowProblem."""
    row = open_row(value, _SHAREGPT)
    add_turns(value["conversations"], "conversations", row)
    return finish(row)


# --- alpaca -----------------------------------------------------------------------------------------------------------

_ALPACA = Keys(known=("instruction", "input", "output", "history", *SYSTEM_KEYS), required=("instruction", "output"))


def parse_alpaca(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"instruction", "input", "output"}``, optionally ``system`` and ``history``. Raises RowProblem."""
    row = open_row(value, _ALPACA)
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

_PROMPT_COMPLETION = Keys(known=("prompt", "completion", *SYSTEM_KEYS), required=("prompt", "completion"))


def parse_prompt_completion(value: Mapping[str, object]) -> ParsedRow:
    """Parse ``{"prompt", "completion"}``, optionally ``system``. Raises RowProblem."""
    row = open_row(value, _PROMPT_COMPLETION)
    prompt = text(value["prompt"], "prompt", row)
    completion = text(value["completion"], "completion", row)
    if not prompt.strip():
        raise RowProblem("prompt is empty")
    if not completion.strip():
        raise RowProblem("completion is empty")
    row.messages += [Message("user", prompt), Message("assistant", completion)]
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
        guess = similar_key(key, formats)
        if guess:
            return formats[guess]
    return None
