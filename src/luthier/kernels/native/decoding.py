"""The structures that the compiled forward pass of ``decode.cpp`` reads, field by field as C++ declares them.

The C++ side sees only addresses. ``compiled.decoder`` and ``models.quantization`` build these structures, from
tensors that they check and keep, and call the functions.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

PAGE = 32  # tokens per page
GROUPS, MATRICES = 4, 3  # groups of a layer: q k v, o, gate up, down; matrices of a group at most
FLOAT, BFLOAT, FOUR, EIGHT = range(4)  # kinds of a matrix


class MatrixStruct(Structure):
    """A weight matrix [n, k]. data: rows ``ld`` elements apart if dense, else without gaps.

    bias: fp32. FOUR: table [16]; absmax per block, or absmax8, code [256], nested and offset. EIGHT: absmax per row.
    """

    _fields_ = (
        *((name, c_int64) for name in ("kind", "n", "k", "ld")),
        *((name, c_void_p) for name in ("data", "bias", "table", "absmax", "absmax8", "code", "nested")),
        ("offset", c_float),
    )


class GroupStruct(Structure):
    """Matrices that read the same input. n, k: output and input width."""

    _fields_ = (*((name, c_int64) for name in ("count", "n", "k")), ("matrices", MatrixStruct * MATRICES))


class UpdateStruct(Structure):
    """An adapter's change of one matrix: ``bt.T @ (a @ x)``. a [rank, k], scaled; bt [rank, n]; both fp32."""

    _fields_ = (("rank", c_int64), ("a", c_void_p), ("bt", c_void_p))


class LayerStruct(Structure):
    """A decoder layer. norm, norm2: weights of the RMS norms, fp32. window: sliding window; 0 if there is none."""

    _fields_ = (
        ("norm", c_void_p),
        ("norm2", c_void_p),
        ("eps", c_float),
        ("eps2", c_float),
        ("window", c_int64),
        ("groups", GroupStruct * GROUPS),
    )


class ModelStruct(Structure):
    """A model. mlp: its width. updates [adapters, layers, GROUPS, MATRICES]. page_bytes: of one page."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv", "dim", "rotary", "interleaved", "mlp")),
        ("scale", c_float),
        ("eps", c_float),
        ("layer", POINTER(LayerStruct)),
        ("norm", c_void_p),
        ("head", MatrixStruct),
        ("updates", POINTER(UpdateStruct)),
        ("page_bytes", c_int64),
    )


class StepStruct(Structure):
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
