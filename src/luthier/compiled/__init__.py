"""Compute loss and adapter gradients with compiled decoder layers: the same mathematics with less memory traffic."""

from luthier.compiled.model import CompiledModel, Unsuitable, compiled_model, unsuitable

__all__ = ["CompiledModel", "Unsuitable", "compiled_model", "unsuitable"]
