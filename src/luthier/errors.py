"""Define the errors that a user can cause and correct; each one carries what to type next.

This module knows messages and fixes, not how they are printed (see ``cli``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """An error that the user can correct: one message, one fix, exit code 2, and no traceback.

    message: what happened, where, and what was expected.
    fix:     what to type or change.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}"


class ConfigError(UserError):
    """A setting that is unknown, has the wrong type, or would be ignored."""


class DataError(UserError):
    """A data file that cannot be used, or whose rows cannot be used."""


class TemplateError(UserError):
    """A chat template that cannot be trained on safely."""


class HistoryError(TemplateError):
    """A chat template that writes a reply in another form once the conversation continues than when it is written."""


class ModelError(UserError):
    """A model directory that cannot be used."""


class AdapterError(UserError):
    """An adapter that is damaged or belongs to another base model."""


class TrainError(UserError):
    """A run that cannot continue (the loss is not finite, or the adapter gets no gradient)."""


class MissingPackageError(UserError):
    """An optional package that is needed but not installed."""


def listed(names: Sequence[str], limit: int = 8, separator: str = ", ") -> str:
    """Join the first ``limit`` names for a message, and count the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name most similar to ``name``, or None if none reaches the similarity ``cutoff`` (0 to 1)."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None
