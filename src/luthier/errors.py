"""What a user can get wrong, each with what to type next.

Knows: messages and fixes. Does not know: how they are printed (see ``cli``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can act on: one message, one fix, exit code 2, never a traceback.

    message: what we got, where, and what was expected.
    fix:     what to type or change.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}"


class ConfigError(UserError):
    """A setting that is unknown, of the wrong kind, or would be ignored."""


class DataError(UserError):
    """A data file, or its rows, that cannot be used."""


class TemplateError(UserError):
    """A chat template that cannot be trained on safely."""


class ModelError(UserError):
    """A model directory that cannot be used."""


class AdapterError(UserError):
    """An adapter that is damaged or belongs to another base model."""


class TrainError(UserError):
    """A run that cannot go on (loss not finite, an adapter that gets no gradient)."""


class MissingPackageError(UserError):
    """An optional package is needed for this verb."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to ``name``, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None
