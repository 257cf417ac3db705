"""Store a frozen linear layer in 4 or 8 bits, with bitsandbytes' quantisation functions and our own autograd.

bitsandbytes' ``Linear4bit`` repacks its weight in the first forward pass without gradients (AVX512-BF16), which breaks
a later backward pass; here a weight never changes after loading.

    nf4, fp4   packed [out * in / 2] uint8, one scale per 64 values; with double quantisation the scales are 8-bit too,
               with one scale per 256 of them and an offset. Source: Dettmers et al. 2023, arXiv 2305.14314
    int8       values [out, in] int8, one scale per row. Source: Dettmers et al. 2022, arXiv 2208.07339
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier._util.installation import install_command
from luthier.errors import MissingPackageError
from luthier.kernels.native import Unavailable, decoding, load

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

BLOCK, NESTED_BLOCK = 64, 256
FEW_ROWS = 16
QuantisationKind = Literal["nf4", "fp4", "int8"]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """The storage format of frozen linear layers. double: the 4-bit scales are quantised too."""

    kind: QuantisationKind
    double: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the tensors that store one weight."""
        if self.kind == "int8":
            return ("values", "scale")
        return ("packed", "absmax", "nested_absmax", "offset") if self.double else ("packed", "absmax")

    def bytes_of(self, out_features: int, in_features: int) -> int:
        """Return the size in bytes of one stored weight."""
        n = out_features * in_features
        if self.kind == "int8":
            return n + 4 * out_features
        blocks = -(-n // BLOCK)
        return (n + 1) // 2 + (blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if self.double else 4 * blocks)


@lru_cache(1)
def bitsandbytes_functions() -> ModuleType:
    """Import bitsandbytes' functions. Raises MissingPackageError.

    The package ``kernels`` is hidden during the import; otherwise bitsandbytes would download kernels from a hub.
    """
    before = sys.modules.get("kernels", ...)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")  # it recommends installing that package
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError:
        raise MissingPackageError(
            "a quantised base model requires the package bitsandbytes", install_command("qlora")
        ) from None
    finally:
        logger.setLevel(level)
        if before is ...:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before
    return functional


def quantise(weight: Float[Tensor, "out in"], how: Quantisation) -> dict[str, Shaped[Tensor, " ..."]]:
    """Quantise a weight [out, in]; returns the tensors to store by part name. Raises MissingPackageError (4 bits)."""
    if how.kind == "int8":
        scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
        values = torch.round(weight.float() / scale[:, None]).to(torch.int8)
        return {"values": values, "scale": scale}
    packed, state = bitsandbytes_functions().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=how.kind, compress_statistics=how.double
    )
    parts = {"packed": packed.flatten(), "absmax": state.absmax}
    if how.double:
        parts |= {"nested_absmax": state.state2.absmax, "offset": state.offset.reshape(1)}
    return parts


def dequantise(
    parts: Mapping[str, Shaped[Tensor, " ..."]], how: Quantisation, shape: tuple[int, int], dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """Reconstruct a stored weight: [out, in] in ``dtype``. Raises MissingPackageError."""
    if how.kind == "int8":
        return (parts["values"].to(torch.float32) * parts["scale"][:, None]).to(dtype)
    bnb = bitsandbytes_functions()
    absmax = absolute_maxima(parts, how)
    # Blocks may cross row ends, but bitsandbytes' AVX512 path starts a new block at every row: pass one long row then.
    rows = shape if shape[1] % BLOCK == 0 else (1, shape[0] * shape[1])
    state = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size(rows),
        dtype=dtype,
        blocksize=BLOCK,
        code=code_table(how.kind, absmax.device),
        quant_type=how.kind,
    )
    weight: Tensor = bnb.dequantize_4bit(parts["packed"].view(-1, 1), state)
    return weight.view(shape)


def absolute_maxima(parts: Mapping[str, Shaped[Tensor, " ..."]], how: Quantisation) -> Float[Tensor, " blocks"]:
    """Return the scale of each block of a 4-bit weight: [blocks] fp32."""
    if not how.double:
        return parts["absmax"]
    bitsandbytes_functions()  # defines the operation
    code = _nested_code(parts["absmax"].device)
    scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        parts["absmax"], parts["nested_absmax"], code, NESTED_BLOCK, torch.float32
    )
    return scales + parts["offset"]


# The values of the codes, as in bitsandbytes, whose import takes a second that chat does not need: nf4 of Dettmers et
# al. 2023 (arXiv 2305.14314, appendix E), fp4 divided by its largest value.
_CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * v / 12 for sign in (1, -1) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip


@lru_cache(8)
def _nested_code(device: torch.device) -> Float[Tensor, " 256"]:
    """Return the value of each 8-bit code of a scale that is itself quantised: [256] fp32.

    Dynamic 8-bit codes: a sign, a power of ten, and the middle of one of 2^n equal parts of [0.1, 1].
    Source: Dettmers et al. 2021, arXiv 2110.02861.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        parts = 10.0 ** (exponent - 6) * (bounds[:-1] + bounds[1:]) / 2
        values += [*parts.tolist(), *(-parts).tolist()]
    return torch.tensor(sorted(values), device=device)


@lru_cache(8)
def code_table(kind: str, device: torch.device) -> Float[Tensor, " 16"]:
    """Return the value of each 4-bit code: [16] fp32."""
    return torch.tensor(_CODES[kind], device=device)


class QuantLinear(nn.Module):
    """A linear layer whose frozen weight is stored quantised; computes in ``compute``, returns the input's dtype.

    x [..., in] -> [..., out]. The stored parts are buffers that the loader sets.
    """

    def __init__(self, linear: nn.Linear, how: Quantisation, compute: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.how, self.compute = how, compute
        self.bias = linear.bias
        for part in how.parts:
            self.register_buffer(part, None)

    @property
    def device(self) -> torch.device:
        stored: Tensor = getattr(self, self.how.parts[0])
        return stored.device

    def dequantised(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """Reconstruct the weight [out, in] in ``dtype``; default: ``compute``."""
        parts = {part: getattr(self, part) for part in self.how.parts}
        return dequantise(parts, self.how, (self.out_features, self.in_features), dtype or self.compute)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        few = _few_rows(x, self)
        if few is not None:
            return few
        out: Tensor = _Matmul.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.how.kind}"


def quantised_matrix(
    layer: QuantLinear, bias: int | None = None
) -> tuple[decoding.MatrixStruct, list[Shaped[Tensor, " ..."]]]:
    """Describe a layer's stored weight to the compiled functions, and return the tensors that this refers to.

    bias: address of its bias in fp32. Raises Unavailable if they do not support it.
    """
    stored: Any = layer
    n, k = layer.out_features, layer.in_features
    if layer.how.kind == "int8":
        tensors = {"data": stored.values, "absmax": stored.scale.float()}
    else:
        if k % BLOCK:
            raise Unavailable(f"the input width of a 4-bit layer must be a multiple of {BLOCK}")
        tensors = {"data": stored.packed, "table": code_table(layer.how.kind, layer.device)}
        if layer.how.double:
            nested = {
                "absmax8": stored.absmax,
                "nested": stored.nested_absmax.float(),
                "code": _nested_code(layer.device),
            }
            tensors |= nested
        else:
            tensors["absmax"] = stored.absmax.float()
    if k % 16:
        raise Unavailable("widths must be multiples of 16")
    if any(t.device.type != "cpu" or not t.is_contiguous() for t in tensors.values()):
        raise Unavailable("tensors must be contiguous and on the CPU")
    kind = decoding.EIGHT if layer.how.kind == "int8" else decoding.FOUR
    matrix = decoding.MatrixStruct(kind, n, k, k, bias=bias, **{name: t.data_ptr() for name, t in tensors.items()})
    if layer.how.kind != "int8" and layer.how.double:
        matrix.offset = float(stored.offset)
    return matrix, list(tensors.values())


@lru_cache(4)
def _multiply(dtype: torch.dtype) -> Callable[..., None] | None:
    """Return the compiled product of a stored weight, computed in this dtype; None if it is not available."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        library: Any = load()
    except Unavailable:
        return None
    function = library.multiply_f32 if dtype is torch.float32 else library.multiply_bf16
    function.restype = None
    function.argtypes = [ctypes.POINTER(decoding.MatrixStruct), ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    multiply: Callable[..., None] = function
    return multiply


def dense_product(
    weight: Float[Tensor, "out in"],
) -> Callable[[Float[Tensor, "rows in"]], Float[Tensor, "rows out"]] | None:
    """Return the compiled product ``x @ weight.T`` (fp32) of a weight in fp32 or bf16; None if it is not available."""
    multiply = _multiply(weight.dtype)
    if multiply is None:
        return None
    weight = weight.contiguous()
    n, k = weight.shape
    kind = decoding.FLOAT if weight.dtype is torch.float32 else decoding.BFLOAT
    matrix = decoding.MatrixStruct(kind, n, k, k, data=weight.data_ptr())

    def product(x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        x, out = x.float().contiguous(), torch.empty(len(x), len(weight))
        multiply(ctypes.byref(matrix), len(x), x.data_ptr(), out.data_ptr())
        return out

    return product


def _few_rows(x: Float[Tensor, "*batch in"], layer: QuantLinear) -> Float[Tensor, "*batch out"] | None:
    """Compute a layer for a few inputs from its stored weight; None if the compiled functions are not available.

    Dequantising a whole weight for a few inputs takes most of the time of a token.
    """
    rows = x.numel() // layer.in_features
    if torch.is_grad_enabled() or x.device.type != "cpu" or not 0 < rows <= FEW_ROWS:
        return None
    multiply = _multiply(layer.compute)
    if multiply is None:
        return None
    try:
        bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
        matrix, tensors = quantised_matrix(layer, None if bias is None else bias.data_ptr())
    except Unavailable:
        return None
    flat = x.detach().to(layer.compute).float().reshape(rows, layer.in_features).contiguous()
    out = torch.empty(rows, layer.out_features)
    multiply(ctypes.byref(matrix), rows, flat.data_ptr(), out.data_ptr())
    del tensors  # they had to live until here
    return out.to(x.dtype).view(*x.shape[:-1], layer.out_features)


class _Matmul(torch.autograd.Function):
    """x @ W.T + bias, with W dequantised temporarily in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*batch in"], layer: QuantLinear) -> Float[Tensor, "*batch out"]:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(layer.compute)
        return F.linear(x.to(layer.compute), layer.dequantised(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*batch out"]) -> tuple[Float[Tensor, "*batch in"], None]:
        layer: QuantLinear = ctx.layer
        return (grad.to(layer.compute) @ layer.dequantised()).to(grad.dtype), None
