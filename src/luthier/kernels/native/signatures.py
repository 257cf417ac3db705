"""Declare the compiled functions: their parameters, as the C++ sources have them, and what these must fulfil.

``SIGNATURES`` has the parameters in order (a test compares them with the C++ sources):

n            an int64; i, u, f after a colon: int, uint32, float
x:T[n,k]     a contiguous tensor [n, k]; T: the element type of the function; f32, i64, u8, i8: that type
x:T[n,k]/ld  a tensor [n, at least k] whose rows are ``ld`` elements apart; ``ld`` is another parameter
last(x)      the last element of the tensor x
x:T[n]?      may be None; ?rank: only if the number ``rank`` is 0

``CONDITIONS`` has what the C++ code relies on besides; without it, a call would access memory outside a tensor:

k%16         k is a multiple of 16, the widest vector in floats
ld>=k+rank   holds for numbers; if the left side is an index tensor, for each of its elements
x<n          all elements of the index tensor x
ascending(x) no element of the index tensor x is smaller than the one before it
earlier(x)   element i of the index tensor x is smaller than i: a segment comes after its parent
placed(x)    x has the rows of the queries (None: all rows): ascending, those of each segment inside that segment
"""

from __future__ import annotations

_LORA = "rank a:f32[rank,k]?rank factor:f32[rank]?rank key:u threshold:u places:i64[n]?"
_PLACE = (
    "count offsets:i64[count+1] parents:i64[count] shared query_offsets:i64[count+1] "
    "query_rows:i64[last(query_offsets)]? heads kv dim window scale:f"
)
_QKV = "q:T[last(query_offsets),heads*dim]/ldq ldq k:T[last(offsets),kv*dim]/ldk v:T[last(offsets),kv*dim]/ldk ldk"
SIGNATURES = {
    "norm_forward": f"n k x:T[n,k] w:T[k] eps:f {_LORA} out:T[n,ldo] ldo saved:T[n,rank]?rank rstd:f32[n]",
    "norm_backward": (
        f"n k x:T[n,k] w:T[k] rstd:f32[n] {_LORA} grad:T[n,k+rank]/ldg ldg residual:T[n,k] out:T[n,k]? "
        "grad_a:f32[rank,k]?rank"
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

_SEGMENTS = (
    "heads>=1 kv>=1 dim>=1 heads%kv dim%16 window>=0 offsets>=0 ascending(offsets) earlier(parents) "
    "placed(query_rows) last(offsets)>=shared shared>=0"
)
CONDITIONS = {
    "norm_forward": "k%16 ldo>=k+rank",
    "norm_backward": "k%16",
    "swiglu_forward": "k%16 ldo>=k+rank",
    "swiglu_backward": "k%16",
    "lora_forward": "k%16 ld>=k+rank",
    "lora_backward": "k%16 ld>=k",
    "rotate": "width>=heads*dim dim>=rotary",
    "attend_forward": _SEGMENTS,
    "attend_backward": _SEGMENTS,
    "cross_entropy": "targets>=0 targets<vocabulary",
    "four_bits": "k%64",
}
