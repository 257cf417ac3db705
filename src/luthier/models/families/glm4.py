"""GLM-4 as published first (``model_type: chatglm``) as transformers' Glm, and a note on the ``-hf`` checkpoint.

Source: the model's own modeling_chatglm.py: q|k|v in one matrix with biases, gate|up in another, rotary pairs
interleaved on half of each head, base ``10000 * rope_ratio``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import GlmConfig, PretrainedConfig

from luthier.errors import ModelError
from luthier.models.families.base import Family, Rule

_SAME = {  # published key: native key
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
}
_NEEDED = {  # what the native class computes; another value is another model
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "fp32_residual_connection": False,
}


def config(raw: Mapping[str, object]) -> PretrainedConfig:
    """Raises ModelError for the first ChatGLM, and for settings that the native class does not compute."""
    missing = [key for key in _SAME if key not in raw]
    if missing:
        raise ModelError(
            f"a chatglm model without {', '.join(missing)} is not GLM-4's layout",
            "use glm-4-9b-chat or glm-4-9b-chat-hf",
        )
    other = [f"{k}: {raw[k]}" for k, needed in _NEEDED.items() if raw.get(k, needed) is not needed]
    if other:
        raise ModelError(f"no native class computes a chatglm model with {', '.join(other)}", "use glm-4-9b-chat")
    heads = raw["num_attention_heads"]
    found = GlmConfig(
        **{native: raw[published] for published, native in _SAME.items()},
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
    found.architectures = ["GlmForCausalLM"]
    return found


def layer_rules(native: PretrainedConfig) -> Sequence[Rule]:
    old, new = "transformer.encoder.layers.{i}.", "model.layers.{i}."
    kv = native.num_key_value_heads * native.head_dim
    qkv = (native.num_attention_heads * native.head_dim, kv, kv)
    kinds = ("weight", "bias") if native.attention_bias else ("weight",)
    same = {
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
        *(Rule(f"{old}{a}.weight", (f"{new}{b}.weight",)) for a, b in same.items()),
        Rule("transformer.encoder.final_layernorm.weight", ("model.norm.weight",)),
        Rule("transformer.output_layer.weight", ("lm_head.weight",)),
    ]


def hf_notes(native: PretrainedConfig) -> Sequence[str]:
    """The published -hf configuration lost the original's rope_ratio of 500."""
    theta = (native.rope_parameters or {}).get("rope_theta")
    if theta != 10000.0:
        return ()
    return (
        "this checkpoint's rope_theta is 10000, the original GLM-4-9B-chat's is 5000000; it is kept as published "
        "(to use the original's: --set model.rope_theta=5000000)",
    )


ORIGINAL = Family("GLM-4", "glm", "glm4", config, layer_rules)
HF = Family("GLM-4 (-hf)", "glm", notes=hf_notes)
