"""``luthier train``: the stages of a training run, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from luthier._util import files
from luthier.adapters import directory as adapters
from luthier.adapters.run_dir import RunDir, Summary, absolute, differences
from luthier.batching.plan import Plan
from luthier.config import RunConfig, TrainConfig
from luthier.devices.device import peak_rss_bytes, pick_device
from luthier.errors import ConfigError
from luthier.evaluation import report, scoring
from luthier.evaluation.scoring import Losses
from luthier.inference.generation import Generator
from luthier.lora.layers import LoraLinear, attach, trainable_parameters
from luthier.models.loader import open_base, quantisation, training_dtype
from luthier.models.native_model import base_parameters, verify_once
from luthier.models.protocols import CausalLM
from luthier.templates import digest as template_digest
from luthier.training import checkpoint, loop, resources
from luthier.training.checkpoint import Checkpoint
from luthier.training.forward import LossFunction, verify_segments
from luthier.training.metrics import MetricsFile, Progress, StepRecord
from luthier.training.optimizer import Optimizer, substitute
from luthier.types import Log
from luthier.verbs.check import Prepared, inspect, require_startable, resumable


class Stopped(Exception):
    """A run was asked to stop, saved a checkpoint and stopped."""


def train(
    config: RunConfig,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    log: Log = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    force: bool = False,
) -> Summary:
    """Train an adapter and return the content of ``summary.json``. Raises UserError.

    A finished run is left unchanged and its summary returned; an interrupted run resumes from its last checkpoint.

    stop:  called after every step; true saves a checkpoint and raises Stopped.
    force: start even if the estimate exceeds available memory.
    """
    if config.output_dir is None:
        raise ConfigError("output_dir: is missing", "give --output-dir RUN")
    config = absolute(config)
    run = RunDir(config.output_dir or Path())
    with run.locked(log):
        return train_locked(run, config, on_step, log, stop, force)


def train_locked(
    run: RunDir,
    config: RunConfig,
    on_step: Callable[[StepRecord], None],
    log: Log,
    stop: Callable[[], bool],
    force: bool = False,
) -> Summary:
    """Train in a locked directory with absolute paths in the configuration; otherwise as ``train``."""
    run.claim(config)

    inspection = inspect(config, log=log)
    prepared = inspection.prepared()
    rows, chat_format, targets = prepared.rows, prepared.chat_format, prepared.targets
    base = prepared.base()
    identity = prepared.identity(base)
    checkpoint.delete_half_written(run.checkpoints)
    resume = resumable(run, identity, log)
    if run.finished:
        log(f"{run.path}: this run is finished already; nothing was changed")
        return run.summary()
    require_startable(prepared)
    settings = _settings_that_fit(prepared, log, force)
    run.start(config, inspection.as_dict())

    _report_rows(prepared, log)
    model = _open_model(prepared, log)
    layers = attach(model, config.lora, targets, config.train.seed)
    files.require_space(run.path, 8 * trainable_parameters(layers))  # at least: the adapter and a checkpoint in fp32
    _report_parameters(prepared, model, layers, log)
    _report_resume(resume, log)
    with MetricsFile(run.metrics, settings.logging_steps, resume.progress.step if resume else 0) as metrics:

        def record(step: StepRecord) -> None:
            metrics.write(step)
            on_step(step)

        def save(optimizer: Optimizer, progress: Progress) -> None:
            checkpoint.write(run.checkpoints, layers, optimizer, progress, identity, settings.save_total_limit)

        losses: list[Losses] = []

        def evaluate(loss_of: LossFunction) -> None:
            if len(rows.held_out) and settings.eval_time_ratio:
                chosen = scoring.spread(rows.held_out, settings.eval_rows)
                losses.append(scoring.compare_losses(model, layers, chosen, loss_of))

        session = loop.Session(record, save, stop, config.model.attn_implementation, log, evaluate)
        progress = loop.train(model, layers, rows.train, settings, session, resume)
    steps = Plan.of(len(rows.train.row_starts()) - 1, settings).steps
    if progress.step < steps:
        raise Stopped(f"{run.path}: stopped after step {progress.step} of {steps}, which is saved")

    facts = adapters.Facts(
        system=config.data.system or None,
        template=dict(chat_format.template.describe()),
        template_sha256=template_digest(chat_format.template),
        stop_ids=chat_format.stop_ids,
        base=base,
        tokenizer_sha256=chat_format.tokenizer.digest(),
        data_sha256=identity["data"],
        rope_theta=config.model.rope_theta,
    )
    adapters.save(run.adapter, layers, config.lora, targets, facts, config.model.path)
    generator = Generator(model, chat_format, compiled=bool(settings.fused))
    seconds = progress.seconds * settings.eval_time_ratio
    held_out = _evaluate(run, prepared, generator, layers, losses, seconds, log)
    summary = _summary(prepared, model, layers, progress, identity)
    if held_out:
        summary["held_out"] = held_out
    report.write(run.path, config.model_copy(update={"train": settings}), summary, rows.train.lengths())
    run.finish(summary)
    return summary


def _settings_that_fit(run: Prepared, log: Log, force: bool) -> TrainConfig:
    """Estimate memory, refuse a run that cannot fit, and decide gradient checkpointing if it is auto."""
    expected = resources.estimate_run(run.requirements(), every_precision=False)
    log(expected.line())
    if not force:
        resources.require_memory(expected)
    recompute, settings = expected.chosen.checkpointing, run.config.train
    if recompute and settings.gradient_checkpointing == "auto":
        log("gradient checkpointing is on to save memory (--set train.gradient_checkpointing=false turns it off)")
    return settings.model_copy(update={"gradient_checkpointing": recompute})


def _report_rows(run: Prepared, log: Log) -> None:
    """Print what became of the rows, in few lines."""
    report, template = run.rows.report, f"; template {run.chat_format.template.name}"
    for name, rows in (("data", report.data_report), ("data.eval", report.eval_report)):
        if rows:
            log(f"{name}: {rows.counts()}{template}")
            template = ""
            for line in rows.lines():
                log(f"  {line}")


def _open_model(run: Prepared, log: Log) -> CausalLM:
    """Load the base model, and verify that the rows of a flat batch do not influence each other."""
    config = run.config
    device = pick_device()
    dtype = training_dtype(config.model, device)
    for note in (*run.chat_format.notes(), *run.targets.notes):
        log(f"note: {note}")
    if instead := substitute(config.train.optim, device.type):
        log(f"note: {config.train.optim} needs a GPU; {instead} is used instead")
    model = open_base(config.model, dtype, device, run.chat_format.config, log)
    kernel = config.model.attn_implementation
    check = partial(verify_segments, model, run.rows.train, kernel, log)
    verify_once("rows of a flat batch", model, [kernel], check)
    return model


def _report_parameters(run: Prepared, model: CausalLM, layers: dict[str, LoraLinear], log: Log) -> None:
    """Print the dtype, the device, the target modules and the number of trainable parameters."""
    config, trainable = run.config, trainable_parameters(layers)
    stored, dtype = quantisation(config.model), training_dtype(config.model, model.device)
    log(
        f"model: {run.chat_format.config.model_type} in {stored.kind + ' and ' if stored else ''}"
        f"{str(dtype).removeprefix('torch.')} on {model.device.type}; "
        f"LoRA r={config.lora.r} on {', '.join(run.targets.leaves)}: "
        f"{trainable:,} of {trainable + base_parameters(run.chat_format.config):,} parameters are trainable"
    )


def _report_resume(resume: Checkpoint | None, log: Log) -> None:
    """Print the step of the checkpoint, and what differs between its machine and this one."""
    if resume is None:
        return
    log(f"resuming after step {resume.progress.step}")
    if changed := differences(resume.machine, checkpoint.machine()):
        log(f"note: results may differ in the last bits from an uninterrupted run ({'; '.join(changed)})")


def _summary(
    run: Prepared, model: CausalLM, layers: dict[str, LoraLinear], progress: Progress, identity: dict[str, str]
) -> Summary:
    config, trainable = run.config, trainable_parameters(layers)
    stored = quantisation(config.model)
    return {
        "steps": progress.step,
        "rows": run.rows.report.data_report.rows(),
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "train_seconds": round(progress.seconds, 4),
        "tokens_per_s": round(progress.tokens_per_s, 2),
        "peak_rss_bytes": peak_rss_bytes(),  # replies for the report included
        "losses": progress.losses,
        "trainable_parameters": trainable,
        "parameters": trainable + base_parameters(run.chat_format.config),
        "dtype": str(training_dtype(config.model, model.device)).removeprefix("torch."),
        "quantised": stored.kind if stored else None,
        "device": model.device.type,
        "target_modules": list(run.targets.leaves),
        "template": run.chat_format.template.name,
        "identity": identity,
    }


def _evaluate(
    run_dir: RunDir,
    run: Prepared,
    generator: Generator,
    layers: dict[str, LoraLinear],
    losses: Sequence[Losses],
    seconds: float,
    log: Log,
) -> dict[str, dict[str, object]] | None:
    """Report the held-out losses and write sample replies of both models, generated within ``seconds``."""
    held_out, rows_report = run.rows.held_out, run.rows.report
    if len(held_out):
        scoring.write_rows(run_dir.path / scoring.HELD_OUT, rows_report.conversations)
    if not run.config.train.eval_time_ratio:
        return None
    if losses:
        result = scoring.evaluate_run(
            run_dir.path, generator, layers, losses[0], rows_report.conversations, seconds, log
        )
        return {"base": result.base.as_dict(), "tuned": result.tuned.as_dict()}
    scoring.write_sample_replies(run_dir.path, generator, layers, rows_report.samples, seconds, log)
    return None
