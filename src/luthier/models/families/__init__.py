"""Which kind of published checkpoint a directory holds.

A checkpoint is recognised by the ``model_type`` of its config.json, never by sizes. What is in no list here and is
native to transformers loads as it is.
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
