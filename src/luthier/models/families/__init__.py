"""List the families of published checkpoints.

A checkpoint is recognised by the ``model_type`` of its config.json, never by its sizes. A type that is not listed here
but native to transformers loads unchanged.
"""

from __future__ import annotations

from luthier.models.families import baichuan2, glm4
from luthier.models.families.base import Family, Modules, Rule

__all__ = ["FAMILIES", "Family", "Modules", "Rule"]

FAMILIES: dict[str, Family] = {
    "baichuan": baichuan2.FAMILY,
    "chatglm": glm4.ORIGINAL,
    "glm": glm4.HF,
    "phi3": Family("Phi-3", "phi3"),
    "llama": Family("Llama", "llama"),
}
