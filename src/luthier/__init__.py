"""luthier: fine-tune chat models with LoRA and QLoRA, then chat with the result.

Every verb of the command line is a function of the same name here; imports are lazy, so that ``import luthier``
costs nothing until one is used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when transformers imports its client

if TYPE_CHECKING:
    from luthier.api import (
        Chat,
        DemoResult,
        Estimate,
        Exported,
        Merged,
        Stopped,
        chat,
        check,
        demo,
        doctor,
        estimate,
        eval,  # noqa: A004
        export,
        init,
        load_model,
        merge,
        pull,
        serve,
        train,
    )
    from luthier.config import RunConfig, build, load
    from luthier.errors import UserError
    from luthier.generate import Reply, Sampling
    from luthier.recipes import recipe

_EXPORTS = {
    "Chat": "luthier.api",
    "DemoResult": "luthier.api",
    "Estimate": "luthier.api",
    "Exported": "luthier.api",
    "Merged": "luthier.api",
    "Reply": "luthier.generate",
    "RunConfig": "luthier.config",
    "Sampling": "luthier.generate",
    "Stopped": "luthier.tuning",
    "UserError": "luthier.errors",
    "build": "luthier.config",
    "chat": "luthier.api",
    "check": "luthier.api",
    "demo": "luthier.api",
    "doctor": "luthier.api",
    "eval": "luthier.api",
    "estimate": "luthier.api",
    "export": "luthier.api",
    "init": "luthier.api",
    "load": "luthier.config",
    "load_model": "luthier.api",
    "merge": "luthier.api",
    "pull": "luthier.api",
    "recipe": "luthier.recipes",
    "serve": "luthier.api",
    "train": "luthier.tuning",
}

__all__ = [
    "Chat",
    "DemoResult",
    "Estimate",
    "Exported",
    "Merged",
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
    "estimate",
    "eval",
    "export",
    "init",
    "load",
    "load_model",
    "merge",
    "pull",
    "recipe",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
