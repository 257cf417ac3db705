"""``luthier demo``: download, train and evaluate the small embedded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from luthier._util import files
from luthier.adapters.run_dir import RunDir, Summary, absolute
from luthier.config import RunConfig
from luthier.evaluation import report
from luthier.evaluation.scoring import HELD_OUT, RESULTS, Comparison, Scores, held_out_loss, score
from luthier.inference.generation import Reply
from luthier.personas import config as demo_config
from luthier.training.metrics import StepRecord
from luthier.types import Log
from luthier.verbs.chat import open_model
from luthier.verbs.check import inspect
from luthier.verbs.pull import pull
from luthier.verbs.train import train_locked


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Scores of both models on every held-out prompt, in fp32 on the CPU, and the run's summary."""

    base: Scores
    tuned: Scores
    prompts: list[str]
    summary: Summary

    @property
    def base_loss(self) -> float:
        """Held-out loss of the base model in nats per token."""
        return self.base.held_out.loss

    @property
    def tuned_loss(self) -> float:
        """Held-out loss of the tuned model in nats per token."""
        return self.tuned.held_out.loss

    @property
    def loss_fall(self) -> float:
        """Share of the base model's held-out loss that training removed."""
        return 1 - self.tuned_loss / self.base_loss

    @property
    def stop_rate(self) -> float:
        """Share of the tuned model's replies that end with a stop token."""
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
    log: Log = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> DemoResult:
    """Pull the embedded model, train it on the shipped persona, and score both models on held-out prompts."""
    base = pull("smollm2-135m", log=log)
    config = absolute(demo_config(base, Path(output_dir)))
    run = RunDir(config.output_dir or Path())
    with run.locked(log):
        return _demo_locked(run, config, on_step, log, stop)


def _demo_locked(
    run: RunDir, config: RunConfig, on_step: Callable[[StepRecord], None], log: Log, stop: Callable[[], bool]
) -> DemoResult:
    run.claim(config)
    rows = inspect(config).prepared().rows
    conversations = rows.report.conversations
    log(f"asking the base model {len(conversations)} held-out questions")
    generator = open_model(config.model.path, dtype="float32").generator
    before = score(generator, held_out_loss(generator.model, rows.held_out), conversations)
    summary = train_locked(run, config, on_step, log, stop)
    log("asking the tuned model the same questions")
    generator = open_model(run.path, dtype="float32").generator
    after = score(generator, held_out_loss(generator.model, rows.held_out), conversations)
    prompts = [c.messages[-2].content for c in conversations]
    references = tuple(c.messages[-1].content for c in conversations)
    comparison = Comparison(str(run.path / HELD_OUT), before, after, "float32", tuple(prompts), references)
    files.write_json(run.path / RESULTS, comparison.as_dict())
    report.write(run.path, config, summary, rows.train.lengths())  # again, now with the replies
    return DemoResult(before, after, prompts, summary)
