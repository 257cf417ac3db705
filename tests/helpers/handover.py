"""Make an adapter directory without training: random updates of a base model, large enough to change its replies."""

from __future__ import annotations

from pathlib import Path

import torch

from luthier import templates
from luthier.adapters import directory as adapters
from luthier.config import LoraConfig
from luthier.lora.layers import attach, resolve
from luthier.models.chat_format import load_chat_format
from luthier.models.directory import fingerprint
from luthier.models.native_model import empty_model
from luthier.types import SystemRole

SYSTEM = 'You are "Marlow",\nkeeper of the Gannet Rock light. 守灯人。'
LORA = LoraConfig(r=4, lora_alpha=8)


def tuned(
    base: Path,
    to: Path,
    system: str | None = SYSTEM,
    lora: LoraConfig = LORA,
    size: float = 0.05,
    system_role: SystemRole = "template",
    targets: list[str] | None = None,
    template: str = "auto",
) -> Path:
    """Write a random adapter to ``to``, as a finished run would, and return ``to``."""
    chat_format = load_chat_format(base, template, system_role=system_role)
    model = empty_model(chat_format.config)
    chosen = resolve(model, targets, chat_format.modules())
    layers = attach(model, lora, chosen, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        for name in ("lora_A", "lora_B"):
            shape = getattr(layer, name).shape
            setattr(layer, name, torch.nn.Parameter(torch.randn(shape, generator=generator) * size))
    facts = adapters.Facts(
        system=system,
        template=dict(chat_format.template.describe()),
        template_sha256=templates.digest(chat_format.template),
        stop_ids=chat_format.stop_ids,
        base=fingerprint(base, chat_format.config),
        tokenizer_sha256=chat_format.tokenizer.digest(),
        data_sha256="",
    )
    adapters.save(to, layers, lora, chosen, facts, base)
    return to
