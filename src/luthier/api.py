"""One function per verb. Assembly only: what each does is in the modules it calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier import adapter as adapters
from luthier import hub, templates
from luthier import personas as demos
from luthier.config import RunConfig, differences
from luthier.errors import ConfigError, ModelError
from luthier.evaluate import held_out_loss
from luthier.generate import Generator, Reply, Sampling
from luthier.lora import LoraLinear, attach, trainable_parameters
from luthier.models.directory import fingerprint
from luthier.models.forward import prove_segments
from luthier.models.load import load_weights, pick_device, pick_dtype
from luthier.preflight import Inspection, Voice, inspect, voice
from luthier.training import checkpoint, loop
from luthier.training.metrics import MetricsFile, Progress, StepRecord, peak_rss_bytes
from luthier.training.optim import Optimizer
from luthier.training.run_dir import RunDir
from luthier.types import Message

__all__ = ["Chat", "DemoResult", "chat", "check", "demo", "pull", "train"]

Say = Callable[[str], None]
pull = hub.pull


def check(config: RunConfig, show: int = 0) -> Inspection:
    """Prove data, template, stop tokens and target modules; reads no weights.

    Never raises for a user's mistake: it is in ``.error`` of what is returned, beside the complete counts.
    """
    return inspect(config, keep=False, show=show)


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
        "identity": identity,
    }
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


@dataclass(slots=True)
class Chat:
    """A conversation with a base model, or with a run's adapter as it was trained."""

    generator: Generator
    system: str | None
    history: list[Message]

    def __post_init__(self) -> None:
        if self.system:
            self.generator.check(self.system, "the system prompt")

    def send(self, text: str, sampling: Sampling | None = None, on_text: Callable[[str], None] | None = None) -> Reply:
        """Add a user's message and the model's reply to the conversation; returns the reply."""
        self.generator.check(text, "the message")
        self.history.append(Message("user", text))
        try:
            reply = self.generator.reply(self.messages(), sampling or Sampling(), on_text)
        except BaseException:
            self.history.pop()
            raise
        self.history.append(Message("assistant", reply.text))
        return reply

    def messages(self) -> list[Message]:
        return [*self.opening(), *self.history]

    def opening(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []

    def reset(self) -> None:
        self.history.clear()


def chat(path: Path, system: str | None = None, dtype: str = "auto") -> Chat:
    """Open a run directory, an adapter directory or a base model directory for chatting.

    system: system prompt; None: the one of the run's training, if any. dtype "auto": fp32 on CPU, so that greedy
    replies are reproducible; the device's own type elsewhere.
    """
    path = Path(path)
    directory = path / "adapter" if (path / "adapter" / adapters.CONFIG).is_file() else path
    device = pick_device()
    kind = torch.float32 if dtype == "auto" and device.type == "cpu" else pick_dtype(dtype, device)
    if not (directory / adapters.META).is_file():
        if (path / "run.yaml").is_file():
            raise ModelError(f"{path}: the run has no adapter yet", "finish it with luthier train")
        if (directory / adapters.CONFIG).is_file():
            raise ModelError(f"{directory}: has no {adapters.META}", "give a directory that luthier train wrote")
        found = voice(path)
        return _chat(load_weights(path, kind, device), found, system)
    adapter = adapters.load(directory)
    base = _base_path(path, adapter)
    found = replace(voice(base, described=adapter.facts.template), stop_ids=adapter.facts.stop_ids)
    adapters.verify(adapter, base, fingerprint(base, found.config), found.tokenizer.digest())
    model = load_weights(base, kind, device)
    adapters.apply(model, adapter)
    return _chat(model, found, adapter.facts.system if system is None else system)


def _chat(model: Any, found: Voice, system: str | None) -> Chat:
    return Chat(Generator(model, found.tokenizer, found.template, found.stop_ids), system, [])


def _base_path(path: Path, adapter: adapters.Adapter) -> Path:
    run = RunDir(path)
    base = run.config().model.path if run.config_file.is_file() else Path(adapter.base_path)
    if not base.is_dir():
        raise ModelError(
            f"{base}: the base model of {adapter.path} is not there", "put the base model back at that place"
        )
    return base


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The demo's figures: held-out loss in nats a token, and replies of both models to every held-out prompt."""

    base_loss: float
    tuned_loss: float
    prompts: list[str]
    base_replies: list[Reply]
    tuned_replies: list[Reply]
    summary: dict[str, Any]

    @property
    def stop_rate(self) -> float:
        return sum(r.stopped for r in self.tuned_replies) / len(self.tuned_replies)

    @property
    def loss_fall(self) -> float:
        """Share of the base's held-out loss that training took away."""
        return 1 - self.tuned_loss / self.base_loss


def demo(
    output_dir: Path,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    say: Say = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> DemoResult:
    """Pull the embedded model, teach it the shipped persona, and compare both on prompts it has never seen."""
    base = pull("smollm2-135m", say=say)
    config = demos.config(base, output_dir)
    RunDir(Path(output_dir)).claim(_absolute(config))
    held_out = inspect(config)
    if held_out.error:
        raise held_out.error
    prompts = [c.messages[:-1] for c in held_out.chats]
    sampling = Sampling(max_new_tokens=200)
    say(f"asking the base model {len(prompts)} held-out questions")
    untuned = chat(base)
    base_loss = held_out_loss(untuned.generator.model, held_out.held_out).loss
    base_replies = untuned.generator.replies(prompts, sampling)
    del untuned
    summary = train(config, on_step, say, stop)
    say("asking the tuned model the same questions")
    tuned = chat(output_dir)
    tuned_loss = held_out_loss(tuned.generator.model, held_out.held_out).loss
    replies = tuned.generator.replies(prompts, sampling)
    return DemoResult(base_loss, tuned_loss, [p[-1].content for p in prompts], base_replies, replies, summary)


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
