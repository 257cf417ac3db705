"""Map a native model to llama.cpp: architecture, hyperparameters, tensor names, order of rows.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and the GGUF specification (names of keys and tensors).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from luthier.errors import ModelError
from luthier.models.directory import head_size

if TYPE_CHECKING:
    from jaxtyping import Float

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",  # gate's rows first, as llama.cpp expects
    "mlp.down_proj": "ffn_down",
}
_INSTEAD = "use --to hf, which stock transformers loads"


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp.

    name:  in llama.cpp.
    pairs: its rotary embedding rotates values (2i, 2i+1), that of transformers (i, i + n/2), so the rows of queries
           and keys are reordered.
    """

    name: str
    pairs: bool = False


class _Rope(TypedDict, total=False):
    """The rotary settings of a transformers configuration."""

    rope_type: str
    rope_theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    partial_rotary_factor: float


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True),
    "qwen2": Architecture("qwen2"),
    "phi3": Architecture("phi3"),
    "glm": Architecture("chatglm"),  # transformers rotates pairs here too
}


def architecture(config: PretrainedConfig) -> Architecture:
    """Return llama.cpp's architecture of a model. Raises ModelError if there is none that computes the same."""
    kind = str(config.model_type)
    known = ARCHITECTURES.get(kind)
    if known is None:
        names = ", ".join(ARCHITECTURES)
        raise ModelError(f"a {kind} model cannot be written as GGUF; the supported types are {names}", _INSTEAD)
    act = getattr(config, "hidden_act", "silu")
    scaling = _rope(config).get("rope_type", "default")
    unsupported = [
        *([f"activation {act}"] if act not in ("silu", "swish") else []),
        *([f"rotary scaling {scaling}"] if scaling not in ("default", "linear", "llama3") else []),
        *(["a sliding window"] if kind == "qwen2" and getattr(config, "use_sliding_window", False) else []),
    ]
    if unsupported:
        raise ModelError(f"a {kind} model with {', '.join(unsupported)} cannot be written as GGUF", _INSTEAD)
    return known


def tensor_name(native: str) -> str:
    """Translate a tensor or module name, ``model.layers.3.self_attn.q_proj.weight`` to ``blk.3.attn_q.weight``."""
    stem, suffix = (native, "") if not native.endswith((".weight", ".bias")) else native.rsplit(".", 1)
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        name = f"blk.{match.group(1)}.{_LAYER[match.group(2)]}"
    else:
        name = _TOP[stem]
    return f"{name}.{suffix}" if suffix else name


def reordered(config: PretrainedConfig, native: str) -> Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]:
    """Return the function that puts a tensor's rows [heads * size, ...] in llama.cpp's order."""
    return _transposed_rows(config, native, (2, -1))


def restored(config: PretrainedConfig, native: str) -> Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]:
    """Return the inverse of ``reordered``."""
    return _transposed_rows(config, native, (-1, 2))


def _transposed_rows(
    config: PretrainedConfig, native: str, split: tuple[int, int]
) -> Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]:
    """Transpose the rows of each head, reshaped to ``split``, for queries and keys of architectures with pairs."""
    part = re.search(r"\.([qk])_proj(\.|$)", native)
    if not ARCHITECTURES[config.model_type].pairs or not part:
        return lambda t: t
    heads = config.num_attention_heads if part.group(1) == "q" else config.num_key_value_heads
    return lambda t: t.reshape(heads, *split, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def write_hyperparameters(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Add sizes, rotary settings and the like to the file's header."""
    size = head_size(config)
    rope = _rope(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)


def rope_factors(config: PretrainedConfig) -> NDArray[np.float32] | None:
    """Compute the divisors of the rotary frequencies for Llama 3.1's scaling: [head size / 2]; None without it."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size, context = head_size(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    divisors = []
    for i in range(0, size, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / size)
        smooth = min(1.0, max(0.0, (context / length - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def notes(config: PretrainedConfig) -> list[str]:
    """Describe how llama.cpp's model differs from ours on long inputs, if it does."""
    window = getattr(config, "sliding_window", None) if config.model_type == "phi3" else None
    if not window or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp does not limit this model's attention to the last {window} tokens, as training did: replies in "
        "longer conversations may differ"
    ]


def _rope(config: PretrainedConfig) -> _Rope:
    """Return the rotary settings, including the share of each head that is rotated."""
    rope: _Rope = {}
    if settings := getattr(config, "rope_parameters", None):
        rope.update(settings)
    if share := getattr(config, "partial_rotary_factor", None):
        rope.setdefault("partial_rotary_factor", share)
    return rope
