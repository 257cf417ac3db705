"""The reference implementations equal transformers' classes, and detect every conversion error."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GlmConfig, LlamaConfig

from tests.helpers.definitions import baichuan2_logits, glm4_logits
from tests.helpers.published import baichuan2, glm4, read_config, read_tensors

IDS = torch.randint(0, 704, (2, 48), generator=torch.Generator().manual_seed(3))

# what transformers/models/glm/convert_glm_weights_to_hf.py renames (the script is not part of the installed package)
GLM_NAMES = (
    ("transformer.output_layer.", "lm_head."),
    ("transformer.embedding.word_embeddings.", "model.embed_tokens."),
    ("transformer.encoder.final_layernorm.", "model.norm."),
    ("transformer.encoder.layers.", "model.layers."),
    (".self_attention.dense.", ".self_attn.o_proj."),
    (".mlp.dense_h_to_4h.", ".mlp.gate_up_proj."),
    (".mlp.dense_4h_to_h.", ".mlp.down_proj."),
)


def native_glm(tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """GlmForCausalLM with the published weights in fp32; queries, keys and values split by hand."""
    size, groups = config["kv_channels"], config["multi_query_group_num"]
    rows = [config["num_attention_heads"] * size, groups * size, groups * size]
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("inv_freq"):
            continue
        native = reduce(lambda text, pair: text.replace(*pair), GLM_NAMES, name)
        if "query_key_value" in name:
            for part, value in zip("qkv", tensor.split(rows), strict=True):
                state[native.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = value.float()
        else:
            state[native] = tensor.float()
    settings = GlmConfig(
        vocab_size=config["padded_vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=groups,
        head_dim=size,
        rms_norm_eps=config["layernorm_epsilon"],
        attention_bias=config["add_qkv_bias"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * config["rope_ratio"],
            "partial_rotary_factor": 0.5,
        },
        pad_token_id=config["pad_token_id"],
        eos_token_id=config["eos_token_id"],
    )
    return _loaded(settings, state)


def native_llama(tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """LlamaForCausalLM with Baichuan2's weights in fp32: W_pack split in thirds, the head's rows normalised."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "W_pack" in name:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("W_pack", f"{part}_proj")] = value.float()
        else:
            state[name] = F.normalize(tensor.float()) if name == "lm_head.weight" else tensor.float()
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    settings = LlamaConfig(
        **{key: config[key] for key in same}, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    return _loaded(settings, state)


def _loaded(config: Any, state: dict[str, Tensor]) -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def test_glm4_equals_the_native_class(tmp_path: Path) -> None:
    path = glm4(tmp_path)
    tensors, config = read_tensors(path), read_config(path)
    logits = glm4_logits(tensors, config, IDS)
    assert logits.dtype is torch.float32
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, native_glm(tensors, config)(input_ids=IDS).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["bin", "bin-shards"])
def test_baichuan2_equals_the_native_class(tmp_path: Path, weights: str) -> None:
    path = baichuan2(tmp_path, weights)
    tensors, config = read_tensors(path), read_config(path)
    logits = baichuan2_logits(tensors, config, IDS)
    assert logits.dtype is torch.float32
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, native_llama(tensors, config)(input_ids=IDS).logits, atol=1e-5, rtol=0)


def test_glm4_detects_every_conversion_error(tmp_path: Path) -> None:
    """Every possible conversion error changes the logits far beyond the tolerance."""
    path = glm4(tmp_path)
    tensors, config = read_tensors(path), read_config(path)
    expected = glm4_logits(tensors, config, IDS)
    fused = "transformer.encoder.layers.0.self_attention.query_key_value"
    gate_up = "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"
    q, k, v = tensors[f"{fused}.weight"].split([64, 32, 32])
    changed = {
        "rope_ratio lost": (tensors, {**config, "rope_ratio": 1}),
        "another eps": (tensors, {**config, "layernorm_epsilon": 1e-2}),
        "keys and values swapped": (tensors | {f"{fused}.weight": torch.cat([q, v, k])}, config),
        "biases dropped": (tensors | {f"{fused}.bias": torch.zeros(128)}, config),
        "gate and up swapped": (tensors | {gate_up: tensors[gate_up].roll(96, 0)}, config),
        "key groups swapped": (tensors | {f"{fused}.weight": torch.cat([q, k.roll(16, 0), v])}, config),
    }
    for name, (weights, settings) in changed.items():
        assert (glm4_logits(weights, settings, IDS) - expected).abs().max() > 1e-3, name


def test_baichuan2_detects_every_conversion_error(tmp_path: Path) -> None:
    path = baichuan2(tmp_path)
    tensors, config = read_tensors(path), read_config(path)
    expected = baichuan2_logits(tensors, config, IDS)
    packed, head = "model.layers.0.self_attn.W_pack.weight", tensors["lm_head.weight"].float()
    q, k, v = tensors[packed].chunk(3)
    for name, order in {"q and k swapped": (k, q, v), "k and v swapped": (q, v, k)}.items():
        assert (baichuan2_logits(tensors | {packed: torch.cat(order)}, config, IDS) - expected).abs().max() > 1e-3, name
    assert head.norm(dim=-1).std() > 0.1  # so that an unnormalised head gives other logits
    torch.testing.assert_close(baichuan2_logits(tensors | {"lm_head.weight": 3 * head}, config, IDS), expected)


@pytest.mark.parametrize(("make", "logits"), [(glm4, glm4_logits), (baichuan2, baichuan2_logits)])
def test_a_token_sees_only_the_past(tmp_path: Path, make: Any, logits: Any) -> None:
    path = make(tmp_path)
    tensors, config = read_tensors(path), read_config(path)
    other = torch.cat([IDS[:, :30], IDS[:, 30:].flip(1)], dim=1)
    before, after = (logits(tensors, config, ids) for ids in (IDS, other))
    torch.testing.assert_close(after[:, :30], before[:, :30])
    assert (after[:, 30:] - before[:, 30:]).abs().max() > 1e-3
