"""Load a model directory as a transformers model, with the library's own class and never code from the directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as hf_logging

from luthier._util.files import user_path
from luthier.config import ModelConfig
from luthier.devices.device import DTYPES, pick_device, pick_dtype, trim_freed_memory
from luthier.errors import ModelError
from luthier.models.checkpoint_reader import Shards
from luthier.models.directory import family_of, read_config
from luthier.models.native_model import (
    Fit,
    collapse,
    empty_model,
    empty_with_buffers,
    finish,
    match,
    native_tensors,
    put,
    refuse_unfit,
    with_contiguous_head,
)
from luthier.models.protocols import CausalLM, HfTokenizer
from luthier.models.quantization import Quantisation, bitsandbytes_functions
from luthier.models.quantized_loader import QuantisedOptions, load_quantised
from luthier.models.tokenizer.tokenizer import has_tokenizer, load_tokenizer
from luthier.types import Log


def load_weights(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    config: PretrainedConfig | None = None,
    log: Log = lambda _: None,
) -> CausalLM:
    """Load the whole model in ``dtype`` on ``device``, reading one published tensor at a time.

    config: the result of ``read_config``, possibly with settings of the run; default: read from ``path``.
    Raises ModelError listing every tensor that is missing, unexpected or of the wrong shape, before any is loaded.
    """
    config = config or read_config(path)
    family = family_of(path)
    shards = Shards.open(path)
    model = empty_with_buffers(config, dtype)
    fit = match(shards.shapes, family.rules(config), model)
    if fit.problems and family.layer_rules is None:
        # transformers may convert other published names itself
        return _load_with_transformers(path, config, dtype, fit.problems).to(device).eval()
    if fit.ignored:
        log(f"{path}: ignored, because the model computes them itself: {', '.join(collapse(fit.ignored))}")
    for name, tensor in native_tensors(shards, fit, dtype):
        put(model, name, tensor.to(device))
    return finish(model, path, fit, device)


def _load_with_transformers(
    path: Path, config: PretrainedConfig, dtype: torch.dtype, problems: Sequence[str]
) -> CausalLM:
    """Load with ``from_pretrained``, for models whose published names transformers converts itself."""
    hf_logging.disable_progress_bar()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model: CausalLM
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
    except Exception as e:  # errors of safetensors, pickle, the OS and transformers all point to a bad file
        raise ModelError(
            f"{path}: the weights cannot be read ({' '.join(str(e).split())[:300]})", "download the model again"
        ) from None
    finally:
        hf_logging.set_verbosity(verbosity)
    if any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ModelError(
            f"{path}: the weights do not fit the model ({Fit(problems=list(problems)).summary()})",
            "download the model again",
        )
    return with_contiguous_head(model)


def quantisation(settings: ModelConfig) -> Quantisation | None:
    """Return how the frozen linear layers are stored; None for 16 or 32 bits."""
    if settings.load_in_8bit:
        return Quantisation("int8")
    return (
        Quantisation(settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)
        if settings.load_in_4bit
        else None
    )


def training_dtype(settings: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of ``model.dtype``; if that is auto, an explicit ``bnb_4bit_compute_dtype`` is used instead."""
    name = settings.bnb_4bit_compute_dtype if settings.dtype == "auto" else settings.dtype
    return pick_dtype(name, device)


def open_base(
    settings: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    config: PretrainedConfig,
    log: Log = lambda _: None,
) -> CausalLM:
    """Load the base model as the run's settings ask for, quantised or not. Raises ModelError.

    config: the result of ``read_config``.
    """
    how = quantisation(settings)
    if how is None:
        model = load_weights(settings.path, dtype, device, config, log)
        trim_freed_memory()  # tensors that were converted to another dtype
        return model
    compute = DTYPES.get(settings.bnb_4bit_compute_dtype, dtype)
    return load_quantised(
        settings.path, dtype, device, config, QuantisedOptions(how, compute, settings.quantised_cache), log
    )


def check_base(settings: ModelConfig, config: PretrainedConfig) -> None:
    """Verify the weights' headers and the installed packages, as ``open_base`` does; reads no weights.

    Raises ModelError or MissingPackageError.
    """
    family, shards = family_of(settings.path), Shards.open(settings.path)
    fit = match(shards.shapes, family.rules(config), empty_model(config))
    how = quantisation(settings)
    if how or family.layer_rules is not None:  # otherwise transformers may convert other published names itself
        refuse_unfit(shards, fit)
    if how and how.kind != "int8":
        bitsandbytes_functions()


def load_model(path: Path | str, dtype: str = "float32") -> tuple[CausalLM, HfTokenizer | None]:
    """Load (model, tokenizer) as training uses them: a native transformers model from any published layout.

    dtype: "auto" or the name of a torch dtype. The tokenizer is None if the directory has none. Raises ModelError.
    """
    path = user_path(path)
    config = read_config(path)
    device = pick_device()
    tokenizer = load_tokenizer(path).hf if has_tokenizer(path) else None
    return load_weights(path, pick_dtype(dtype, device), device, config), tokenizer
