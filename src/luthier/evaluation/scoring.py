"""Score a model on held-out rows: loss, perplexity, share of replies that stop by themselves, and text metrics."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier._util import files
from luthier.batching.collate import collate, to_device
from luthier.evaluation import text_metrics
from luthier.evaluation.text_metrics import TextMetrics, measure
from luthier.inference.generation import Generator, Reply, Sampling
from luthier.lora.layers import LoraLinear, disable_adapter, frozen_dtype
from luthier.models.protocols import CausalLM
from luthier.training.forward import segment_attention, token_losses
from luthier.types import Conversation, Example, Log, Message

REPLIES, NEW_TOKENS = 24, 200  # held-out prompts that are answered, and the maximum length of a reply
HELD_OUT, RESULTS = "held-out.jsonl", "evaluation.json"  # files in a run directory
_ROWS = 8  # rows per batch


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean negative log-likelihood per supervised token (nats), and the number of tokens and rows it covers."""

    loss: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one model on the held-out rows.

    text:     the replies compared with the reference replies of the rows.
    complete: false if the time limit was reached before all rows and prompts were done.
    seconds:  time taken.
    """

    held_out: HeldOut
    replies: tuple[Reply, ...]
    text: TextMetrics
    complete: bool
    seconds: float

    @property
    def stop_rate(self) -> float | None:
        """Share of the replies that ended with a stop token; None if there are no replies."""
        return sum(r.stopped for r in self.replies) / len(self.replies) if self.replies else None

    def as_dict(self) -> dict[str, object]:
        return {
            "loss": self.held_out.loss,
            "perplexity": self.held_out.perplexity,
            "tokens": self.held_out.tokens,
            "rows": self.held_out.rows,
            "stop_rate": self.stop_rate,
            **self.text.as_dict(),
            "replies": len(self.replies),
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
        }


def held_out_loss(model: CausalLM, examples: Sequence[Example], deadline: float | None = None) -> HeldOut:
    """Compute the mean loss per supervised token, rows in order. Leaves the model in eval mode.

    deadline: in ``time.monotonic`` seconds; no batch starts after it, except that the first one always runs.
    """
    model.eval()
    total, tokens, rows = 0.0, 0, 0
    with segment_attention(model):
        for at in range(0, len(examples), _ROWS):
            if rows and deadline is not None and time.monotonic() > deadline:
                break
            batch = collate(examples[at : at + _ROWS])
            total += float(token_losses(model, to_device(batch, model.device)).double().sum())
            tokens += batch.supervised
            rows += len(batch.sources)
    return HeldOut(total / tokens, tokens, rows)


def with_fitting_prompts(generator: Generator, chats: Sequence[Conversation], most: int) -> list[Conversation]:
    """Return the first ``most`` rows whose prompt fits into the model's context (training cuts longer rows)."""
    fitting = (c for c in chats if generator.fits(c.messages[:-1]))
    return list(itertools.islice(fitting, most))


def score(
    generator: Generator,
    examples: Sequence[Example],
    chats: Sequence[Conversation],
    most_replies: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
    seconds: float | None = None,
) -> Scores:
    """Score a model: loss on all rows, then greedy replies to the first ``most_replies`` prompts.

    seconds: time limit for both together, None for none.
    """
    start = time.monotonic()
    deadline = None if seconds is None else start + seconds
    loss = held_out_loss(generator.model, examples, deadline)
    asked = with_fitting_prompts(generator, chats, most_replies)
    replies = answers(generator, [c.messages[:-1] for c in asked], max_new_tokens, deadline)
    complete = loss.rows == len(examples) and len(replies) == len(asked)
    duration = time.monotonic() - start
    text = measure([r.text for r in replies], [c.messages[-1].content for c in asked[: len(replies)]])
    return Scores(loss, tuple(replies), text, complete, duration)


def answers(
    generator: Generator, prompts: Sequence[Sequence[Message]], max_new_tokens: int, deadline: float | None = None
) -> list[Reply]:
    """Generate greedy replies in batches.

    deadline: in ``time.monotonic`` seconds; returns only the replies that were complete before it.
    """
    replies: list[Reply] = []
    size = _ROWS if deadline is not None else max(1, len(prompts))
    for at in range(0, len(prompts), size):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        batch = generator.replies(prompts[at : at + size], Sampling(max_new_tokens, max_seconds=left))
        if deadline is not None and time.monotonic() > deadline:
            batch = batch if all(r.stopped for r in batch) else []  # cut off by the time limit
        replies += batch
    return replies


@dataclass(frozen=True, slots=True)
class Comparison:
    """The scores of the base and the tuned model on the same rows. data: a file that holds these rows."""

    data: str
    base: Scores
    tuned: Scores
    dtype: str
    prompts: tuple[str, ...]
    references: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        samples = zip(self.prompts, self.references, self.base.replies, self.tuned.replies, strict=False)
        return {
            "data": self.data,
            "dtype": self.dtype,
            "base": self.base.as_dict(),
            "tuned": self.tuned.as_dict(),
            "samples": [
                {"prompt": p, "reference": r, "base": b.text, "tuned": t.text, "stopped": t.stopped}
                for p, r, b, t in samples
            ],
        }


def compare(
    generator: Generator,
    layers: dict[str, LoraLinear],
    examples: Sequence[Example],
    chats: Sequence[Conversation],
    data: Path,
    seconds: float | None = None,
    most_replies: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
) -> Comparison:
    """Score the tuned model, then the base model (with the adapter switched off) on the same rows and prompts.

    data: the file that holds the rows. seconds: time limit; each model gets half of it.
    """
    half = None if seconds is None else seconds / 2
    asked = with_fitting_prompts(generator, chats, most_replies)
    after = score(generator, examples, asked, most_replies, max_new_tokens, half)
    scored = asked[: len(after.replies)]
    with disable_adapter(layers):
        before = score(generator, examples[: after.held_out.rows], scored, most_replies, max_new_tokens, half)
    return Comparison(
        data=str(data),
        base=before,
        tuned=after,
        dtype=str(frozen_dtype(generator.model)).removeprefix("torch."),
        prompts=tuple(c.messages[-2].content for c in scored),
        references=tuple(c.messages[-1].content for c in scored),
    )


def write_rows(path: Path, chats: Sequence[Conversation]) -> None:
    """Write held-out rows as chat messages (JSONL)."""
    rows = ({"messages": [{"role": m.role, "content": m.content} for m in c.messages]} for c in chats)
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def evaluate_run(
    run: Path,
    generator: Generator,
    layers: dict[str, LoraLinear],
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    seconds: float,
    log: Log,
) -> Comparison:
    """Compare both models on a run's held-out rows, write ``evaluation.json`` and report the result.

    seconds: time limit. log: called with the result and with notes.
    """
    result = compare(generator, layers, examples, conversations, run / HELD_OUT, seconds)
    files.write_json(run / RESULTS, result.as_dict())
    log(
        f"held-out loss: {result.base.held_out.loss:.3f} before, {result.tuned.held_out.loss:.3f} after "
        f"({result.tuned.held_out.rows} of {len(examples)} rows)"
    )
    if note := text_metrics.note():
        log(f"note: {note}")
    if not (result.tuned.complete and result.base.complete):
        log(f"evaluation stopped at its time limit ({seconds:.1f} s); luthier eval {run} has no time limit")
    return result


def write_sample_replies(
    run: Path,
    generator: Generator,
    layers: dict[str, LoraLinear],
    conversations: Sequence[Conversation],
    seconds: float,
    log: Log,
) -> None:
    """Write replies of both models to a few training prompts for the report, if there are no held-out rows."""
    asked = with_fitting_prompts(generator, conversations, len(conversations))
    prompts = [c.messages[:-1] for c in asked]
    after = answers(generator, prompts, NEW_TOKENS, time.monotonic() + seconds / 2)
    with disable_adapter(layers):
        before = answers(generator, prompts[: len(after)], NEW_TOKENS, time.monotonic() + seconds / 2)
    if len(before) < len(asked):
        log(f"replies for the report stopped at their time limit ({seconds:.1f} s): {len(before)} of {len(asked)} done")
    rows = zip(asked, before, after, strict=False)
    samples = [
        {
            "prompt": c.messages[-2].content,
            "reference": c.messages[-1].content,
            "base": b.text,
            "tuned": t.text,
            "stopped": t.stopped,
        }
        for c, b, t in rows
    ]
    files.write_json(run / RESULTS, {"data": None, "samples": samples})
