"""``luthier chat``: open a run, one of its checkpoints, an adapter or a base model for a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from luthier._util.files import user_path
from luthier.adapters import directory as adapters
from luthier.adapters.locate import locate
from luthier.adapters.run_dir import RunDir
from luthier.config import RunConfig
from luthier.devices.device import pick_device, pick_dtype
from luthier.errors import AdapterError, ConfigError
from luthier.inference.chat import GIVE_ADAPTER, Chat, check_system
from luthier.inference.generation import Generator
from luthier.inference.sampling import Sampling
from luthier.lora.layers import attach, resolve
from luthier.models.chat_format import chat_format_of, load_chat_format
from luthier.models.directory import must_be_directory
from luthier.models.loader import load_weights, open_base
from luthier.models.native_model import empty_model
from luthier.training import checkpoint as checkpoints
from luthier.types import Log


def chat(
    path: Path | str | None = None,
    system: str | None = None,
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    checkpoint: int | None = None,
    sampling: Mapping[str, float | None] | None = None,
    with_adapter: bool = False,
    fused: bool = True,
    log: Log = lambda _: None,
) -> Chat:
    """Open a run, an adapter or a base model directory; or ``model`` with ``adapter``, which may be a PEFT directory.

    system:       system prompt; None: the one of the run's training, if any.
    dtype:        "auto": fp32 on the CPU, so that greedy replies are reproducible; the device's own dtype elsewhere.
    checkpoint:   step of the run's checkpoint to load instead of the finished adapter.
    sampling:     fields of ``Sampling`` that override the run's own; None values are ignored.
    with_adapter: refuse a base model.
    fused:        decode with luthier's compiled layers if they support the model, which is faster.
    log:          gets a note if they do not.

    Raises UserError, before weights are read whenever possible.
    """
    device = pick_device()
    compute = torch.float32 if dtype == "auto" and device.type == "cpu" else pick_dtype(dtype, device)
    changes = sampling or {}
    if checkpoint is not None:
        if path is None or model is not None or adapter is not None:
            raise ConfigError("--checkpoint: needs a run, not --model and --adapter", "give only the RUN")
        return _at_checkpoint(RunDir(user_path(path)), checkpoint, system, compute, device, changes, fused, log)
    source = locate(path, model, adapter)
    if source.tuned is None:
        if with_adapter:
            must_be_directory(source.base)
            raise ConfigError(f"{source.base}: there is no adapter to compare with its base", GIVE_ADAPTER)
        chat_format = load_chat_format(source.base)
        check_system(chat_format, system)
        settings = _sampling(None, changes)
        weights = load_weights(source.base, compute, device)
        return Chat(Generator(weights, chat_format, fused, log), system, sampling=settings)
    tuned = source.tuned
    chat_format = tuned.chat_format()
    system = tuned.system if system is None else system
    check_system(chat_format, system)
    settings = _sampling(tuned.config, changes)
    base = open_base(tuned.model_settings, compute, device, chat_format.config)
    layers = adapters.apply(base, tuned.adapter, chat_format.modules())
    return Chat(Generator(base, chat_format, fused, log), system, layers, tuned.config, sampling=settings)


def _at_checkpoint(
    run: RunDir,
    step: int,
    system: str | None,
    dtype: torch.dtype,
    device: torch.device,
    changes: Mapping[str, float | None],
    fused: bool,
    log: Log,
) -> Chat:
    """Open an unfinished adapter as a run's checkpoint holds it. Raises UserError."""
    by_step = {int(p.name.removeprefix("step-")): p for p in checkpoints.steps(run.checkpoints)}
    if step not in by_step:
        fix = f"its checkpoints are: {', '.join(map(str, by_step))}" if by_step else "leave --checkpoint out"
        raise ConfigError(f"{run.path}: has no checkpoint {step}", fix)
    try:
        saved = checkpoints.read(by_step[step])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise AdapterError(f"{by_step[step]}: is damaged ({e})", "use another checkpoint") from None
    config = run.config()
    chat_format = chat_format_of(config)
    system = (config.data.system or None) if system is None else system
    check_system(chat_format, system)
    settings = _sampling(config, changes)
    model = open_base(config.model, dtype, device, chat_format.config)
    targets = resolve(empty_model(chat_format.config), config.lora.target_modules, chat_format.modules())
    layers = attach(model, config.lora, targets, seed=0)
    checkpoints.restore_adapter(saved, layers)
    return Chat(Generator(model, chat_format, fused, log), system, layers, config, sampling=settings)


def _sampling(config: RunConfig | None, changes: Mapping[str, float | None]) -> Sampling:
    """Apply ``changes`` to the run's sampling settings, or to greedy sampling without a run. Raises ConfigError."""
    settings = Sampling.of(config.generation) if config else Sampling()
    return settings.changed(**changes)
