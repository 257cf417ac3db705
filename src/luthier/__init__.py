"""luthier: fine-tune chat models with LoRA and QLoRA, then chat with the result.

Every verb of the command line is a function of the same name here; imports are lazy, so that ``import luthier``
costs nothing until one is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from luthier.api import Chat, DemoResult, Stopped, chat, check, demo, doctor, eval, init, pull, train  # noqa: A004
    from luthier.config import RunConfig, build, load
    from luthier.errors import UserError
    from luthier.generate import Reply, Sampling

_EXPORTS = {
    "Chat": "luthier.api",
    "DemoResult": "luthier.api",
    "Reply": "luthier.generate",
    "RunConfig": "luthier.config",
    "Sampling": "luthier.generate",
    "Stopped": "luthier.api",
    "UserError": "luthier.errors",
    "build": "luthier.config",
    "chat": "luthier.api",
    "check": "luthier.api",
    "demo": "luthier.api",
    "doctor": "luthier.api",
    "eval": "luthier.api",
    "init": "luthier.api",
    "load": "luthier.config",
    "pull": "luthier.api",
    "train": "luthier.api",
}

__all__ = [
    "Chat",
    "DemoResult",
    "Reply",
    "RunConfig",
    "Sampling",
    "Stopped",
    "UserError",
    "__version__",
    "build",
    "chat",
    "check",
    "demo",
    "doctor",
    "eval",
    "init",
    "load",
    "pull",
    "train",
]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
