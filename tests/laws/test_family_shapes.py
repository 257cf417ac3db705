"""Law: built from its published configuration, each family has its published size, and an adapter on every linear layer
has the published number of parameters. Models are on the meta device, without weights.

The totals come from logs of public training runs of the real checkpoints, or from their shapes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from luthier.config import LoraConfig
from luthier.lora.layers import attach, resolve, trainable_parameters
from luthier.models.directory import family_of, read_config
from luthier.models.native_model import empty_model
from tests.helpers.published import CONFIGS

RANK = 8
# native model type, parameters, adapter's parameters on all linear layers
FAMILIES = {
    "yi-6b-chat": ("llama", 6_061_035_520, 18_153_472),
    "phi-3-mini-4k-instruct": ("phi3", 3_821_079_552, 12_582_912),
    "baichuan2-7b-chat": ("llama", 7_505_973_248, 19_988_480),
    "glm-4-9b-chat": ("glm", 9_399_951_360, 23_797_760),
    "glm-4-9b-chat-hf": ("glm", 9_399_951_360, 23_797_760),
    "deepseek-llm-7b-chat": ("llama", 6_910_365_696, 18_739_200),
}
# adapter parameters in the published layout, in which q, k and v are one layer
FUSED = {"baichuan2-7b-chat": 17_891_328, "glm-4-9b-chat": 21_176_320}
# adapter parameters for the target names in the tutorials, some of which match no layer
PARTIAL = {
    "yi-6b-chat": (("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 16_056_320),
    "phi-3-mini-4k-instruct": (("o_proj", "down_proj"), 4_456_448),
    "glm-4-9b-chat-hf": (("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), 13_721_600),
    "deepseek-llm-7b-chat": (("q_proj", "k_proj", "v_proj", "o_proj"), 7_864_320),
}


@pytest.fixture
def full_size(tmp_path: Path) -> Callable[[str], Any]:
    """Return a function that builds the native model of a published config.json on the meta device."""

    def build(name: str) -> Any:
        shutil.copy(CONFIGS / f"{name}.json", tmp_path / "config.json")
        return empty_model(read_config(tmp_path))

    return build


def adapter_size(model: nn.Module, requested: tuple[str, ...] | None = None) -> int:
    return trainable_parameters(attach(model, LoraConfig(r=RANK), resolve(model, requested), seed=0))


@pytest.mark.parametrize("name", FAMILIES)
def test_published_sizes(full_size: Any, name: str) -> None:
    kind, parameters, adapter = FAMILIES[name]
    model = full_size(name)
    assert model.config.model_type == kind
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
    assert adapter_size(model) == adapter


@pytest.mark.parametrize("name", FUSED)
def test_sizes_in_the_fused_layout(full_size: Any, name: str, tmp_path: Path) -> None:
    """Count over the published modules: rank times (inputs + rows), however the rows are split into native modules."""
    native = dict(full_size(name).named_modules())
    modules = family_of(tmp_path).modules(read_config(tmp_path))
    parameters = 0
    for parts in modules.values():
        rows = sum(count or native[part].out_features for part, count in parts)
        parameters += RANK * (native[parts[0][0]].in_features + rows)
    assert parameters == FUSED[name]


@pytest.mark.parametrize("name", PARTIAL)
def test_sizes_of_partial_targets(full_size: Any, name: str) -> None:
    names, parameters = PARTIAL[name]
    assert adapter_size(full_size(name), names) == parameters
    assert parameters < FAMILIES[name][2]


def test_rope_of_the_converted_families(full_size: Any) -> None:
    """Baichuan2's base is in its code only; GLM-4's is 10000 times a ratio that the published conversion lacks."""
    assert full_size("baichuan2-7b-chat").config.rope_parameters["rope_theta"] == 1e4
    glm = full_size("glm-4-9b-chat").config.rope_parameters
    assert (glm["rope_theta"], glm["partial_rotary_factor"]) == (5e6, 0.5)
