"""One function per verb. Assembly only: what each does is in the modules it calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import adapter as adapters
from luthier import config as configs
from luthier import evaluation, files, hub, report, templates
from luthier import personas as demos
from luthier.chatting import Chat, open_chat
from luthier.config import RunConfig, differences
from luthier.diagnosis import examine
from luthier.errors import ConfigError
from luthier.evaluate import Scores, score
from luthier.evaluation import Comparison
from luthier.generate import Generator, Reply
from luthier.lora import LoraLinear, attach, trainable_parameters
from luthier.models.directory import fingerprint
from luthier.models.forward import prove_segments
from luthier.models.load import load_weights, pick_device, pick_dtype
from luthier.preflight import Inspection, inspect
from luthier.training import checkpoint, loop
from luthier.training.metrics import MetricsFile, Progress, StepRecord, peak_rss_bytes
from luthier.training.optim import Optimizer
from luthier.training.run_dir import RunDir

__all__ = ["Chat", "DemoResult", "Stopped", "chat", "check", "demo", "doctor", "eval", "init", "pull", "train"]

Say = Callable[[str], None]
pull = hub.pull
chat = open_chat
doctor = examine


def check(config: RunConfig, show: int = 0) -> Inspection:
    """Prove data, template, stop tokens and target modules; reads no weights.

    Never raises for a user's mistake: it is in ``.error`` of what is returned, beside the complete counts.
    """
    return inspect(config, keep=False, show=show)


def init(
    to: Path | str,
    model: Path | str | None = None,
    data: Sequence[Path | str] = (),
    output_dir: Path | str | None = None,
) -> Path:
    """Write a commented ``run.yaml``; an existing file is never overwritten."""
    to = Path(to)
    if to.exists():
        raise ConfigError(f"{to}: is there already", "choose another name with --to, or delete it")
    text = configs.template(
        str(model or "MODEL_DIR"), [str(p) for p in data] or ["ROWS.jsonl"], str(output_dir or "run")
    )
    files.write_text(to, text)
    return to


def train(
    config: RunConfig,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    say: Say = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run to the end and return ``summary.json``'s content.

    A finished run is returned as it is, nothing rewritten; an interrupted one goes on from its last checkpoint.
    stop: asked after every step; true saves a checkpoint and raises Stopped.
    """
    if config.output_dir is None:
        raise ConfigError("output_dir: is missing", "give --output-dir RUN")
    config = _absolute(config)
    run = RunDir(config.output_dir or Path())
    run.claim(config)
    found = inspect(config)
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
    run.start(config, found.as_dict())
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
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
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
        evaluation.samples_at_the_end(run.path, found, generator, layers, seconds)
    report.write(run.path, config, summary, found.train.lengths())
    run.finish(summary)
    return summary


def _prepare(config: RunConfig, found: Inspection, say: Say) -> tuple[Any, dict[str, LoraLinear]]:
    """The model in memory with its adapter attached, and proven to keep rows apart."""
    assert found.voice and found.targets
    rows = found.report.rows()
    say(
        f"data: {rows['read']} rows read, {rows['kept']} kept, {rows['dropped']} dropped, {rows['changed']} changed; "
        f"template {found.voice.template.name}"
    )
    device = pick_device()
    dtype = pick_dtype(config.model.dtype, device)
    model = load_weights(config.model.path, dtype, device)
    prove_segments(model, found.train, config.model.attn_implementation)
    layers = attach(model, config.lora, found.targets, config.train.seed)
    trainable, total = trainable_parameters(layers), sum(p.numel() for p in model.parameters())
    say(
        f"model: {found.voice.config.model_type} in {str(dtype).removeprefix('torch.')} on {device.type}; "
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

    session = loop.Session(record, save, stop, config.model.attn_implementation)
    try:
        done = loop.train(model, layers, found.train, config.train, session, resume)
    finally:
        metrics.close()
    steps = loop.plan(len(found.train), config.train).steps
    if done.step < steps:
        raise Stopped(f"{run.path}: stopped after step {done.step} of {steps}, which is saved")
    return done


class Stopped(Exception):
    """A run was asked to stop and did, after saving a checkpoint."""


def eval(  # noqa: A001 - the verb's name
    path: Path | str | None = None,
    data: Sequence[Path] = (),
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    checkpoint: int | None = None,
) -> Comparison:
    """The verb ``eval``: base and tuned model on held-out rows (the run's own where ``data`` is empty)."""
    opened = open_chat(path, None, dtype, model, adapter, checkpoint)
    return evaluation.evaluate(opened, Path(path) if path else None, data)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both models on every held-out prompt, in fp32 on the CPU, and the run's summary."""

    base: Scores
    tuned: Scores
    prompts: list[str]
    summary: dict[str, Any]

    @property
    def base_loss(self) -> float:
        """Held-out loss in nats a token."""
        return self.base.held_out.loss

    @property
    def tuned_loss(self) -> float:
        return self.tuned.held_out.loss

    @property
    def loss_fall(self) -> float:
        """Share of the base's held-out loss that training took away."""
        return 1 - self.tuned_loss / self.base_loss

    @property
    def stop_rate(self) -> float:
        return self.tuned.stop_rate or 0.0

    @property
    def base_replies(self) -> tuple[Reply, ...]:
        return self.base.replies

    @property
    def tuned_replies(self) -> tuple[Reply, ...]:
        return self.tuned.replies


def demo(
    output_dir: Path | str,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    say: Say = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> DemoResult:
    """Pull the embedded model, teach it the shipped persona, and compare both on prompts it has never seen."""
    base = pull("smollm2-135m", say=say)
    config = demos.config(base, Path(output_dir))
    RunDir(Path(output_dir)).claim(_absolute(config))
    found = inspect(config)
    if found.error:
        raise found.error
    say(f"asking the base model {len(found.chats)} held-out questions")
    before = score(chat(base).generator, found.held_out, found.chats)
    summary = train(config, on_step, say, stop)
    say("asking the tuned model the same questions")
    after = score(chat(output_dir).generator, found.held_out, found.chats)
    return DemoResult(before, after, [c.messages[-2].content for c in found.chats], summary)


def _absolute(config: RunConfig) -> RunConfig:
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
