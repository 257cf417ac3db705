"""``luthier chat``: open a run, one of its checkpoints, an adapter or a base model, ready to be talked to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from luthier.adapters import directory as adapters
from luthier.adapters.locate import locate
from luthier.adapters.run_dir import RunDir
from luthier.config import RunConfig
from luthier.devices.device import pick_device, pick_dtype
from luthier.errors import AdapterError, ConfigError
from luthier.inference.chat import GIVE_ADAPTER, Chat, check_system
from luthier.inference.generation import Generator, Sampling
from luthier.lora.layers import attach, resolve
from luthier.models.chat_format import chat_format_of, load_chat_format
from luthier.models.directory import must_be_directory
from luthier.models.loader import load_weights, open_base
from luthier.models.native_model import empty_model
from luthier.training import checkpoint as checkpoints


def chat(
    path: Path | str | None = None,
    system: str | None = None,
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    checkpoint: int | None = None,
    sampling: Mapping[str, float | None] | None = None,
    with_adapter: bool = False,
) -> Chat:
    """Open a run, an adapter or a base model directory; or ``model`` with ``adapter`` (a stock PEFT directory too).

    system:       system prompt; None: the one of the run's training, if any.
    dtype:        "auto": fp32 on the CPU, so that greedy replies are reproducible; the device's own type elsewhere.
    checkpoint:   a step of the run's, in place of its finished adapter.
    sampling:     fields of ``Sampling`` that take the place of the run's own; None is not given.
    with_adapter: refuse a base model.

    What can be refused is, before weights are read. Raises UserError.
    """
    device = pick_device()
    kind = torch.float32 if dtype == "auto" and device.type == "cpu" else pick_dtype(dtype, device)
    if checkpoint is not None:
        if path is None or model is not None or adapter is not None:
            raise ConfigError("--checkpoint: is a step of a run's, not of --model and --adapter", "give the RUN alone")
        return _at_checkpoint(RunDir(Path(path)), checkpoint, system, kind, device, sampling or {})
    source = locate(path, model, adapter)
    if source.tuned is None:
        if with_adapter:
            must_be_directory(source.base)
            raise ConfigError(f"{source.base}: there is no adapter to compare with its base", GIVE_ADAPTER)
        chat_format = load_chat_format(source.base)
        check_system(chat_format, system)
        drawn = _sampling(None, sampling or {})
        return Chat(Generator(load_weights(source.base, kind, device), chat_format), system, sampling=drawn)
    tuned = source.tuned
    chat_format = tuned.chat_format()
    system = tuned.system if system is None else system
    check_system(chat_format, system)
    drawn = _sampling(tuned.config, sampling or {})
    base = open_base(tuned.model_settings, kind, device, chat_format.config)
    layers = adapters.apply(base, tuned.adapter, chat_format.modules())
    return Chat(Generator(base, chat_format), system, layers, tuned.config, sampling=drawn)


def _at_checkpoint(
    run: RunDir,
    step: int,
    system: str | None,
    kind: torch.dtype,
    device: torch.device,
    sampling: Mapping[str, float | None],
) -> Chat:
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
    drawn = _sampling(config, sampling)
    model = open_base(config.model, kind, device, chat_format.config)
    targets = resolve(empty_model(chat_format.config), config.lora.target_modules, chat_format.modules())
    layers = attach(model, config.lora, targets, seed=0)
    checkpoints.restore_adapter(saved, layers)
    return Chat(Generator(model, chat_format), system, layers, config, sampling=drawn)


def _sampling(config: RunConfig | None, changes: Mapping[str, float | None]) -> Sampling:
    """The run's own settings, or greedy ones, with what the caller gave in their place. Raises ConfigError."""
    own = Sampling.of(config.generation) if config else Sampling()
    return own.changed(**changes)
