"""``luthier chat``: open a run, one of its checkpoints, an adapter or a base model for a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from luthier._util import files
from luthier._util.files import user_path
from luthier.adapters.locate import locate
from luthier.adapters.run_dir import RunDir
from luthier.config import ModelConfig, RunConfig
from luthier.devices.device import pick_device, pick_dtype
from luthier.errors import AdapterError, ConfigError
from luthier.evaluation.dtype import Subject, reply_dtype, tuned_subject
from luthier.inference.chat import GIVE_ADAPTER, Chat, check_system
from luthier.inference.generation import Generator
from luthier.inference.sampling import Sampling
from luthier.lora.layers import LoraLinear, attach, resolve
from luthier.models.chat_format import chat_format_of, load_chat_format
from luthier.models.directory import must_be_directory
from luthier.models.native_model import empty_model
from luthier.models.protocols import CausalLM
from luthier.serving import llamacpp
from luthier.serving.models import chat_formats, resolve_models
from luthier.training import checkpoint as checkpoints
from luthier.types import Log


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is open for replies.

    layers: the adapter's layers by module name, empty for a base model. config: that of the adapter's run, if known.
    """

    generator: Generator
    layers: dict[str, LoraLinear]
    config: RunConfig | None


def open_model(
    path: Path | str | None = None,
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    checkpoint: int | None = None,
    with_adapter: bool = False,
    fused: bool = True,
    log: Log = lambda _: None,
) -> Opened:
    """Open a model with luthier's own engine. Parameters are those of ``chat``. Raises UserError."""
    return _open(*_located(path, None, dtype, model, adapter, checkpoint, with_adapter), dtype, fused, log)


def _located(
    path: Path | str | None,
    system: str | None,
    dtype: str,
    model: Path | str | None,
    adapter: Path | str | None,
    checkpoint: int | None,
    with_adapter: bool,
) -> tuple[Subject, RunConfig | None]:
    """Resolve the arguments of ``chat`` without loading weights. Raises UserError."""
    pick_dtype(dtype, pick_device())  # an unknown name is an error before anything is read
    config: RunConfig | None
    if checkpoint is not None:
        if path is None or model is not None or adapter is not None:
            raise ConfigError("--checkpoint: needs a run, not --model and --adapter", "give only the RUN")
        subject, config = _at_checkpoint(RunDir(user_path(path)), checkpoint, system)
    else:
        source = locate(path, model, adapter)
        config = source.tuned.config if source.tuned else None
        if source.tuned:
            subject = tuned_subject(source.tuned, source.tuned.chat_format(), system)
        else:
            if with_adapter:
                must_be_directory(source.base)
                raise _no_adapter(source.base)
            settings = ModelConfig.model_validate({"path": source.base})
            subject = Subject(settings, load_chat_format(source.base), system)
    check_system(subject.chat_format, subject.system)
    return subject, config


def _open(subject: Subject, config: RunConfig | None, dtype: str, fused: bool, log: Log) -> Opened:
    device = pick_device()
    opened, layers = subject.open(reply_dtype(dtype, device, [subject], fused, log), device)
    return Opened(Generator(opened, subject.chat_format, fused, log), layers, config)


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
    engine: str = "luthier",
    quantization: str | None = None,
) -> Chat:
    """Open a run, an adapter or a base model directory; or ``model`` with ``adapter``, which may be a PEFT directory.

    system:       system prompt; None: the one of the run's training, if any.
    dtype:        "auto": the fastest one of the processor whose greedy replies are those of fp32 (``reply_dtype``).
    checkpoint:   step of the run's checkpoint to load instead of the finished adapter.
    sampling:     fields of ``Sampling`` that override the run's own; None values are ignored.
    with_adapter: refuse a base model.
    fused:        decode with luthier's compiled layers if they support the model, which is faster.
    log:          gets a note if they do not, and the choice of the dtype when it is made.
    engine:       "luthier", or "llama.cpp" (extra ``export``), whose files are written and verified on first use.
    quantization: of the base model's weights in llama.cpp: f16, q8_0 or q4_0; None: as in training.

    Raises UserError, before weights are read whenever possible.
    """
    changes = sampling or {}
    llamacpp.check_options(engine, dtype, fused, quantization)
    if engine == "llama.cpp":
        if checkpoint is not None:
            raise ConfigError(
                "--checkpoint would be ignored: llama.cpp gets finished adapters", "leave --checkpoint out"
            )
        return _with_llamacpp(path, system, model, adapter, changes, with_adapter, quantization, log)
    subject, config = _located(path, system, dtype, model, adapter, checkpoint, with_adapter)
    settings = _sampling(config, changes)
    opened = _open(subject, config, dtype, fused, log)
    return Chat(opened.generator, subject.system, bool(opened.layers), opened.layers, config, sampling=settings)


def _with_llamacpp(
    path: Path | str | None,
    system: str | None,
    model: Path | str | None,
    adapter: Path | str | None,
    changes: Mapping[str, float | None],
    with_adapter: bool,
    quantization: str | None,
    log: Log,
) -> Chat:
    """Open a conversation with llama.cpp. Raises UserError."""
    if changes.get("no_repeat_ngram_size"):
        raise ConfigError("--no-repeat-ngram-size: llama.cpp has no such setting", "leave --engine llama.cpp out")
    named = resolve_models([] if path is None else [path], model, adapter, distinct=False)
    tuned = named[0].tuned
    if with_adapter and not tuned:
        raise _no_adapter(named[0].base)
    config = tuned.config if tuned else None
    settings = _sampling(config, changes)
    system = (tuned.system if tuned else None) if system is None else system
    check_system(chat_formats(named)[0], system)
    opened, served = llamacpp.open_models(named, quantization, log=log)
    generator = llamacpp.LlamaGenerator(opened, served[0].chat_format, served[0].adapter)
    return Chat(generator, system, tuned is not None, config=config, sampling=settings)


def _no_adapter(base: Path) -> ConfigError:
    return ConfigError(f"{base}: there is no adapter to compare with its base", GIVE_ADAPTER)


def _at_checkpoint(run: RunDir, step: int, system: str | None) -> tuple[Subject, RunConfig]:
    """Describe an unfinished adapter as a run's checkpoint holds it. Raises UserError."""
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

    def attached(model: CausalLM) -> dict[str, LoraLinear]:
        targets = resolve(empty_model(chat_format.config), config.lora.target_modules, chat_format.modules())
        layers = attach(model, config.lora, targets, seed=0)
        checkpoints.restore_adapter(saved, layers)
        return layers

    digest = files.sha256(by_step[step] / checkpoints.TENSORS)
    return Subject(config.model, chat_format, system, digest, attached), config


def _sampling(config: RunConfig | None, changes: Mapping[str, float | None]) -> Sampling:
    """Apply ``changes`` to the run's sampling settings, or to greedy sampling without a run. Raises ConfigError."""
    settings = Sampling.of(config.generation) if config else Sampling()
    return settings.changed(**changes)
