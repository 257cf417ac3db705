"""What a run would take on this machine, at every precision, and what to change where it does not fit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn
from transformers import PretrainedConfig

from luthier import __version__
from luthier._util import files
from luthier.batching.plan import Plan
from luthier.config import RunConfig, TrainConfig
from luthier.devices.device import available, cpu_name, pick_device
from luthier.encoding.store import ExampleStore
from luthier.errors import UserError
from luthier.lora.layers import Targets
from luthier.models.loader import quantisation, training_dtype
from luthier.models.native_model import base_parameters, empty_model
from luthier.models.quantization import Quantisation, dequantise, quantise
from luthier.training.memory_model import Memory, Precision, RowLengths, estimate, with_micro_batch

# share of the machine's GEMM rate that a training step is assumed to reach: a guess, not yet held against runs
_REACHED = 0.45
_CUT = ("micro_batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps")  # of micro-batches


@dataclass(frozen=True, slots=True)
class Row:
    """One precision. seconds: of one epoch, about."""

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
    """chosen: the run as it is configured. rows: it at every precision. fixes: ``--set`` options that make it fit."""

    parameters: int
    trainable: int
    available: float
    chosen: Row
    rows: tuple[Row, ...]
    fixes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "available_bytes": int(self.available),
            "chosen": self.chosen.as_dict(),
            "rows": [r.as_dict() for r in self.rows],
            "fixes": list(self.fixes),
        }

    def line(self) -> str:
        """The one line that ``train`` prints first."""
        m = self.chosen.memory
        return (
            f"estimate: {m.peak / 1e9:.2f} GB at the peak of {self.available / 1e9:.1f} GB that are free "
            f"(base {(m.base + m.embedding_and_head) / 1e9:.2f}, adapter and optimizer "
            f"{(m.adapter + m.gradients + m.optimizer) / 1e9:.2f}, activations {m.activations / 1e9:.2f}); "
            f"about {_clock(self.chosen.seconds)} an epoch"
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be estimated: a run's configuration, its model's, its target modules and its rows."""

    config: RunConfig
    native: PretrainedConfig
    targets: Targets
    rows: RowLengths

    @classmethod
    def of(cls, config: RunConfig, native: PretrainedConfig, targets: Targets, train: ExampleStore) -> Wanted:
        """For the rows that will be trained."""
        return cls(config, native, targets, RowLengths(train.lengths(), train.supervised(), train.common()))


def look(wanted: Wanted, every_precision: bool = True) -> Estimate:
    """The run as configured, at every precision, and how to make it fit."""
    config, free = wanted.config, available()
    chosen = _row(wanted, _precision(config), config.train, free)
    rows = tuple(_row(wanted, p, config.train, free) for p in _precisions(config)) if every_precision else ()
    trainable = int(chosen.memory.adapter / 4)
    fixes = () if chosen.fits else tuple(_fixes(wanted, free))
    return Estimate(base_parameters(wanted.native) + trainable, trainable, free, chosen, rows, fixes)


def refuse(found: Estimate) -> None:
    """Raise UserError where the run cannot fit."""
    if found.chosen.fits:
        return
    need, free = found.chosen.memory.peak / 1e9, found.available / 1e9
    raise UserError(
        f"the run needs about {need:.1f} GB of memory, and {free:.1f} GB are free",
        f"{', or '.join(found.fixes) or 'use a smaller model'} (to start all the same: --force)",
    )


def _precision(config: RunConfig) -> Precision:
    how, dtype = quantisation(config.model), training_dtype(config.model, pick_device())
    return Precision(how.kind if how else str(dtype).removeprefix("torch."), dtype, how)


def _precisions(config: RunConfig) -> tuple[Precision, ...]:
    """fp32 and bf16, and the quantised forms computing in the type that this run would have."""
    dtype = training_dtype(config.model, pick_device())
    return (
        Precision("float32", torch.float32),
        Precision("bfloat16", torch.bfloat16),
        Precision("int8", dtype, Quantisation("int8")),
        Precision("nf4", dtype, Quantisation("nf4")),
    )


def _memory(wanted: Wanted, precision: Precision, train: TrainConfig, recompute: bool) -> Memory:
    config = wanted.config
    kernel = config.model.attn_implementation
    return estimate(wanted.native, wanted.targets, config.lora, train, wanted.rows, precision, recompute, kernel)


def _row(wanted: Wanted, precision: Precision, train: TrainConfig, free: float) -> Row:
    auto = train.gradient_checkpointing == "auto"
    recompute = not auto and bool(train.gradient_checkpointing)
    memory = _memory(wanted, precision, train, recompute)
    if auto and memory.peak > 0.8 * free:
        recompute, memory = True, _memory(wanted, precision, train, True)
    return Row(precision.name, memory, recompute, _seconds(wanted, precision, train, recompute), memory.peak < free)


def _fixes(wanted: Wanted, free: float) -> Iterator[str]:
    """Settings that make the run fit, the mildest first; at most two."""
    model, train = wanted.config.model, wanted.config.train
    own = _precision(wanted.config)
    nf4 = Precision("nf4", own.dtype, Quantisation("nf4"))
    recompute = train.model_copy(update={"gradient_checkpointing": True})
    single = with_micro_batch(recompute, 1)
    checkpointing = () if train.gradient_checkpointing is True else ("train.gradient_checkpointing=true",)
    one = tuple(f"train.{k}={getattr(single, k)}" for k in _CUT if getattr(single, k) != getattr(train, k))
    four = (*(("model.load_in_8bit=false",) if model.load_in_8bit else ()), "model.load_in_4bit=true")
    choices: list[tuple[tuple[str, ...], Precision, TrainConfig]] = []
    for changes, precision in ((), own), (four, nf4):
        if not (changes and model.load_in_4bit):
            choices.append(((*changes, *checkpointing), precision, recompute))
            if one:
                choices.append(((*changes, *checkpointing, *one), precision, single))
    found = 0
    for settings, precision, changed in choices:
        if found < 2 and settings and _row(wanted, precision, changed, free).fits:
            found += 1
            yield " ".join(f"--set {setting}" for setting in settings)


# --- time -----------------------------------------------------------------------------------------------------------


def _seconds(wanted: Wanted, precision: Precision, train: TrainConfig, recompute: bool) -> float:
    """One epoch: products with the frozen weights forward and back, at the share of this machine's rate we reach."""
    tokens = sum(wanted.rows.lengths) - (wanted.rows.common * len(wanted.rows.lengths) if train.shared_prefix else 0)
    model = empty_model(wanted.native)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    passes = 3 if recompute else 2
    seconds = 2.0 * weights * tokens * passes / (rate("flops", precision.dtype) * _REACHED)
    if precision.quantisation:
        plan = Plan.of(len(wanted.rows.lengths), train)
        rows = plan.rows_per_step if train.micro_batch_tokens else plan.micro_rows
        seconds += weights * passes * math.ceil(plan.rows / rows) / rate("dequantised", precision.dtype)
    return seconds


def rate(name: str, dtype: torch.dtype) -> float:
    """A rate of this machine's in ``dtype``, measured in a second when it is first asked for, and kept.

    name: "flops", or "dequantised": weights a second.
    """
    facts = {
        "luthier": __version__,
        "torch": version("torch"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    file = files.cache_root() / "calibration.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    key = f"{json.dumps(facts, sort_keys=True)} {dtype} {name}"
    if not isinstance(kept.get(key), float):
        kept = {k: v for k, v in kept.items() if isinstance(v, float)}
        kept[key] = (_flops if name == "flops" else _dequantised)(dtype)
        files.write_json(file, kept)
    return float(kept[key])


def _flops(dtype: torch.dtype, seconds: float = 1.0) -> float:
    device = pick_device()
    x = torch.randn(256, 2048, device=device).to(dtype)
    w = torch.randn(2048, 2048, device=device).to(dtype)
    return 2.0 * 256 * 2048 * 2048 * _times_a_second(lambda: x @ w.T, seconds)


def _dequantised(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Weights a second; without bitsandbytes the 8-bit form's."""
    how = Quantisation("nf4")
    try:
        parts = quantise(torch.randn(2048, 2048), how)
    except UserError:
        how = Quantisation("int8")
        parts = quantise(torch.randn(2048, 2048), how)
    return 2048.0 * 2048 * _times_a_second(lambda: dequantise(parts, how, (2048, 2048), dtype), seconds)


def _times_a_second(work: Callable[[], object], seconds: float) -> float:
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        done += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done / (time.perf_counter() - start)


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(rows: Sequence[Row]) -> list[str]:
    """What ``luthier estimate`` prints: a header and a line a precision, 80 columns."""
    head = ("GB", "base", "adapter", "activations", "libraries", "loading", "peak", "epoch", "")
    lines: list[tuple[str, ...]] = [head]
    for r in rows:
        m = r.memory
        parts = (
            m.base + m.embedding_and_head,
            m.adapter + m.gradients + m.optimizer,
            m.activations + m.logits + m.workspace,
            m.library,
            m.load,
            m.peak,
        )
        verdict = "fits" if r.fits else "does not fit"
        lines.append((r.precision, *(f"{b / 1e9:.2f}" for b in parts), _clock(r.seconds), verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            c.ljust(w) if i in (0, len(head) - 1) else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
