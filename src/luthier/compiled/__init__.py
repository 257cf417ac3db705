"""The training step in compiled layers: the same mathematics as the model's own, with a fraction of the traffic."""

from luthier.compiled.model import CompiledModel, Unsuitable, compiled_model, unsuitable

__all__ = ["CompiledModel", "Unsuitable", "compiled_model", "unsuitable"]
