"""The compiled functions' parameters, and the checks that every call makes before C++ sees an address."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = {"l": ctypes.c_int64, "i": ctypes.c_int, "u": ctypes.c_uint32, "f": ctypes.c_float}
ELEMENTS = {"f32": torch.float32, "i64": torch.int64, "u8": torch.uint8, "i8": torch.int8}

# Every function's parameters, in order, as the C++ sources declare them (a test compares the two):
#   n            an int64; i, u, f after a colon: int, uint32, float
#   x:T[n,k]     a contiguous tensor [n, k] of the functions' element type; f32, i64, u8, i8: of that type
#   x:T[n,k]/ld  a tensor [n, at least k] whose rows are ``ld`` elements apart, ``ld`` being another parameter
#   last(x)      the last element of the tensor x; ? at the end: may be None
_LORA = "rank a:f32[rank,k]? factor:f32[rank]? key:u threshold:u places:i64[n]?"
_PLACE = (
    "count offsets:i64[count+1] parents:i64[count] shared query_offsets:i64[count+1] "
    "query_rows:i64[last(query_offsets)]? heads kv dim window scale:f"
)
_QKV = "q:T[last(query_offsets),heads*dim]/ldq ldq k:T[last(offsets),kv*dim]/ldk v:T[last(offsets),kv*dim]/ldk ldk"
SIGNATURES = {
    "norm_forward": f"n k x:T[n,k] w:T[k] eps:f {_LORA} out:T[n,ldo] ldo saved:T[n,rank]? rstd:f32[n]",
    "norm_backward": (
        f"n k x:T[n,k] w:T[k] rstd:f32[n] {_LORA} grad:T[n,k+rank]/ldg ldg residual:T[n,k] out:T[n,k]? "
        "grad_a:f32[rank,k]?"
    ),
    "swiglu_forward": f"n k gu:T[n,2*k] {_LORA} out:T[n,ldo] ldo saved:T[n,rank]",
    "swiglu_backward": f"n k gu:T[n,2*k] {_LORA} grad:T[n,k+rank]/ldg ldg out:T[n,2*k] grad_a:f32[rank,k]",
    "lora_forward": f"n k x:T[n,ld] ld {_LORA} saved:T[n,rank]",
    "lora_backward": f"n k x:T[n,ld] ld {_LORA} grad:T[n,k+rank]/ldg ldg out:T[n,k] grad_a:f32[rank,k]",
    "lora_grad_b": "n m grad:T[n,m]/ldg ldg z:T[n,rank]/ldz ldz rank grad_b:f32[m,rank]",
    "rotate": (
        "n x:T[n,width]/ld ld heads dim rotary interleaved:i back:i cos:T[n,rotary]/ldc sin:T[n,rotary]/ldc ldc "
        "bias:T[width]? width"
    ),
    "attend_forward": f"{_PLACE} {_QKV} out:T[last(query_offsets),heads*dim]/ldo ldo",
    "attend_backward": (
        f"{_PLACE} {_QKV} grad:T[last(query_offsets),heads*dim]/ldg ldg dq:T[last(query_offsets),heads*dim]/lddq lddq "
        "dk:T[last(offsets),kv*dim]/lddk dv:T[last(offsets),kv*dim]/lddk lddk"
    ),
    "cross_entropy": "n vocabulary logits:T[n,vocabulary]/ld ld targets:i64[n] losses:f32[n]",
    "dropout": "n k x:T[n,k] out:T[n,k] key:u threshold:u factor:f",
    "four_bits": "n k packed:u8[n*k//2] scales:f32[n*k//64] table:f32[16] out:T[n,k]/ldo ldo",
    "eight_bits": "n k values:i8[n,k] scales:f32[n] out:T[n,k]/ldo ldo",
}
_PARAMETER = re.compile(r"(\w+)(?::(\w+)(?:\[([^\]]*)\])?(?:/(\w+))?)?(\?)?")
Argument = Tensor | int | float | None


@dataclass(frozen=True, slots=True)
class Size:
    """A size in a signature: a sum of products of numbers and names, perhaps divided; or the last value of a tensor."""

    terms: tuple[tuple[int, tuple[str, ...]], ...]
    divisor: int = 1
    last: str = ""

    @classmethod
    def parse(cls, text: str) -> Size:
        if text.startswith("last("):
            return cls((), last=text[5:-1])
        text, _, divisor = text.partition("//")
        terms = []
        for term in text.split("+"):
            factors = term.split("*")
            numbers = [int(f) for f in factors if f.isdigit()]
            terms.append((math.prod(numbers), tuple(f for f in factors if not f.isdigit())))
        return cls(tuple(terms), int(divisor or 1))

    def of(self, arguments: Mapping[str, Argument]) -> int:
        if self.last:
            tensor = arguments[self.last]
            assert isinstance(tensor, Tensor)
            return int(tensor[-1])
        total = 0
        for number, names in self.terms:
            product = number
            for name in names:
                value = arguments[name]
                assert isinstance(value, int)
                product *= value
            total += product
        return total // self.divisor


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a function. kind: "l", "i", "u" or "f" for a number, else a tensor's element type."""

    name: str
    kind: str
    sizes: tuple[Size, ...] = ()
    row_stride: str = ""
    optional: bool = False

    @property
    def is_tensor(self) -> bool:
        return self.kind not in NUMBERS

    def mismatch(self, tensor: Argument, dtype: torch.dtype, arguments: Mapping[str, Argument]) -> str | None:
        """Why a tensor cannot be passed, None if it can. dtype: the functions' element type."""
        if tensor is None and self.optional:
            return None
        expected = [size.of(arguments) for size in self.sizes]
        element = dtype if self.kind == "T" else ELEMENTS[self.kind]
        if not isinstance(tensor, Tensor):
            return f"is {tensor!r}, expected a tensor {expected} of {element}"
        shape = list(tensor.shape)
        if self.row_stride:
            fits = len(shape) == 2 and shape[0] == expected[0] and shape[1] >= expected[1]
            rows, columns = tensor.stride() if fits else (0, 0)
            fits = fits and (columns == 1 or shape[1] < 2) and (rows == arguments[self.row_stride] or shape[0] < 2)
        else:
            fits = shape == expected and tensor.is_contiguous()
        if fits and tensor.dtype is element and tensor.device.type == "cpu":
            return None
        layout = f"rows {arguments[self.row_stride]} apart" if self.row_stride else "contiguous"
        return (
            f"is {shape} of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}; expected {expected} of "
            f"{element} on cpu, {layout}"
        )


def parameters(signature: str) -> tuple[Parameter, ...]:
    """A line of ``SIGNATURES`` as its parameters."""
    parsed = []
    for text in signature.split():
        match = _PARAMETER.fullmatch(text)
        assert match, text
        name, kind, sizes, row_stride, optional = match.groups()
        split = tuple(Size.parse(size) for size in sizes.split(",")) if sizes else ()
        parsed.append(Parameter(name, kind or "l", split, row_stride or "", bool(optional)))
    return tuple(parsed)
