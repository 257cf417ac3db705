"""``luthier train``: one run, from its configuration to its summary, in order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.adapters import directory as adapters
from luthier.adapters.run_dir import RunDir, differences
from luthier.batching.plan import Plan
from luthier.config import RunConfig, TrainConfig
from luthier.devices.device import peak_rss_bytes, pick_device
from luthier.errors import ConfigError
from luthier.evaluation import report, scoring
from luthier.inference.generation import Generator
from luthier.kernels import attention
from luthier.lora.layers import LoraLinear, attach, trainable_parameters
from luthier.models.directory import fingerprint
from luthier.models.loader import open_base, quantisation, training_dtype
from luthier.models.native_model import base_parameters
from luthier.templates import digest as template_digest
from luthier.training import checkpoint, loop, resources
from luthier.training.checkpoint import Checkpoint
from luthier.training.forward import prove_segments
from luthier.training.metrics import MetricsFile, Progress, StepRecord
from luthier.training.optimizer import Optimizer, substitute
from luthier.training.resources import Wanted
from luthier.types import Say
from luthier.verbs.check import Prepared, inspect


class Stopped(Exception):
    """A run was asked to stop and did, after saving a checkpoint."""


def train(
    config: RunConfig,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    say: Say = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    force: bool = False,
) -> dict[str, Any]:
    """Run to the end and return ``summary.json``'s content. Raises UserError.

    A finished run is returned as it is, nothing rewritten; an interrupted one goes on from its last checkpoint.
    stop:  asked after every step; true saves a checkpoint and raises Stopped.
    force: start even if the estimate exceeds available memory.
    """
    if config.output_dir is None:
        raise ConfigError("output_dir: is missing", "give --output-dir RUN")
    config = absolute(config)
    run = RunDir(config.output_dir or Path())
    run.claim(config)

    inspection = inspect(config, say=say)
    prepared = inspection.prepared()
    rows, chat_format, targets = prepared.rows, prepared.chat_format, prepared.targets
    base = fingerprint(config.model.path, chat_format.config)
    identity = {"data": rows.account.fingerprint, "base model": base.weights}
    if run.finished:
        run.same_identity(run.summary().get("identity", {}), identity)
        say(f"{run.path}: this run is finished already; nothing was changed")
        return run.summary()
    resume = checkpoint.latest(run.checkpoints, say)
    if resume:
        run.same_identity(resume.identity, identity)
    settings = _settings_that_fit(prepared, say, force)
    run.start(config, inspection.as_dict())

    model = _open_model(prepared, say)
    layers = attach(model, config.lora, targets, config.train.seed)
    _say_what_trains(prepared, model, layers, say)
    _say_where_it_goes_on(resume, say)
    with MetricsFile(run.metrics, settings.logging_steps, resume.progress.step if resume else 0) as metrics:

        def record(step: StepRecord) -> None:
            metrics.write(step)
            on_step(step)

        def save(optimizer: Optimizer, progress: Progress) -> None:
            checkpoint.write(run.checkpoints, layers, optimizer, progress, identity, settings.save_total_limit)

        session = loop.Session(record, save, stop, config.model.attn_implementation, say)
        progress = loop.train(model, layers, rows.train, settings, session, resume)
    steps = Plan.of(len(rows.train), settings).steps
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
    summary = _summary(prepared, model, layers, progress) | {"identity": identity}
    generator = Generator(model, chat_format)
    summary |= _evaluated(run, prepared, generator, layers, progress.seconds * settings.eval_time_ratio, say)
    report.write(run.path, config.model_copy(update={"train": settings}), summary, rows.train.lengths())
    run.finish(summary)
    return summary


def absolute(config: RunConfig) -> RunConfig:
    """Paths as they will be read again from anywhere."""

    def full(path: Path) -> Path:
        return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links

    data = {"train": tuple(map(full, config.data.train)), "eval": tuple(map(full, config.data.eval))}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": full(config.model.path)}),
            "data": config.data.model_copy(update=data),
            "output_dir": full(config.output_dir) if config.output_dir else None,
        }
    )


def _settings_that_fit(run: Prepared, say: Say, force: bool) -> TrainConfig:
    """Estimate the run, refuse what cannot fit, and decide gradient checkpointing if it is auto."""
    wanted = Wanted.of(run.config, run.chat_format.config, run.targets, run.rows.train)
    expected = resources.look(wanted, every_precision=False)
    say(expected.line())
    if not force:
        resources.refuse(expected)
    recompute, settings = expected.chosen.checkpointing, run.config.train
    if recompute and settings.gradient_checkpointing == "auto":
        say("gradient checkpointing is on, as memory is short (--set train.gradient_checkpointing=false leaves it out)")
    return settings.model_copy(update={"gradient_checkpointing": recompute})


def _open_model(run: Prepared, say: Say) -> Any:
    """The base model in memory, verified to keep the rows of a flat batch apart."""
    config, counts = run.config, run.rows.account.report.rows()
    say(
        f"data: {counts['read']} rows read, {counts['kept']} kept, {counts['dropped']} dropped, "
        f"{counts['changed']} changed; template {run.chat_format.template.name}"
    )
    device = pick_device()
    dtype = training_dtype(config.model, device)
    attention.check(config.model.attn_implementation, device, dtype)
    for note in (*run.chat_format.notes(), *run.targets.notes):
        say(f"note: {note}")
    if instead := substitute(config.train.optim, device.type):
        say(f"note: {config.train.optim} pages to the host, which needs a GPU; {instead} is used here")
    model = open_base(config.model, dtype, device, run.chat_format.config, say)
    prove_segments(model, run.rows.train, config.model.attn_implementation)
    return model


def _say_what_trains(run: Prepared, model: Any, layers: dict[str, LoraLinear], say: Say) -> None:
    config, trainable = run.config, trainable_parameters(layers)
    stored, dtype = quantisation(config.model), training_dtype(config.model, model.device)
    say(
        f"model: {run.chat_format.config.model_type} in {stored.kind + ' and ' if stored else ''}"
        f"{str(dtype).removeprefix('torch.')} on {model.device.type}; "
        f"LoRA r={config.lora.r} on {', '.join(run.targets.leaves)}: "
        f"{trainable:,} of {trainable + base_parameters(run.chat_format.config):,} parameters train"
    )


def _say_where_it_goes_on(resume: Checkpoint | None, say: Say) -> None:
    if resume is None:
        return
    say(f"going on after step {resume.progress.step}")
    if differ := differences(resume.machine, checkpoint.machine()):
        say(f"note: the last bits may differ from a run that was never interrupted ({'; '.join(differ)})")


def _summary(run: Prepared, model: Any, layers: dict[str, LoraLinear], progress: Progress) -> dict[str, Any]:
    config, trainable = run.config, trainable_parameters(layers)
    stored = quantisation(config.model)
    return {
        "steps": progress.step,
        "rows": run.rows.account.report.rows(),
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "train_seconds": round(progress.seconds, 4),
        "tokens_per_s": round(progress.tokens_per_s, 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "losses": progress.losses,
        "trainable_parameters": trainable,
        "parameters": trainable + base_parameters(run.chat_format.config),
        "dtype": str(training_dtype(config.model, model.device)).removeprefix("torch."),
        "quantised": stored.kind if stored else None,
        "device": model.device.type,
        "target_modules": list(run.targets.leaves),
        "template": run.chat_format.template.name,
    }


def _evaluated(
    run_dir: RunDir, run: Prepared, generator: Generator, layers: dict[str, LoraLinear], seconds: float, say: Say
) -> dict[str, Any]:
    """Score base and tuned model on the held-out rows within ``seconds``; without such rows, replies for the report."""
    held_out, account = run.rows.held_out, run.rows.account
    if len(held_out):
        scoring.write_rows(run_dir.path / scoring.HELD_OUT, account.conversations)
    if not run.config.train.eval_time_ratio:
        return {}
    if len(held_out):
        result = scoring.at_the_end(run_dir.path, generator, layers, held_out, account.conversations, seconds, say)
        return {"held_out": {"base": result.base.as_dict(), "tuned": result.tuned.as_dict()}}
    scoring.samples_at_the_end(run_dir.path, generator, layers, account.samples, seconds, say)
    return {}
