"""Call the compiled forward pass of ``decode.cpp``: its structures, field by field, and the function for each dtype.

The C++ side sees only addresses. ``compiled.decoder`` builds these structures, from tensors that it checks and keeps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

import torch

from luthier.kernels.native import Unavailable, load, suffix

PAGE = 32  # tokens per page
GROUPS, MATRICES = 4, 3  # groups of a layer: q k v, o, gate up, down; matrices of a group at most
FLOAT, BFLOAT, FOUR, EIGHT = range(4)  # kinds of a matrix


class Matrix(Structure):
    """A weight matrix [n, k]. data: rows ``ld`` elements apart if dense, else without gaps.

    bias: fp32. FOUR: table [16]; absmax per block, or absmax8, code [256], nested and offset. EIGHT: absmax per row.
    """

    _fields_ = (
        *((name, c_int64) for name in ("kind", "n", "k", "ld")),
        *((name, c_void_p) for name in ("data", "bias", "table", "absmax", "absmax8", "code", "nested")),
        ("offset", c_float),
    )


class Group(Structure):
    """Matrices that read the same input. n, k: output and input width."""

    _fields_ = (*((name, c_int64) for name in ("count", "n", "k")), ("matrices", Matrix * MATRICES))


class Update(Structure):
    """An adapter's change of one matrix: ``bt.T @ (a @ x)``. a [rank, k], scaled; bt [rank, n]; both fp32."""

    _fields_ = (("rank", c_int64), ("a", c_void_p), ("bt", c_void_p))


class Layer(Structure):
    """A decoder layer. norm, norm2: weights of the RMS norms, fp32. window: sliding window; 0 if there is none."""

    _fields_ = (
        ("norm", c_void_p),
        ("norm2", c_void_p),
        ("eps", c_float),
        ("eps2", c_float),
        ("window", c_int64),
        ("groups", Group * GROUPS),
    )


class Model(Structure):
    """A model. inner: width of the MLP. updates [adapters, layers, GROUPS, MATRICES]. page_bytes: of one page."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv", "dim", "rotary", "interleaved", "inner")),
        ("scale", c_float),
        ("eps", c_float),
        ("layer", POINTER(Layer)),
        ("norm", c_void_p),
        ("head", Matrix),
        ("updates", POINTER(Update)),
        ("page_bytes", c_int64),
    )


class Step(Structure):
    """The new tokens of one call. x [count, hidden] fp32: embeddings, overwritten; cos, sin [count, rotary] fp32.

    positions, rows, adapters [count]: position in its sequence, row of ``pages``, index of its adapter or -1.
    pages [rows, pages_per_row]: indices into the pool. output [outputs]: tokens whose logits [outputs, vocabulary]
    are computed.
    """

    _fields_ = (
        *((name, c_int64) for name in ("count", "outputs", "pages_per_row")),
        *((name, c_void_p) for name in ("x", "cos", "sin", "positions", "rows", "adapters", "pages", "pool")),
        ("output", c_void_p),
        ("logits", c_void_p),
    )


def decode(dtype: torch.dtype) -> Callable[[Model, Step], None]:
    """Return the forward pass for models of this dtype. Raises Unavailable."""
    function = getattr(load(), f"decode_{suffix(dtype)}", None)
    if function is None:
        raise Unavailable(f"there is no compiled decoding for {dtype}")
    function.restype = None
    function.argtypes = [POINTER(Model), POINTER(Step)]

    def call(model: Model, step: Step) -> None:
        function(ctypes.byref(model), ctypes.byref(step))

    return call
