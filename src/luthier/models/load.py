"""A model directory -> a transformers model. The library's own class, never code from the directory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.utils import logging as hf_logging

from luthier.errors import ConfigError, ModelError
from luthier.models.directory import family_of, read_config
from luthier.models.families import Rule
from luthier.models.fit import Fit, collapse, match
from luthier.models.shards import Shards

Say = Callable[[str], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device() -> torch.device:
    """The device that trains: CUDA where there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the device computes in it natively; CUDA without it: float16; else float32.

    Raises ConfigError for a name that is none.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ConfigError(f"--dtype {name}: is not a type", "use auto, float32, bfloat16 or float16")
    if device.type == "cuda":  # not yet run on a GPU
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Emulated bfloat16 is many times slower than float32, so only the real thing counts."""
    found = torch.cpu.get_capabilities()
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(found.get("bf16") or found.get("sve_bf16"))
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def empty_model(config: PretrainedConfig) -> nn.Module:
    """The model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        model: nn.Module = _build(config)
    return model


def base_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model itself, tied ones once."""
    return sum(p.numel() for p in empty_model(config).parameters())


def _build(config: PretrainedConfig, dtype: torch.dtype | None = None) -> Any:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as e:  # sizes that do not fit each other, unknown activations, ...
        raise ModelError(
            f"config.json describes no model that can be built ({' '.join(str(e).split())[:200]})",
            "download the model again",
        ) from None


def load_weights(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    config: PretrainedConfig | None = None,
    say: Say = lambda _: None,
) -> Any:
    """The whole model in ``dtype`` on ``device``, from its published layout, one tensor in memory at a time.

    config: what ``read_config`` returned, perhaps with settings of the run's. Raises ModelError listing every tensor
    that is missing, surplus or of another shape; nothing is loaded then.
    """
    config = config or read_config(path)
    family = family_of(path)
    shards = Shards.open(path)
    model = hollow(config, dtype)
    fit = match(shards.shapes, family.rules(config), model)
    if fit.problems and family.layer_rules is None:
        return _general(path, config, dtype, fit.problems).to(device).eval()  # transformers may know other names
    if fit.ignored:
        say(f"{path}: not used, as the model computes them: {', '.join(collapse(fit.ignored))}")
    for name, tensor in native_tensors(shards, fit, dtype):
        put(model, name, tensor.to(device))
    return finish(model, path, fit, device)


def finish(model: Any, path: Path, fit: Fit, device: torch.device | str) -> Any:
    """Tie what is tied, read generation_config.json, and hand the model over in evaluation mode."""
    model.tie_weights(missing_keys=set(fit.missing), recompute_mapping=False)
    if (path / "generation_config.json").is_file():
        model.generation_config = _generation_config(path)
    return model.to(device).eval()


def checkpoint_tensors(path: Path, config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(native name, tensor in its stored type), one at a time. Raises ModelError as ``load_weights`` does."""
    for _, rule, tensor in published_tensors(path, config):
        if rule:
            yield from rule.split(tensor, tensor.dtype)


def native_names(path: Path, config: PretrainedConfig) -> list[str]:
    """The names that ``checkpoint_tensors`` gives, in its order; headers alone are read. Raises ModelError."""
    shards = Shards.open(path)
    fit = match(shards.shapes, family_of(path).rules(config), empty_model(config))
    refuse_unfit(shards, fit)
    return [part for name in shards.in_file_order() if name in fit.rules for part in fit.rules[name].parts]


def published_tensors(path: Path, config: PretrainedConfig) -> Iterator[tuple[str, Rule | None, torch.Tensor]]:
    """(published name, what becomes of it, tensor as stored), one at a time; no rule: the model computes it itself.

    Raises ModelError as ``load_weights`` does, before the first one is read.
    """
    shards = Shards.open(path)
    fit = match(shards.shapes, family_of(path).rules(config), empty_model(config))
    refuse_unfit(shards, fit)
    for name in shards.in_file_order():
        yield name, fit.rules.get(name), shards.read(name)


def native_tensors(
    shards: Shards, fit: Fit, dtype: torch.dtype | None = None, as_stored: Collection[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every native tensor in ``dtype`` (None, and those named in ``as_stored``: in the type it is stored in).

    Raises ModelError where the checkpoint does not fit.
    """
    refuse_unfit(shards, fit)
    for name in shards.in_file_order():
        if rule := fit.rules.get(name):
            tensor = shards.read(name)
            kept = dtype is None or not set(rule.parts).isdisjoint(as_stored)
            yield from rule.split(tensor, tensor.dtype if kept else dtype, own=True)  # type: ignore[arg-type]


def refuse_unfit(shards: Shards, fit: Fit) -> None:
    """Raise ModelError where a checkpoint is not this model's."""
    if fit.problems:
        raise ModelError(f"{shards.path}: the weights do not fit the model ({fit.told()})", "download the model again")


def hollow(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The model with parameters on meta and its computed tables in memory, as ``from_pretrained`` makes them."""
    with init_empty_weights(include_buffers=False):
        return _build(config, dtype)


def put(model: Any, name: str, tensor: torch.Tensor) -> None:
    """Give a parameter or a buffer its value."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def _generation_config(path: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as e:  # transformers validates with many kinds of error
        file = path / "generation_config.json"
        raise ModelError(f"{file}: cannot be read ({' '.join(str(e).split())[:200]})", "download it again") from None


def _general(path: Path, config: PretrainedConfig, dtype: torch.dtype, problems: Sequence[str]) -> Any:
    """transformers' own loading, for models whose published names it converts itself."""
    hf_logging.disable_progress_bar()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            weights_only=True,
        )
    except Exception as e:  # safetensors, pickle, OS and transformers errors alike: the files are at fault
        raise ModelError(
            f"{path}: the weights cannot be read ({' '.join(str(e).split())[:300]})", "download the model again"
        ) from None
    finally:
        hf_logging.set_verbosity(verbosity)
    if any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ModelError(
            f"{path}: the weights do not fit the model ({Fit(problems=list(problems)).told()})",
            "download the model again",
        )
    return model
