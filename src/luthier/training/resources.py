"""Estimate a run's memory and time on this machine at every precision, and suggest settings that make it fit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn
from transformers import PretrainedConfig

from luthier import __version__
from luthier._util import files
from luthier.batching.plan import Plan
from luthier.config import RunConfig, TrainConfig
from luthier.devices.device import available_memory, cpu_name, pick_device, resident_now, trim_freed_memory
from luthier.encoding.store import ExampleStore
from luthier.errors import UserError
from luthier.lora.layers import Targets
from luthier.models.loader import quantisation, training_dtype
from luthier.models.native_model import base_parameters, empty_model
from luthier.models.quantization import Quantisation, dequantise, quantise
from luthier.training.memory_model import Memory, Precision, RowLengths, estimate, with_micro_batch

# assumed share of the machine's matrix product rate that a training step reaches: a guess, not yet compared with runs
_REACHED = 0.45
_MICRO_BATCH_KEYS = ("micro_batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True, slots=True)
class PrecisionEstimate:
    """The estimate for one precision. seconds: approximate time of one epoch."""

    precision: str
    memory: Memory
    checkpointing: bool
    seconds: float
    fits: bool

    def as_dict(self) -> dict[str, object]:
        return {
            "precision": self.precision,
            "gradient_checkpointing": self.checkpointing,
            **self.memory.as_dict(),
            "seconds_per_epoch": round(self.seconds, 1),
            "fits": self.fits,
        }


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate of a run. Memory in bytes.

    chosen: the run with its configured precision. by_precision: the run at every precision. fixes: ``--set`` options
    that make it fit; empty if it fits already. notes: what to know about the trained layers (``Targets.notes``).
    """

    parameters: int
    trainable: int
    available: float
    chosen: PrecisionEstimate
    by_precision: tuple[PrecisionEstimate, ...]
    fixes: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "available_bytes": int(self.available),
            "chosen": self.chosen.as_dict(),
            "rows": [e.as_dict() for e in self.by_precision],
            "fixes": list(self.fixes),
            "model_notes": list(self.notes),
        }

    def memory(self) -> str:
        """The peak, and the memory that is available."""
        return f"{self.chosen.memory.peak / 1e9:.2f} GB peak, {self.available / 1e9:.1f} GB available"

    def line(self) -> str:
        """Summary in one line, which ``train`` prints first."""
        m = self.chosen.memory
        return (
            f"estimate: {self.memory()} "
            f"(base {(m.base + m.embedding_and_head) / 1e9:.2f}, adapter and optimizer "
            f"{(m.adapter + m.gradients + m.optimizer) / 1e9:.2f}, activations {m.activations / 1e9:.2f}); "
            f"about {_clock(self.chosen.seconds)} per epoch"
        )


@dataclass(frozen=True, slots=True)
class Requirements:
    """What an estimate needs: the run's and the model's configuration, the target modules and the row lengths."""

    config: RunConfig
    native: PretrainedConfig
    targets: Targets
    rows: RowLengths

    @classmethod
    def of(cls, config: RunConfig, native: PretrainedConfig, targets: Targets, train: ExampleStore) -> Requirements:
        """Collect it for the training rows of a run."""
        return cls(config, native, targets, RowLengths.of(train))


def estimate_run(wanted: Requirements, every_precision: bool = True) -> Estimate:
    """Estimate the run as configured and at every precision, and find settings that make it fit."""
    parameters = base_parameters(wanted.native)  # imports what every run with this model imports
    trim_freed_memory()  # left by reading and encoding rows; it would count as part of the libraries
    # before the speed of the machine is measured: that uses memory that a run does not need
    config, machine = wanted.config, _Machine(available_memory(), resident_now())
    chosen = _estimate_at(wanted, _precision(config), config.train, machine)
    precisions = _precisions(config) if every_precision else ()
    by_precision = tuple(_estimate_at(wanted, precision, config.train, machine) for precision in precisions)
    trainable = int(chosen.memory.adapter / 4)
    fixes = () if chosen.fits else tuple(_fixes(wanted, machine))
    notes = wanted.targets.notes
    return Estimate(parameters + trainable, trainable, machine.available, chosen, by_precision, fixes, notes)


@dataclass(frozen=True, slots=True)
class _Machine:
    """Memory in bytes: what a run may use, and what this process holds before it loads a model."""

    available: float
    resident: float


def require_memory(expected: Estimate) -> None:
    """Raise UserError if the run does not fit into the available memory."""
    if expected.chosen.fits:
        return
    need, free = expected.chosen.memory.peak / 1e9, expected.available / 1e9
    raise UserError(
        f"the run needs about {need:.1f} GB of memory, but only {free:.1f} GB are available",
        f"{', or '.join(expected.fixes) or 'use a smaller model'} (to start anyway: --force)",
    )


def _precision(config: RunConfig) -> Precision:
    how, dtype = quantisation(config.model), training_dtype(config.model, pick_device())
    return Precision(how.kind if how else str(dtype).removeprefix("torch."), dtype, how)


def _precisions(config: RunConfig) -> tuple[Precision, ...]:
    """fp32, bf16, and the quantised forms, which compute in this run's own dtype."""
    dtype = training_dtype(config.model, pick_device())
    return (
        Precision("float32", torch.float32),
        Precision("bfloat16", torch.bfloat16),
        Precision("int8", dtype, Quantisation("int8")),
        Precision("nf4", dtype, Quantisation("nf4")),
    )


def _memory(
    wanted: Requirements, precision: Precision, train: TrainConfig, recompute: bool, machine: _Machine
) -> Memory:
    config = wanted.config
    return estimate(
        wanted.native, wanted.targets, config.lora, train, wanted.rows, precision, recompute,
        config.model.attn_implementation, machine.resident,
    )  # fmt: skip


def _estimate_at(
    wanted: Requirements, precision: Precision, train: TrainConfig, machine: _Machine
) -> PrecisionEstimate:
    auto = train.gradient_checkpointing == "auto"
    recompute = not auto and bool(train.gradient_checkpointing)
    memory = _memory(wanted, precision, train, recompute, machine)
    if auto and memory.peak > 0.8 * machine.available:
        recompute, memory = True, _memory(wanted, precision, train, True, machine)
    return PrecisionEstimate(
        precision.name,
        memory,
        recompute,
        _seconds(wanted, precision, train, recompute),
        memory.peak < machine.available,
    )


def _fixes(wanted: Requirements, machine: _Machine) -> Iterator[str]:
    """Yield at most two sets of options that make the run fit, the least intrusive first."""
    model, train = wanted.config.model, wanted.config.train
    own = _precision(wanted.config)
    nf4 = Precision("nf4", own.dtype, Quantisation("nf4"))
    recompute = train.model_copy(update={"gradient_checkpointing": True})
    one_row = with_micro_batch(recompute, 1)
    checkpointing = () if train.gradient_checkpointing is True else ("train.gradient_checkpointing=true",)
    smaller = tuple(
        f"train.{k}={getattr(one_row, k)}" for k in _MICRO_BATCH_KEYS if getattr(one_row, k) != getattr(train, k)
    )
    to_nf4 = (*(("model.load_in_8bit=false",) if model.load_in_8bit else ()), "model.load_in_4bit=true")
    choices: list[tuple[tuple[str, ...], Precision, TrainConfig]] = []
    for changes, precision in ((), own), (to_nf4, nf4):
        if not (changes and model.load_in_4bit):
            choices.append(((*changes, *checkpointing), precision, recompute))
            if smaller:
                choices.append(((*changes, *checkpointing, *smaller), precision, one_row))
    count = 0
    for settings, precision, changed in choices:
        if count < 2 and settings and _estimate_at(wanted, precision, changed, machine).fits:
            count += 1
            yield " ".join(f"--set {setting}" for setting in settings)


# --- time -----------------------------------------------------------------------------------------------------------


def _seconds(wanted: Requirements, precision: Precision, train: TrainConfig, recompute: bool) -> float:
    """Seconds per epoch of the products with frozen weights, at ``_REACHED`` of the measured rate."""
    tokens = int(wanted.rows.own(train.shared_prefix).sum())
    model = empty_model(wanted.native)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    passes = 3 if recompute else 2
    seconds = 2.0 * weights * tokens * passes / (rate("flops", precision.dtype) * _REACHED)
    if precision.quantisation:
        plan = Plan.of(len(wanted.rows.rows()), train)
        rows = plan.rows_per_step if train.micro_batch_tokens else plan.micro_rows
        seconds += weights * passes * math.ceil(plan.rows / rows) / rate("dequantised", precision.dtype)
    return seconds


def rate(name: str, dtype: torch.dtype) -> float:
    """Return a rate of this machine in ``dtype``; the first call measures it (about 1 s) and caches it on disk.

    name: "flops" (floating-point operations per second) or "dequantised" (weights per second).
    """
    measure = _flops if name == "flops" else _dequantised
    return calibrated(f"{dtype} {name}", lambda: measure(dtype))


def calibrated(name: str, measure: Callable[[], float]) -> float:
    """Return a rate of this machine; the first call measures it (about 1 s) and caches it on disk."""
    facts = {
        "luthier": __version__,
        "torch": version("torch"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    file = files.cache_root() / "calibration.json"
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rates = {}
    key = f"{json.dumps(facts, sort_keys=True)} {name}"
    if not isinstance(rates.get(key), float):
        rates = {k: v for k, v in rates.items() if isinstance(v, float)}
        rates[key] = measure()
        with suppress(UserError):  # measured again next time
            files.write_json(file, rates)
    return float(rates[key])


def calls_per_second(work: Callable[[], object], seconds: float) -> float:
    """Call ``work`` for about this long; returns how often it ran per second."""
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        done += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done / (time.perf_counter() - start)


def _flops(dtype: torch.dtype, seconds: float = 1.0) -> float:
    device = pick_device()
    x = torch.randn(256, 2048, device=device).to(dtype)
    w = torch.randn(2048, 2048, device=device).to(dtype)
    return 2.0 * 256 * 2048 * 2048 * calls_per_second(lambda: x @ w.T, seconds)


def _dequantised(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Measure weights per second in nf4, or in int8 if bitsandbytes is not installed."""
    how = Quantisation("nf4")
    try:
        parts = quantise(torch.randn(2048, 2048), how)
    except UserError:
        how = Quantisation("int8")
        parts = quantise(torch.randn(2048, 2048), how)
    return 2048.0 * 2048 * calls_per_second(lambda: dequantise(parts, how, (2048, 2048), dtype), seconds)


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(estimates: Sequence[PrecisionEstimate]) -> list[str]:
    """Format the table that ``luthier estimate`` prints: a header and one line per precision, 80 columns."""
    head = ("GB", "base", "adapter", "activations", "libraries", "peak", "chat", "epoch", "")
    lines: list[tuple[str, ...]] = [head]
    for e in estimates:
        m = e.memory
        parts = (
            m.base + m.embedding_and_head,
            m.adapter + m.gradients + m.optimizer,
            m.activations + m.logits + m.workspace,
            m.library,
            m.peak,
            m.chat,
        )
        verdict = "fits" if e.fits else "does not fit"
        lines.append((e.precision, *(f"{b / 1e9:.2f}" for b in parts), _clock(e.seconds), verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            c.ljust(w) if i in (0, len(head) - 1) else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
