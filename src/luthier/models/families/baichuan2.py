"""Convert Baichuan2-7B to Llama: split ``W_pack`` into q, k and v, scale NormHead's rows to length one, rope base 1e4.

Source: the model's own modeling_baichuan.py (rope base and NormHead are written in its code, not in config.json).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import LlamaConfig, PretrainedConfig

from luthier.errors import ModelError
from luthier.models.families.base import Family, Rule

_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def config(raw: Mapping[str, object]) -> PretrainedConfig:
    """Convert a published configuration. Raises ModelError for 13B models (ALiBi positions) and for Baichuan 1."""
    if "max_position_embeddings" not in raw or str(raw.get("position_embedding", "ROPE")).upper() == "ALIBI":
        raise ModelError(
            "Baichuan 13B models use ALiBi positions, which no native class supports", "use Baichuan2-7B-Chat"
        )
    architectures = raw.get("architectures")
    if isinstance(architectures, list) and "BaiChuanForCausalLM" in architectures:
        raise ModelError("Baichuan-7B (version 1) has a different head and template", "use Baichuan2-7B-Chat")
    missing = [key for key in _SHARED_KEYS if key not in raw]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}", "download the model again")
    native = LlamaConfig(
        **{key: raw[key] for key in _SHARED_KEYS},
        num_key_value_heads=raw["num_attention_heads"],
        hidden_act=raw.get("hidden_act", "silu"),
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=raw.get("bos_token_id", 1),
        eos_token_id=raw.get("eos_token_id", 2),
        pad_token_id=raw.get("pad_token_id", 0),
    )
    native.architectures = ["LlamaForCausalLM"]
    return native


def layer_rules(native: PretrainedConfig) -> Sequence[Rule]:
    """List the published tensors and their conversion."""
    layer = "model.layers.{i}."
    same = (
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    )
    size = native.hidden_size
    return [
        Rule("model.embed_tokens.weight", ("model.embed_tokens.weight",)),
        Rule(
            f"{layer}self_attn.W_pack.weight",
            tuple(f"{layer}self_attn.{x}_proj.weight" for x in "qkv"),
            (size, size, size),
        ),
        *(Rule(f"{layer}{name}.weight", (f"{layer}{name}.weight",)) for name in same),
        Rule("model.norm.weight", ("model.norm.weight",)),
        Rule("lm_head.weight", ("lm_head.weight",), unit_rows=True),
    ]


FAMILY = Family("Baichuan2", "llama", "baichuan2", config, layer_rules)
