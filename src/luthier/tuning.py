"""One run, from its configuration to its summary: what ``train`` does, in order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier import adapter as adapters
from luthier import estimating, evaluation, report, templates
from luthier.batch import Plan
from luthier.config import RunConfig, differences
from luthier.errors import ConfigError
from luthier.estimating import Wanted
from luthier.generate import Generator
from luthier.kernels import attention
from luthier.lora import LoraLinear, attach, trainable_parameters
from luthier.memory import Rows
from luthier.models.base import open_base, quantisation, training_dtype
from luthier.models.directory import fingerprint
from luthier.models.forward import prove_segments
from luthier.models.load import base_parameters, pick_device
from luthier.preflight import Inspection, inspect
from luthier.training import checkpoint, loop
from luthier.training.metrics import MetricsFile, Progress, StepRecord, peak_rss_bytes
from luthier.training.optim import Optimizer, substitute
from luthier.training.run_dir import RunDir

Say = Callable[[str], None]


def train(
    config: RunConfig,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    say: Say = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    force: bool = False,
) -> dict[str, Any]:
    """Run to the end and return ``summary.json``'s content.

    A finished run is returned as it is, nothing rewritten; an interrupted one goes on from its last checkpoint.
    stop:  asked after every step; true saves a checkpoint and raises Stopped.
    force: start also where the estimate says that memory will not do.
    """
    if config.output_dir is None:
        raise ConfigError("output_dir: is missing", "give --output-dir RUN")
    config = absolute(config)
    config_as_given = config
    run = RunDir(config.output_dir or Path())
    run.claim(config)
    found = inspect(config, say=say)
    if found.error:
        raise found.error
    assert found.voice and found.targets
    base = fingerprint(config.model.path, found.voice.config)
    identity = {"data": found.fingerprint, "base model": base.weights}
    if run.finished:
        run.same_identity(run.summary().get("identity", {}), identity)
        say(f"{run.path}: this run is finished already; nothing was changed")
        return run.summary()
    resume = checkpoint.latest(run.checkpoints, say)
    if resume:
        run.same_identity(resume.identity, identity)
    config = _estimated(config, found, say, force)
    run.start(config_as_given, found.as_dict())
    model, layers = _prepare(config, found, say)
    done = _loop(run, config, found, model, layers, identity, resume, on_step, say, stop)
    facts = adapters.Facts(
        system=config.data.system or None,
        template=dict(found.voice.template.describe()),
        template_sha256=templates.digest(found.voice.template),
        stop_ids=found.voice.stop_ids,
        base=base,
        tokenizer_sha256=found.voice.tokenizer.digest(),
        data_sha256=identity["data"],
        rope_theta=config.model.rope_theta,
    )
    adapters.save(run.adapter, layers, config.lora, found.targets, facts, config.model.path)
    summary = {
        "steps": done.step,
        "rows": found.report.rows(),
        "tokens": done.tokens,
        "supervised_tokens": done.supervised_tokens,
        "train_seconds": round(done.seconds, 4),
        "tokens_per_s": round(done.tokens_per_s, 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "losses": done.losses,
        "trainable_parameters": trainable_parameters(layers),
        "parameters": trainable_parameters(layers) + base_parameters(found.voice.config),
        "dtype": str(training_dtype(config.model, model.device)).removeprefix("torch."),
        "quantised": stored.kind if (stored := quantisation(config.model)) else None,
        "device": model.device.type,
        "target_modules": list(found.targets.leaves),
        "template": found.voice.template.name,
        "identity": identity,
    }
    if len(found.held_out):
        evaluation.write_rows(run.path / evaluation.HELD_OUT, found.chats)
    generator = Generator(model, found.voice.tokenizer, found.voice.template, found.voice.stop_ids)
    seconds = done.seconds * config.train.eval_time_ratio
    if len(found.held_out) and config.train.eval_time_ratio:
        result = evaluation.at_the_end(run.path, found, generator, layers, seconds, say)
        summary["held_out"] = {"base": result.base.as_dict(), "tuned": result.tuned.as_dict()}
    elif config.train.eval_time_ratio:
        evaluation.samples_at_the_end(run.path, found, generator, layers, seconds, say)
    report.write(run.path, config, summary, found.train.lengths())
    run.finish(summary)
    return summary


def _estimated(config: RunConfig, found: Inspection, say: Say, force: bool) -> RunConfig:
    """Say what the run will take, refuse what cannot fit, and decide gradient checkpointing where it is auto."""
    expected = estimating.look(wanted(config, found), every_precision=False)
    say(expected.line())
    if not force:
        estimating.refuse(expected)
    recompute = expected.chosen.checkpointing
    if recompute and config.train.gradient_checkpointing == "auto":
        say("gradient checkpointing is on, as memory is short (--set train.gradient_checkpointing=false leaves it out)")
    return config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": recompute})})


def _prepare(config: RunConfig, found: Inspection, say: Say) -> tuple[Any, dict[str, LoraLinear]]:
    """The model in memory with its adapter attached, and proven to keep rows apart."""
    assert found.voice and found.targets
    rows = found.report.rows()
    say(
        f"data: {rows['read']} rows read, {rows['kept']} kept, {rows['dropped']} dropped, {rows['changed']} changed; "
        f"template {found.voice.template.name}"
    )
    device = pick_device()
    dtype = training_dtype(config.model, device)
    attention.check(config.model.attn_implementation, device, dtype)
    for note in found.model_notes():
        say(f"note: {note}")
    if instead := substitute(config.train.optim, device.type):
        say(f"note: {config.train.optim} pages to the host, which needs a GPU; {instead} is used here")
    model = open_base(config.model, dtype, device, found.voice.config, say)
    prove_segments(model, found.train, config.model.attn_implementation)
    layers = attach(model, config.lora, found.targets, config.train.seed)
    trainable = trainable_parameters(layers)
    total = trainable + base_parameters(found.voice.config)
    stored = quantisation(config.model)
    say(
        f"model: {found.voice.config.model_type} in {stored.kind + ' and ' if stored else ''}"
        f"{str(dtype).removeprefix('torch.')} on {device.type}; "
        f"LoRA r={config.lora.r} on {', '.join(found.targets.leaves)}: {trainable:,} of {total:,} parameters train"
    )
    return model, layers


def _loop(
    run: RunDir,
    config: RunConfig,
    found: Inspection,
    model: Any,
    layers: dict[str, LoraLinear],
    identity: dict[str, str],
    resume: checkpoint.Checkpoint | None,
    on_step: Callable[[StepRecord], None],
    say: Say,
    stop: Callable[[], bool],
) -> Progress:
    """The training loop with its files around it. Raises Stopped where ``stop`` ended it."""
    if resume:
        say(f"going on after step {resume.progress.step}")
        differ = differences(resume.machine, checkpoint.machine())
        if differ:
            say(f"note: the last bits may differ from a run that was never interrupted ({'; '.join(differ)})")
    metrics = MetricsFile(run.metrics, config.train.logging_steps, resume.progress.step if resume else 0)

    def record(step: StepRecord) -> None:
        metrics.write(step)
        on_step(step)

    def save(optimizer: Optimizer, progress: Progress) -> None:
        checkpoint.write(run.checkpoints, layers, optimizer, progress, identity, config.train.save_total_limit)

    session = loop.Session(record, save, stop, config.model.attn_implementation, say)
    try:
        done = loop.train(model, layers, found.train, config.train, session, resume)
    finally:
        metrics.close()
    steps = Plan.of(len(found.train), config.train).steps
    if done.step < steps:
        raise Stopped(f"{run.path}: stopped after step {done.step} of {steps}, which is saved")
    return done


class Stopped(Exception):
    """A run was asked to stop and did, after saving a checkpoint."""


def wanted(config: RunConfig, found: Inspection) -> Wanted:
    assert found.voice and found.targets
    rows = Rows(found.train.lengths(), found.train.supervised(), found.train.common())
    return Wanted(config, found.voice.config, found.targets, rows)


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
