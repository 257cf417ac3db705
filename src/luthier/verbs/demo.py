"""``luthier demo``: the whole flow on the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.adapters.run_dir import RunDir
from luthier.evaluation.scoring import Scores, score
from luthier.inference.generation import Reply
from luthier.personas import config as demo_config
from luthier.training.metrics import StepRecord
from luthier.types import Say
from luthier.verbs.chat import chat
from luthier.verbs.check import inspect
from luthier.verbs.pull import pull
from luthier.verbs.train import absolute, train


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
    config = demo_config(base, Path(output_dir))
    RunDir(Path(output_dir)).claim(absolute(config))
    rows = inspect(config).prepared().rows
    conversations = rows.account.conversations
    say(f"asking the base model {len(conversations)} held-out questions")
    before = score(chat(base).generator, rows.held_out, conversations)
    summary = train(config, on_step, say, stop)
    say("asking the tuned model the same questions")
    after = score(chat(output_dir).generator, rows.held_out, conversations)
    return DemoResult(before, after, [c.messages[-2].content for c in conversations], summary)
