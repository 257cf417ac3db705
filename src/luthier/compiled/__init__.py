"""Compute whole decoder layers with compiled kernels: loss and adapter gradients in training, logits in decoding.

The same mathematics as transformers' layers with less memory traffic.
"""

from luthier.compiled.model import CompiledModel, Unsuitable, compiled_model, report_compilation, unsuitable

__all__ = ["CompiledModel", "Unsuitable", "compiled_model", "report_compilation", "unsuitable"]
