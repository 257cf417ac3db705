"""luthier: fine-tune chat models with LoRA and QLoRA, then chat with the result.

Each command of the command line is also a function here, with the same name. Imports are lazy, so that
``import luthier`` is fast.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # must be set before transformers imports huggingface_hub

if TYPE_CHECKING:
    from luthier.config import RunConfig, build, load
    from luthier.errors import UserError
    from luthier.exporting.formats import Exported
    from luthier.exporting.merge import Merged
    from luthier.inference.chat import Chat
    from luthier.inference.generation import Reply
    from luthier.inference.sampling import Sampling
    from luthier.models.loader import load_model
    from luthier.recipes import recipe
    from luthier.training.resources import Estimate
    from luthier.verbs.chat import chat
    from luthier.verbs.check import check
    from luthier.verbs.demo import DemoResult, demo
    from luthier.verbs.doctor import doctor
    from luthier.verbs.estimate import estimate
    from luthier.verbs.eval import eval  # noqa: A004
    from luthier.verbs.export import export
    from luthier.verbs.init import init
    from luthier.verbs.merge import merge
    from luthier.verbs.pull import pull
    from luthier.verbs.serve import serve
    from luthier.verbs.train import Stopped, train

_EXPORTS = {
    "Chat": "luthier.inference.chat",
    "DemoResult": "luthier.verbs.demo",
    "Estimate": "luthier.training.resources",
    "Exported": "luthier.exporting.formats",
    "Merged": "luthier.exporting.merge",
    "Reply": "luthier.inference.generation",
    "RunConfig": "luthier.config",
    "Sampling": "luthier.inference.sampling",
    "Stopped": "luthier.verbs.train",
    "UserError": "luthier.errors",
    "build": "luthier.config",
    "chat": "luthier.verbs.chat",
    "check": "luthier.verbs.check",
    "demo": "luthier.verbs.demo",
    "doctor": "luthier.verbs.doctor",
    "estimate": "luthier.verbs.estimate",
    "eval": "luthier.verbs.eval",
    "export": "luthier.verbs.export",
    "init": "luthier.verbs.init",
    "load": "luthier.config",
    "load_model": "luthier.models.loader",
    "merge": "luthier.verbs.merge",
    "pull": "luthier.verbs.pull",
    "recipe": "luthier.recipes",
    "serve": "luthier.verbs.serve",
    "train": "luthier.verbs.train",
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


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
