"""Convert the first published layout of GLM-4 (``model_type: chatglm``) to transformers' Glm.

Source: the model's own modeling_chatglm.py: q|k|v in one matrix with biases, gate|up in another, rotary pairs
interleaved on half of each head, base ``10000 * rope_ratio``. The ``-hf`` checkpoint is native and only gets a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import GlmConfig, PretrainedConfig

from luthier.errors import ModelError
from luthier.models.families.base import Family, Rule

_NATIVE_KEYS = {  # published key: native key
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
}
_REQUIRED = {  # the native class supports only these values
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "fp32_residual_connection": False,
}


def config(raw: Mapping[str, object]) -> PretrainedConfig:
    """Convert a published configuration. Raises ModelError for older ChatGLM models and for unsupported settings."""
    missing = [key for key in _NATIVE_KEYS if key not in raw]
    if missing:
        raise ModelError(
            f"a chatglm model without {', '.join(missing)} does not have GLM-4's layout",
            "use glm-4-9b-chat or glm-4-9b-chat-hf",
        )
    unsupported = [f"{k}: {raw[k]}" for k, required in _REQUIRED.items() if raw.get(k, required) is not required]
    if unsupported:
        raise ModelError(f"no native class supports a chatglm model with {', '.join(unsupported)}", "use glm-4-9b-chat")
    heads = raw["num_attention_heads"]
    converted = GlmConfig(
        **{native: raw[published] for published, native in _NATIVE_KEYS.items()},
        num_key_value_heads=raw["multi_query_group_num"] if raw.get("multi_query_attention") else heads,
        attention_bias=bool(raw.get("add_qkv_bias")),
        hidden_act="silu",
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * float(str(raw.get("rope_ratio", 1))),
            "partial_rotary_factor": 0.5,
        },
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
    )
    converted.architectures = ["GlmForCausalLM"]
    return converted


def layer_rules(native: PretrainedConfig) -> Sequence[Rule]:
    """List the published tensors and their conversion."""
    old, new = "transformer.encoder.layers.{i}.", "model.layers.{i}."
    kv = native.num_key_value_heads * native.head_dim
    qkv = (native.num_attention_heads * native.head_dim, kv, kv)
    kinds = ("weight", "bias") if native.attention_bias else ("weight",)
    renamed = {
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
    }
    return [
        Rule("transformer.embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
        *(
            Rule(
                f"{old}self_attention.query_key_value.{kind}",
                tuple(f"{new}self_attn.{x}_proj.{kind}" for x in "qkv"),
                qkv,
            )
            for kind in kinds
        ),
        *(Rule(f"{old}{a}.weight", (f"{new}{b}.weight",)) for a, b in renamed.items()),
        Rule("transformer.encoder.final_layernorm.weight", ("model.norm.weight",)),
        Rule("transformer.output_layer.weight", ("lm_head.weight",)),
    ]


def hf_notes(native: PretrainedConfig) -> Sequence[str]:
    """Note that the published -hf configuration lacks the original's rope_ratio of 500."""
    theta = (native.rope_parameters or {}).get("rope_theta")
    if theta != 10000.0:
        return ()
    return (
        "this checkpoint has rope_theta 10000, which is used as published; the original GLM-4-9B-chat has 5000000 "
        "(to use that: --set model.rope_theta=5000000)",
    )


ORIGINAL = Family("GLM-4", "glm", "glm4", config, layer_rules)
HF = Family("GLM-4 (-hf)", "glm", notes=hf_notes)
