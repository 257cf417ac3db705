"""The training step in compiled layers: the same mathematics as the model's own, with a fraction of the traffic."""

from luthier.fused.model import FusedModel, Unsuitable, fused, unsuitable
from luthier.fused.proof import prove

__all__ = ["FusedModel", "Unsuitable", "fused", "prove", "unsuitable"]
