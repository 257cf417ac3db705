"""The training step in compiled layers: the same mathematics as the model's own, with a fraction of the traffic."""

from luthier.fused.model import FusedModel, Unsuitable, fused, unsuitable

__all__ = ["FusedModel", "Unsuitable", "fused", "unsuitable"]
