"""Models of experts: what an adapter leaves frozen is reported, and layers that are not linear are never adapted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from luthier import personas
from luthier.config import LoraConfig
from luthier.errors import ConfigError, ModelError
from luthier.lora.layers import attach, resolve
from luthier.models.directory import read_config
from luthier.models.native_model import empty_model
from luthier.models.quantization import Quantisation, QuantLinear
from luthier.models.quantized_loader import QuantisedOptions, _replace_linear_layers, load_quantised
from tests.conftest import TOKENIZER

SIZE: dict[str, Any] = {
    "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_DEEPSEEK = {
    "n_routed_experts": 8, "moe_intermediate_size": 48, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1,
}  # fmt: skip
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
# model type -> its settings, the layers that are adapted by default, and the modules that stay frozen
EXPERTS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "qwen3_moe": ({"num_experts": 8, "moe_intermediate_size": 48}, QKVO, "mlp.experts"),
    "mixtral": ({"num_local_experts": 8}, QKVO, "mlp.experts"),
    "qwen2_moe": (
        {"num_experts": 8, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64}, [*QKVO, *MLP],
        "mlp.experts",
    ),
    "deepseek_v2": (_DEEPSEEK, [*LATENT, *MLP], "mlp.experts"),
    "deepseek_v3": (_DEEPSEEK, [*LATENT, *MLP], "mlp.experts"),
    "olmoe": ({"num_experts": 8}, QKVO, "mlp.experts"),
    "gpt_oss": ({"num_local_experts": 8}, QKVO, "mlp.experts"),
    "llama4_text": ({"num_local_experts": 8, "num_experts_per_tok": 1}, [*QKVO, *MLP], "feed_forward.experts"),
    "phimoe": ({"num_local_experts": 8}, QKVO, "mlp.experts"),
    "hunyuan_v1_moe": ({"num_experts": 8, "moe_topk": 2}, [*QKVO, *MLP], "mlp.experts"),
    "jetmoe": (
        {"num_local_experts": 8, "kv_channels": 16}, ["kv_proj"],
        "mlp.input_linear, mlp.output_linear, self_attention.experts.input_linear, "
        "self_attention.experts.output_linear",
    ),
}  # fmt: skip


def empty(kind: str, **sizes: Any) -> Any:
    return empty_model(AutoConfig.for_model(kind, **{**SIZE, **EXPERTS[kind][0], **sizes}))


@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_what_stays_frozen_is_reported_with_its_share(kind: str) -> None:
    model = empty(kind)
    _, adapted, frozen = EXPERTS[kind]
    targets = resolve(model, None)
    assert list(targets.leaves) == adapted
    stacked = [p for n, p in model.named_parameters() if p.ndim == 3]
    share = sum(p.numel() for p in stacked) / sum(p.numel() for p in model.parameters())
    (note,) = targets.notes
    assert note.startswith(f"the experts ({frozen}, ")
    reported = int(note.partition("%")[0].rpartition(" ")[2])
    assert abs(reported - 100 * share) < 2  # biases and routers are of the experts too
    assert note.endswith(f"stay frozen: LoRA trains linear layers only, here {', '.join(adapted)}")


def test_a_model_of_linear_layers_has_no_such_note() -> None:
    for kind in ("llama", "gemma2", "falcon_h1", "opt"):
        config = AutoConfig.for_model(kind, **{k: v for k, v in SIZE.items() if k != "num_experts_per_tok"})
        assert resolve(empty_model(config), None).notes == ()


@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_routers_are_not_adapted_by_default(kind: str) -> None:
    model = empty(kind)
    modules = resolve(model, None).modules
    assert modules and not [n for n in modules if "router" in n or "gate" in n.split(".") or "expert_gate" in n]


def test_a_router_that_is_a_linear_layer_is_adapted_if_it_is_named() -> None:
    model = empty("qwen2_moe")
    targets = resolve(model, ["q_proj", "shared_expert_gate"])
    assert targets.leaves == ("q_proj", "shared_expert_gate") and len(targets.modules) == 4


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("qwen3_moe", "gate_proj", "it belongs to the experts (mlp.experts, Qwen3MoeExperts)"),
        ("qwen3_moe", "gate_up_proj", "it belongs to the experts (mlp.experts, Qwen3MoeExperts)"),
        ("qwen3_moe", "experts.0.up_proj", "it belongs to the experts (mlp.experts, Qwen3MoeExperts)"),
        ("mixtral", "w1", "it belongs to the experts (mlp.experts, MixtralExperts)"),
        ("mixtral", "gate", "it belongs to the router (mlp.gate, MixtralTopKRouter)"),
        ("gpt_oss", "experts", "it belongs to the experts (mlp.experts, GptOssExperts)"),
        ("llama4_text", "router", "it belongs to the router (feed_forward.router, Llama4Router)"),
        ("jetmoe", "input_linear", "it belongs to the experts (mlp.input_linear, JetMoeParallelExperts)"),
    ],
)
def test_the_name_of_an_expert_or_of_a_router_is_refused_with_the_reason(kind: str, name: str, why: str) -> None:
    with pytest.raises(ConfigError) as e:
        resolve(empty(kind), ["o_proj", name, "nothing"] if kind != "jetmoe" else ["kv_proj", name, "nothing"])
    assert f"'{name}', 'nothing' are not" in e.value.message
    assert f"{name} cannot be adapted: {why}" in e.value.message
    assert f"for {name}" not in e.value.fix and f"leave {name} out" in e.value.fix


class Doubled(nn.Linear):
    """A layer that is no linear layer, though its class says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A linear layer under another name."""


def test_only_what_computes_a_linear_layer_is_adapted_or_quantised() -> None:
    config = AutoConfig.for_model("llama", **{k: v for k, v in SIZE.items() if k != "num_experts_per_tok"})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        for layer in model.model.layers:
            layer.self_attn.o_proj = Doubled(64, 64, bias=False)
            layer.self_attn.v_proj = Renamed(64, 32, bias=False)
    assert resolve(model, None).leaves == ("q_proj", "k_proj", "v_proj", *MLP)
    reason = r"o_proj cannot be adapted: it belongs to self_attn\.o_proj, which is not a linear layer but Doubled"
    with pytest.raises(ConfigError, match=reason):
        resolve(model, ["o_proj"])
    _replace_linear_layers(model, QuantisedOptions(Quantisation("nf4"), torch.float32, cache=False))
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, QuantLinear) and isinstance(attention.v_proj, QuantLinear)
    assert type(attention.o_proj) is Doubled


def test_llama4_computes_with_an_adapter_on_its_default_layers() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama4_text", **{**SIZE, **EXPERTS["llama4_text"][0]})
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model(input_ids=torch.arange(20)[None]).logits
    attach(model, LoraConfig(), resolve(model, None), seed=0)
    assert torch.equal(before, model(input_ids=torch.arange(20)[None]).logits)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tiny Qwen3-MoE and the test tokenizer."""
    path = tmp_path_factory.mktemp("moe") / "qwen3_moe"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_moe", **{**SIZE, **EXPERTS["qwen3_moe"][0]})
    ).save_pretrained(path)
    shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
    return path


def test_a_base_that_stores_each_expert_on_its_own_is_not_quantised(qwen3_moe: Path) -> None:
    options = QuantisedOptions(Quantisation("int8"), torch.float32, cache=False)
    with pytest.raises(ModelError, match="each expert on its own.*neither quantise, merge nor export") as e:
        load_quantised(qwen3_moe, torch.float32, torch.device("cpu"), read_config(qwen3_moe), options)
    assert "--set model.load_in_4bit=false" in e.value.fix


def test_check_train_and_estimate_report_what_stays_frozen(
    qwen3_moe: Path, luthier: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = ["--model", qwen3_moe, "--data", personas.TEAHOUSE]
    expected = "the experts (mlp.experts, 5"
    checked = luthier("check", *arguments)
    assert checked.code == 0 and f"note: {expected}" in checked.out
    assert expected in json.loads(luthier("check", *arguments, "--json").out)["model_notes"][0]
    for options in ([*arguments], ["--model", qwen3_moe]):
        assert f"note: {expected}" in luthier("estimate", *options).out
        assert expected in json.loads(luthier("estimate", *options, "--json").out)["model_notes"][0]
    settings = ["--set", "train.max_steps=2", "--set", "train.eval_time_ratio=0"]
    trained = luthier("train", *arguments, "--output-dir", tmp_path / "run", *settings)
    assert trained.code == 0, trained.err
    assert f"note: {expected}" in trained.err
