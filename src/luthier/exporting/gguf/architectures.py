"""A native model in llama.cpp's terms: architecture, hyperparameters, names of tensors, order of rows.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and the GGUF specification (names of keys and tensors).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from luthier.errors import ModelError

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
    "mlp.gate_up_proj": "ffn_up",  # gate's rows first, as llama.cpp takes them
    "mlp.down_proj": "ffn_down",
}
_INSTEAD = "use --to hf, which stock transformers loads"


@dataclass(frozen=True, slots=True)
class Architecture:
    """name: llama.cpp's. pairs: it turns neighbouring values (2i, 2i+1), where transformers turns halves (i, i + n/2),
    so rows of queries and keys change places."""

    name: str
    pairs: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True),
    "qwen2": Architecture("qwen2"),
    "phi3": Architecture("phi3"),
    "glm": Architecture("chatglm"),  # transformers turns pairs here too
}


def architecture(config: PretrainedConfig) -> Architecture:
    """Raises ModelError for a model that llama.cpp would compute differently, or that no mapping is known of."""
    kind = str(config.model_type)
    found = ARCHITECTURES.get(kind)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"no GGUF of a {kind} model can be written; those known are {known}", _INSTEAD)
    act = getattr(config, "hidden_act", "silu")
    scaling = _rope(config).get("rope_type", "default")
    odd = [
        *([f"activation {act}"] if act not in ("silu", "swish") else []),
        *([f"rotary scaling {scaling}"] if scaling not in ("default", "linear", "llama3") else []),
        *(["a sliding window"] if kind == "qwen2" and getattr(config, "use_sliding_window", False) else []),
    ]
    if odd:
        raise ModelError(f"no GGUF of a {kind} model with {', '.join(odd)} can be written", _INSTEAD)
    return found


def tensor_name(native: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``; a module's name likewise."""
    stem, kind = (native, "") if not native.endswith((".weight", ".bias")) else native.rsplit(".", 1)
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        name = f"blk.{found.group(1)}.{_LAYER[found.group(2)]}"
    else:
        name = _TOP[stem]
    return f"{name}.{kind}" if kind else name


def reordered(config: PretrainedConfig, native: str) -> Callable[[Tensor], Tensor]:
    """How a tensor's rows [heads * size, ...] are put in llama.cpp's order."""
    return _rows_turned(config, native, (2, -1))


def restored(config: PretrainedConfig, native: str) -> Callable[[Tensor], Tensor]:
    """The way back from ``reordered``."""
    return _rows_turned(config, native, (-1, 2))


def _rows_turned(config: PretrainedConfig, native: str, split: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Each head's rows, seen as ``split``, transposed: of queries and keys, where the architecture turns pairs."""
    part = re.search(r"\.([qk])_proj(\.|$)", native)
    if not ARCHITECTURES[config.model_type].pairs or not part:
        return lambda t: t
    heads = config.num_attention_heads if part.group(1) == "q" else config.num_key_value_heads
    return lambda t: t.reshape(heads, *split, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_hyperparameters(writer: GGUFWriter, config: PretrainedConfig) -> None:
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
    """[size / 2]: what each rotary frequency is divided by (Llama 3.1's scaling); None where nothing is."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size, whole = head_size(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    found = []
    for i in range(0, size, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / size)
        smooth = min(1.0, max(0.0, (whole / length - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def notes(config: PretrainedConfig) -> list[str]:
    """What the file does not say of the model."""
    window = getattr(config, "sliding_window", None) if config.model_type == "phi3" else None
    if not window or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp lets this model look back at everything, in training it looked back {window} tokens: replies to "
        "longer conversations may differ"
    ]


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary settings, the share of each head that is turned included."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    if share := getattr(config, "partial_rotary_factor", None):
        found.setdefault("partial_rotary_factor", share)
    return found
